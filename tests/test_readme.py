"""README and docs: short, in the order that a reader needs, and true where a test can say so."""

import re

import torch


def test_readme_leads_with_a_picture_and_install_and_is_short(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[0] == "Install"
    assert text.index("](docs/grid.jpg)") < text.index("## Install")


def test_readmes_python_runs(root, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "steps=100" in code
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile(code.replace("steps=100", "steps=2"), "README.md", "exec"), {})
    assert (tmp_path / "cup.png").stat().st_size > 10_000


def test_readme_names_every_template_and_the_list_every_node(root):
    readme = (root / "README.md").read_text(encoding="utf-8")
    for path in (root / "workflows").glob("*.json"):
        assert f"`{path.stem}`" in readme
    listed = (root / "docs" / "nodes.md").read_text(encoding="utf-8")
    for path in (root / "web" / "docs").glob("*.md"):
        assert f"](../web/docs/{path.name})" in listed
