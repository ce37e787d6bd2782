"""Shared by all tests: one thread, so that small shapes are quick and results do not depend on the machine's cores."""

import subprocess
from pathlib import Path

import pytest
import torch

from tests import pretend

ROOT = Path(__file__).parents[1]
SLOW = 20  # seconds, from which on a test is to be marked


def devices() -> list[str]:
    """The CPU, and the accelerators here; where there are none, a pretended one, which shows what is left on the
    CPU."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    accelerators = [name for name, is_there in there.items() if is_there]
    return ["cpu", *(accelerators or ([pretend.NAME] if pretend.is_possible() else []))]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, on a GPU too


@pytest.fixture(scope="session", params=devices())
def device(request):
    """Every device on which the kernel can be run here."""
    return torch.device(request.param)


@pytest.fixture
def precise_device(device):
    """The same, but for those without float64."""
    if device.type == "mps":
        pytest.skip("MPS has no float64")
    return device


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def packed():
    """The files that `comfy node pack` puts into the Registry's archive: what git tracks and .comfyignore, which is
    read by gitignore's rules, does not match."""

    def listed(*options: str) -> set[str]:
        command = ["git", "ls-files", "-z", *options]
        return set(
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
        )

    try:
        names = listed() - listed("--cached", "--ignored", "--exclude-from=.comfyignore")
    except (FileNotFoundError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"only git knows what would be packed, and this is no checkout of it: {problem}")
    return sorted(name for name in names if (ROOT / name).is_file())


def pytest_collection_modifyitems(config, items):
    """Leave out on the pretended device what it cannot do, and types in which it computes as the CPU does."""

    def is_impossible(item):
        if not is_pretended(item):
            return False
        other_types = {str(value) for value in item.callspec.params.values()} & {"torch.bfloat16", "torch.float16"}
        return item.get_closest_marker("real_device") or "precise_device" in item.fixturenames or other_types

    deselected = [item for item in items if is_impossible(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not is_impossible(item)]


def pytest_collection_finish(session):
    # Before the first test: autograd counts the devices when it is first used.
    if any(map(is_pretended, session.items)):
        pretend.install()


def is_pretended(item) -> bool:
    return hasattr(item, "callspec") and item.callspec.params.get("device") == pretend.NAME


def pytest_terminal_summary(terminalreporter):
    slow = {
        report.nodeid: report.duration
        for report in terminalreporter.getreports("passed")
        if report.duration > SLOW and "slow" not in report.keywords
    }
    if slow:
        terminalreporter.section(f"more than {SLOW} seconds, and not marked slow")
        for name, seconds in sorted(slow.items()):
            terminalreporter.write_line(f"{seconds:.0f} s {name}")
