"""The structure that everything else leans on: one direction of imports, and nothing in the
archive that a scan flags."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.map import included

ROOT = Path(__file__).parents[1]
HOST = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "comfyui_version",
    "folder_paths",
    "execution",
    "server",
    "node_helpers",
    "latent_preview",
}
# By the modules that import them once they are asked for, and the extra of pyproject.toml that brings them.
OPTIONAL = {"libraries.py": {"open_clip", "timm"}, "decoding.py": {"pillow_heif"}}
EXTRAS = {"metrics": OPTIONAL["libraries.py"], "pictures": OPTIONAL["decoding.py"]}
DISTRIBUTIONS = {"PIL": "Pillow", "open_clip": "open_clip_torch", "pillow_heif": "pillow-heif"}
SHIPPED_WITH_THE_HOST = {
    "torch",
    "torchvision",
    "numpy",
    "PIL",
    "safetensors",
    "tokenizers",
    "transformers",
    "einops",
    "scipy",
}


@pytest.fixture(scope="module")
def shipped(packed) -> list[Path]:
    """The Python files of the Registry's archive."""
    return [ROOT / name for name in packed if name.endswith(".py")]


def imports(path: Path, at_once: bool = False) -> set[tuple[int, str]]:
    """(level, module) of each import of a file; at_once: only of those that are done when it is imported itself."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.level, node.module or ""))
    return found


def test_the_kernel_never_imports_the_host_or_the_nodes():
    for path in (ROOT / "profusion").rglob("*.py"):
        depth = len(path.relative_to(ROOT / "profusion").parts)
        for level, module in imports(path):
            top = module.split(".")[0]
            assert level or top not in HOST | {"nodes"}, f"{path} imports {module}"
            assert level or top != "profusion", f"{path} imports {module} absolutely: in a host it has another name"
            assert level <= depth, f"{path} reaches out of the kernel"


def node_imports() -> dict[str, set[str]]:
    """The files of nodes/ that each file of it imports, packages' own files apart: they only list the others."""
    folder, found = ROOT / "nodes", {}
    for path in folder.rglob("*.py"):
        if path.name == "__init__.py":
            continue
        parent = path.relative_to(folder).parent.parts
        reached = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(parent) + 1:
                base = "/".join([*parent[: len(parent) + 1 - node.level], *(node.module or "").split(".")]).strip("/")
                names = [f"{base}/{alias.name}".strip("/") for alias in node.names]
                reached |= {name for name in (base, *names) if (folder / f"{name}.py").is_file()}
        found[path.relative_to(folder).with_suffix("").as_posix()] = reached
    return found


def floors(imported: dict[str, set[str]]) -> dict[str, int]:
    """How many files stand under each file, in a row and with it."""

    def floor(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, f"a circle of imports: {' -> '.join([*above, name])}"
        return 1 + max((floor(other, (*above, name)) for other in imported[name]), default=0)

    return {name: floor(name) for name in imported}


def test_the_nodes_stand_on_the_host_ring_and_that_on_two_floors():
    imported = node_imports()
    for name, others in imported.items():
        known = all(other.startswith("host/") or other == "inputs" for other in others)
        assert known, f"nodes/{name}.py imports {sorted(others)}"
        assert not (name.startswith("host/") and "inputs" in others), name
    found = floors(imported)
    assert max(found.values()) <= 3, found
    assert max(floor for name, floor in found.items() if name.startswith("host/")) <= 2, found


def test_schemas_know_of_the_host_only_its_public_api():
    for path in (ROOT / "nodes").glob("*.py"):
        for level, module in imports(path):
            top = module.split(".")[0]
            assert level or top == "comfy_api" or top not in HOST, f"{path} imports {module}"


def kernel_imports(path: Path) -> set[str]:
    """What a file of the kernel imports from the kernel, such as "toybox.pipeline" or "files"."""
    kernel = ROOT / "profusion"
    package = path.relative_to(kernel).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
            base = [part for part in base if part]
            names = (alias.name for alias in node.names if alias.name != "__version__")
            found |= {".".join([*base, name]) for name in names} if not node.module else {".".join(base)}
    return found


def kernel_part(path: Path) -> str:
    """The package or the single module of the kernel to which a file belongs."""
    return path.relative_to(ROOT / "profusion").parts[0].removesuffix(".py")


def test_the_methods_know_no_toy_and_only_the_command_line_knows_the_demo():
    seen = set()
    for path in (ROOT / "profusion").rglob("*.py"):
        part, imported = kernel_part(path), {name.split(".")[0] for name in kernel_imports(path)}
        seen |= imported
        assert "toybox" not in imported or part in {"toybox", "demo", "__main__"}, f"{path} imports Toybox"
        assert not {"demo", "checkpoint_demo"} & imported or part == "__main__", f"{path} imports a demo"
    assert {"toybox", "demo"} <= seen  # else this looked at nothing
    for top in ("nodes", "benchmarks", "tools", "training"):
        for path in (ROOT / top).rglob("*.py"):
            names = {module for _, module in imports(path)}
            assert not any(name.endswith("profusion.demo") for name in names), f"{path} imports the demo"


def test_no_parts_of_the_kernel_import_each_other():
    needs: dict[str, set[str]] = {}
    for path in (ROOT / "profusion").rglob("*.py"):
        part = kernel_part(path)
        if part != "__init__":
            needs.setdefault(part, set()).update({name.split(".")[0] for name in kernel_imports(path)} - {part})
    done: list[str] = []
    while len(done) < len(needs):
        ready = [part for part in needs if part not in done and needs[part] <= set(done)]
        assert ready, f"these import each other: {sorted(set(needs) - set(done))}"
        done += ready
    assert done.index("residual") < done.index("promptnet") < done.index("toybox")


def scalings(path: Path) -> list[str]:
    """Every sqrt(... ** 2 + 1) and sqrt(1 - alpha_bar) in a file's code, however it is written."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and ast.unparse(node.right) in ("0.5", "-0.5"):
            inner = node.left
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("sqrt", "rsqrt"):
            inner = node.args[0] if node.args else node.func.value
        else:
            continue
        text = ast.unparse(inner)
        if re.search(r"\*\* 2 \+ 1$|^1 \+ .*\*\* 2$|^1 - \w+(\[.*\])?$", text):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text}")
    return found


def test_the_scalings_of_noise_stand_in_one_file():
    paths = [path for top in ("profusion", "nodes", "benchmarks", "training") for path in (ROOT / top).rglob("*.py")]
    own = ROOT / "profusion" / "diffusion.py"
    assert len(scalings(own)) == 3
    assert not [found for path in paths if path != own for found in scalings(path)]


def test_nothing_is_required_that_the_host_does_not_ship(shipped):
    for path in shipped:
        optional = OPTIONAL.get(path.name, set())
        assert not optional & {module for _, module in imports(path, at_once=True)}
        for level, module in imports(path):
            top = module.split(".")[0]
            known = top in optional or level or top in SHIPPED_WITH_THE_HOST | HOST or top in sys.stdlib_module_names
            assert known, f"{path} imports {module}"


def test_importing_the_pack_does_not_wait_for_transformers():
    """It takes a second or more, and only texts and towers need it."""
    kernel = ROOT / "profusion"
    parts = (path.relative_to(ROOT).with_suffix("").parts for path in kernel.rglob("*.py"))
    modules = {".".join(part) for part in parts if part[-1] != "__init__"} - {"profusion.models.clip"}
    code = f"import sys, {', '.join(sorted(modules))}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "torch" in loaded.split() and not {"transformers", "open_clip", "timm", "pillow_heif"} & set(loaded.split())


def test_pyproject_names_what_is_imported(shipped):
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11: pyproject.toml is not read")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tops = {module.split(".")[0] for path in shipped for level, module in imports(path) if not level}
    needed = {DISTRIBUTIONS.get(top, top) for top in tops - HOST - set(sys.stdlib_module_names)}
    optional = {DISTRIBUTIONS.get(top, top) for names in OPTIONAL.values() for top in names}
    assert needed - optional <= set(project["dependencies"])
    for extra, names in EXTRAS.items():
        assert set(project["optional-dependencies"][extra]) == {DISTRIBUTIONS.get(top, top) for top in names}


FLAGGED = (
    r"\bos\.environ\b|\bgetenv\b",
    r"\bsubprocess\b|\bos\.system\b|\bpopen\b",
    r"\bimportlib\b|\b__import__\b",
    r"(?<![\w.])(eval|exec)\(",
    r"(?<![\w.])compile\(",
    r"\bpickle\b|\btorch\.load\b|\bmarshal\b",
    r"\bctypes\b",
    r"\b(requests|urllib|http\.client|socket|aiohttp)\b\.",
)


@pytest.mark.parametrize("pattern", FLAGGED)
def test_nothing_that_the_registrys_scan_flags(pattern, shipped):
    assert shipped
    for path in shipped:
        code = ast.unparse(_without_docstrings(ast.parse(path.read_text())))
        match = re.search(pattern, code)
        assert match is None, f"{path}: {match and match.group()}"


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            node.body = body[1:] or [ast.Pass()]
    return tree


def test_the_version_has_one_value():
    project = (ROOT / "pyproject.toml").read_text()
    kernel = (ROOT / "profusion" / "__init__.py").read_text()
    assert re.search(r'^version = "(.+)"', project, re.M)[1] == re.search(r'__version__ = "(.+)"', kernel)[1]


def test_the_page_of_the_architecture_lists_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert included(page) == page, "run `python -m tools.map`"
    folders = {path.parent for ring in ("nodes", "profusion") for path in (ROOT / ring).rglob("*.py")}
    for folder in folders:
        assert f"<!-- map: {folder.relative_to(ROOT).as_posix()} -->" in page


def test_what_the_page_of_the_architecture_names_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py):([\w.]+)`", page))
    assert len(named) > 40
    for file, name in named:
        scope = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for part in name.split("."):
            found = [node for node in scope if getattr(node, "name", None) == part]
            assert found, f"docs/architecture.md names {name}, which is not in {file}"
            scope = found[0].body


def dropped_causes(path: Path) -> list[int]:
    """The lines of a file that raise something `from None`, by which the log loses what caused it."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.cause, ast.Constant) and "NameTaken" not in ast.dump(node)
    ]


def test_no_error_hides_its_cause_from_the_log():
    found = {path: dropped_causes(path) for folder in ("nodes", "profusion") for path in (ROOT / folder).rglob("*.py")}
    assert len(found) > 50 and not {path: lines for path, lines in found.items() if lines}
