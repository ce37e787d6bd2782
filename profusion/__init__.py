"""Customised text-to-image generation that keeps the details and does not overfit.

The kernel of ProFusion for ComfyUI: Infusion (arXiv 2404.14007) as pure torch, with no import of the host.
"""

__version__ = "0.1.0"
