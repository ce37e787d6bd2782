"""Which ComfyUIs `make test` finds, and that an environment for one leaves what it lies upon as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import hosts


def host(folder, version="0.33.0"):
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "samplers.py").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    (folder / "requirements.txt").touch()
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder, and a checkout that no ComfyUI is around."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setattr(hosts, "ROOT", tmp_path / "checkout")
    return tmp_path


def test_every_comfyui_of_the_home_folder_is_found(home):
    old, new = host(home / "comfy" / "ComfyUI", "0.3.64"), host(home / "comfy-0.33" / "ComfyUI")
    (home / "comfy-empty" / "ComfyUI").mkdir(parents=True)
    assert hosts.find_hosts() == [old, new] and hosts.find_host() == old


def test_the_one_around_the_checkout_comes_first_and_once(home, monkeypatch):
    around = host(home / "comfy" / "ComfyUI")
    monkeypatch.setattr(hosts, "ROOT", around / "custom_nodes" / "profusion")
    assert hosts.find_hosts() == [around]


def test_those_that_are_named_are_the_only_ones(home, monkeypatch):
    host(home / "comfy" / "ComfyUI")
    one, two = host(home / "one"), host(home / "two")
    monkeypatch.setenv("COMFYUI_PATH", os.pathsep.join(map(str, (two, home / "nowhere", one))))
    assert hosts.find_hosts() == [two, one] and hosts.find_host() == two
    assert hosts.named_hosts() == [two, home / "nowhere", one]
    monkeypatch.setenv("COMFYUI_PATH", str(home / "nowhere"))
    assert hosts.find_host() is None
    with pytest.raises(SystemExit, match="no ComfyUI at COMFYUI_PATH"):
        hosts.needed_host()


@pytest.mark.parametrize(
    ("version", "too_old"), [("0.3.63", True), ("0.3.64", False), ("0.33.0", False), ("1.0", False)]
)
def test_versions_are_compared_as_numbers(tmp_path, version, too_old):
    assert hosts.version_of(host(tmp_path / "host", version)) == version
    assert hosts.is_too_old(tmp_path / "host") == too_old


def test_hosts_of_one_version_have_environments_of_their_own(tmp_path):
    base = tmp_path / ".venv"
    (base / "bin").mkdir(parents=True)
    (base / "bin" / "python").touch()
    all_hosts = [host(tmp_path / name, version) for name, version in (("a", "0.33.0"), ("b", "0.4.0"), ("c", "0.33.0"))]
    found = hosts.environments(all_hosts, base)
    assert [one.folder.name for one in found] == [".venv-0.33.0", ".venv-0.4.0", ".venv-0.33.0-2"]
    assert {one.below for one in found} == {base / "bin" / "python"}


def test_an_environment_sees_what_it_lies_upon_and_leaves_it_alone(tmp_path):
    below = Path(sys.executable)
    environment = hosts.Environment(host(tmp_path / "host"), tmp_path / ".venv-0.33.0", below)
    before = packages(below)
    environment.make(["pip"])
    assert hosts._runs(environment.python, "import pytest")
    assert packages(below) == before
    assert environment.is_made_of(["pip"]) and not environment.is_made_of(["pip", "pytest"])
    (environment.host / "requirements.txt").write_text("# something else\n")
    assert not environment.is_made_of(["pip"])


def packages(python):
    return sorted(os.listdir(hosts._printed(python, "sysconfig.get_path('purelib')")))


def test_without_a_host_it_says_what_was_skipped(tmp_path):
    environment = {**os.environ, "COMFYUI_PATH": str(tmp_path / "nowhere")}
    command = [sys.executable, "-m", "tools.hosts", "--base", str(tmp_path / ".venv")]
    done = subprocess.run(command, cwd=hosts.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"SKIPPED {tmp_path / 'nowhere'}: no ComfyUI is there" in done.stdout
    assert "SKIPPED all host tests" in done.stdout
