"""Shared by all tests: one thread, so that small shapes are quick and results do not depend on the machine's cores."""

import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def packed():
    """The files that `comfy node pack` puts into the Registry's archive: what git tracks and .comfyignore, which is read
    by gitignore's rules, does not match."""

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
