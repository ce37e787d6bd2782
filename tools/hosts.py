"""Run tests/host against every ComfyUI there is: `python -m tools.hosts --base .venv --packages pytest ... -- -n 2`.

A host is tested in an environment of its own, `.venv-VERSION`, that lies on top of another: on the host's own venv
where that has torch, else on ours. It sees what is below and installs the rest into itself, so nobody's ComfyUI is
changed. What follows `--` goes to pytest. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (0, 3, 64)  # what pyproject.toml asks of a host
SOUGHT = "at COMFYUI_PATH, around this checkout or at ~/comfy*/ComfyUI"


def is_host(folder: Path) -> bool:
    return (folder / "comfy" / "samplers.py").is_file()


def named_hosts() -> list[Path]:
    """What COMFYUI_PATH lists, separated as PATH is, whether there is a ComfyUI or not."""
    return [Path(name).expanduser() for name in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if name]


def find_hosts() -> list[Path]:
    """The ComfyUIs that COMFYUI_PATH lists; without it, those around this checkout and in the home folder."""
    around = [*ROOT.parents, *sorted(Path.home().glob("comfy*/ComfyUI"))]
    found = [folder.resolve() for folder in named_hosts() or around if is_host(folder)]
    return list(dict.fromkeys(found))


def find_host() -> Path | None:
    """The first of them."""
    return next(iter(find_hosts()), None)


def needed_host() -> Path:
    """The first of them, for a command that is of no use without."""
    host = find_host()
    if host is None:
        raise SystemExit(f"no ComfyUI {SOUGHT}")
    return host


def version_of(host: Path) -> str:
    text = (host / "comfyui_version.py").read_text() if (host / "comfyui_version.py").is_file() else ""
    found = re.search(r'__version__ = "(.+)"', text)
    return found[1] if found else "0"


def is_too_old(host: Path) -> bool:
    return tuple(int(number) for number in re.findall(r"\d+", version_of(host))[:3]) < OLDEST


def python_of(venv: Path) -> Path | None:
    """The interpreter of a virtual environment, if there is one."""
    candidates = (venv / "bin" / "python", venv / "Scripts" / "python.exe")
    return next((path for path in candidates if path.is_file()), None)


def own_python(host: Path) -> Path | None:
    """The interpreter of the host's own venv, if that can run it."""
    pythons = filter(None, (python_of(host / name) for name in ("venv", ".venv")))
    return next((python for python in pythons if _runs(python, "import torch, torchvision, venv")), None)


def _runs(python: Path, code: str) -> bool:
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


@dataclass(frozen=True)
class Environment:
    """Where a host's tests run: `folder`, a virtual environment on top of the one of `below`."""

    host: Path
    folder: Path
    below: Path

    @property
    def python(self) -> Path:
        python = python_of(self.folder)
        assert python is not None
        return python

    def _recipe(self, packages: Sequence[str]) -> str:
        return f"{self.below}\n{' '.join(packages)}\n{(self.host / 'requirements.txt').read_text()}"

    def is_made_of(self, packages: Sequence[str]) -> bool:
        """Whether it is there, with these packages and what the host requires."""
        made = self.folder / "made-of.txt"
        return made.is_file() and made.read_text() == self._recipe(packages)

    def make(self, packages: Sequence[str]) -> None:
        """Make it anew. Raises CalledProcessError."""
        subprocess.run([self.below, "-m", "venv", "--without-pip", "--clear", self.folder], check=True)
        self._see_below()
        if not _runs(self.python, "import pip"):
            subprocess.run([self.python, "-m", "ensurepip"], check=True)
        install = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-r", self.host / "requirements.txt", *packages], check=True)
        (self.folder / "made-of.txt").write_text(self._recipe(packages))

    def _see_below(self) -> None:
        """`--system-site-packages` would show the packages of the Python that `below` itself was made of."""
        places = {_printed(self.below, f"sysconfig.get_path({kind!r})") for kind in ("purelib", "platlib")}
        lines = [f"import site; site.addsitedir({place!r})\n" for place in sorted(places)]
        (Path(_printed(self.python, "sysconfig.get_path('purelib')")) / "below.pth").write_text("".join(lines))


def _printed(python: Path, expression: str) -> str:
    command = [python, "-c", f"import sysconfig; print({expression})"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def environments(hosts: Iterable[Path], base: Path) -> list[Environment]:
    """One for each host; two of the same version get two."""
    made: list[Environment] = []
    for host in hosts:
        name = f"{base.name}-{version_of(host)}"
        same = sum(one.host != host and version_of(one.host) == version_of(host) for one in made)
        below = own_python(host) or python_of(base)
        if below is None:
            raise SystemExit(f"{host} has no venv with torch, and neither is there one at {base}")
        made.append(Environment(host, base.parent / (f"{name}-{same + 1}" if same else name), below))
    return made


def run(environment: Environment, packages: Sequence[str], options: Sequence[str]) -> bool:
    """Whether the host's tests pass."""
    try:
        if not environment.is_made_of(packages):
            environment.make(packages)
    except subprocess.CalledProcessError as error:
        print(f"{environment.folder} could not be made for {environment.host}: {error}", flush=True)
        return False
    variables = {**os.environ, "COMFYUI_PATH": str(environment.host)}
    command = [environment.python, "-m", "pytest", "tests/host", *options]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ROOT / ".venv", help="our own environment, with torch")
    parser.add_argument("--packages", nargs="*", default=["pytest"], help="what the tests need beside the host")
    parser.add_argument("pytest", nargs="*", help="after --: options of pytest")
    given = parser.parse_args()
    said, passed = [], True
    hosts = find_hosts()
    for missing in (folder for folder in named_hosts() if not is_host(folder)):
        said.append(f"SKIPPED {missing}: no ComfyUI is there")
    for old in filter(is_too_old, hosts):
        said.append(f"SKIPPED {old}: ComfyUI {version_of(old)} is older than {'.'.join(map(str, OLDEST))}")
    if not hosts:
        said.append(f"SKIPPED all host tests: no ComfyUI {SOUGHT}")
    for environment in environments([host for host in hosts if not is_too_old(host)], given.base.absolute()):
        name = f"ComfyUI {version_of(environment.host)} at {environment.host}"
        print(f"\n{name}, in {environment.folder.name} on top of {environment.below}", flush=True)
        begun = time.monotonic()
        good = run(environment, given.packages, given.pytest)
        said.append(f"{'passed' if good else 'FAILED'} {name}: {(time.monotonic() - begun) / 60:.1f} minutes")
        passed &= good
    print("", *said, sep="\n")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
