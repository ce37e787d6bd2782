"""Tests against a real ComfyUI: the first at $COMFYUI_PATH, or around the pack, or at ~/comfy*/ComfyUI.

Every test module here starts with `pytest.importorskip("comfy.samplers", reason=...)`, so that without a host
each is skipped by name.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

from tools.hosts import find_host

REPOSITORY = Path(__file__).resolve().parents[2]


HOST = find_host()
if HOST is not None:
    # Before the repository, whose nodes/ would hide the host's nodes.py.
    sys.path.insert(0, str(HOST))
    sys.path.append(str(Path(__file__).parent))
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()


def pytest_terminal_summary(terminalreporter):
    if HOST is None:
        terminalreporter.section("ComfyUI not found")
        terminalreporter.write_line(
            "The tests in tests/host were SKIPPED. Set COMFYUI_PATH to a ComfyUI checkout to run them."
        )


@pytest.fixture(autouse=True)
def nobody_listens_or_cancels():
    """Whatever a test hung on the progress bar is gone after it, and so is a Cancel that it pressed."""
    yield
    if HOST is not None:
        from reports import stop_listening

        stop_listening()


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory):
    """Where nodes put the pictures that they show: not into the host's own folder."""
    if HOST is not None:
        import folder_paths

        folder_paths.set_temp_directory(str(tmp_path_factory.mktemp("temp")))


@pytest.fixture(scope="session")
def pack():
    """The pack, loaded as the host loads it: under a name that is not importable otherwise."""
    if "profusion_pack" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "profusion_pack", REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["profusion_pack"] = module
        spec.loader.exec_module(module)
    return sys.modules["profusion_pack"]


@pytest.fixture(scope="session")
def infused(pack):
    """The node on a tiny random model."""
    from infused import Infused

    return Infused(pack)


@pytest.fixture(scope="session")
def infused_toybox(pack):
    """The node on Toybox, as the pack loads it."""
    from infused import Infused

    models = sys.modules[f"{pack.__name__}.nodes.host.toybox"]
    return Infused(pack, models.load_model(), models.load_clip())
