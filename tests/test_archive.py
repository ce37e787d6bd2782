"""The archive that the Registry would hand out: packed by git's own reading of .comfyignore,
unpacked, and looked into."""

import re
import shutil
import subprocess
import sys

import pytest

LINK = re.compile(r"\]\(([^)#\s]+)")  # a link's or a picture's target, without the place within it


@pytest.fixture(scope="module")
def unpacked(root, packed, tmp_path_factory):
    """The files of the archive in a folder named as the pack is."""
    folder = tmp_path_factory.mktemp("custom_nodes") / "profusion"
    for name in packed:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, folder / name)
    return folder


def test_it_holds_the_pack_and_nothing_else(packed):
    top = {name.split("/")[0] for name in packed}
    files = {"__init__.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "NOTICE", "SECURITY.md"}
    assert top == files | {"nodes", "profusion", "web", "workflows", "docs", "benchmarks"}
    assert all(name.startswith("benchmarks/results/") for name in packed if name.startswith("benchmarks/"))
    assert not [
        name for name in packed if name.endswith((".pyc", ".json")) and name.startswith(("benchmarks/", "docs/"))
    ]
    assert "profusion/toybox/weights/toybox_judge.safetensors" not in packed


def test_it_holds_every_help_page_workflow_and_thumbnail(root, packed):
    nodes = {
        name
        for path in (root / "nodes").rglob("*.py")
        for name in re.findall(r'node_id="(\w+)"', path.read_text(encoding="utf-8"))
    }
    assert len(nodes) >= 15
    assert {f"web/docs/{name}.md" for name in nodes} <= set(packed)
    workflows = {path.stem for path in (root / "workflows").glob("*.json")}
    assert workflows and {f"workflows/{name}.{kind}" for name in workflows for kind in ("json", "jpg")} <= set(packed)


def test_its_pages_link_to_what_it_holds(unpacked):
    pages = sorted(unpacked.rglob("*.md"))
    assert unpacked / "README.md" in pages
    for page in pages:
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).is_file(), f"{page.relative_to(unpacked)} links to {target}"


@pytest.mark.slow
def test_its_demo_says_what_it_lacks(unpacked):
    command = [sys.executable, "-m", "profusion", "demo", "--out", "out"]
    ended = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.startswith("profusion: ") and "toybox_judge.safetensors" in ended.stderr
    assert "git clone" in ended.stderr and "Traceback" not in ended.stderr
