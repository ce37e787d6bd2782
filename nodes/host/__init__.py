"""The ring between the nodes and the kernel: everything that imports ComfyUI's internals, one job a file.

Two floors: the files that import none of their neighbours, and those that are built on them
(tests/test_architecture.py).
"""
