"""The structure that everything else leans on: one direction of imports, and nothing in the archive that a scan flags."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOST = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
    "execution",
    "server",
    "node_helpers",
    "latent_preview",
}
OPTIONAL = {"open_clip", "timm"}  # of one module, which imports them once they are asked for
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
        assert all(other.startswith("host/") for other in others), f"nodes/{name}.py imports {sorted(others)}"
    found = floors(imported)
    assert max(found.values()) <= 3, found
    assert max(floor for name, floor in found.items() if name.startswith("host/")) <= 2, found


def test_schemas_know_of_the_host_only_its_public_api():
    for path in (ROOT / "nodes").glob("*.py"):
        for level, module in imports(path):
            top = module.split(".")[0]
            assert level or top == "comfy_api" or top not in HOST, f"{path} imports {module}"


def test_nothing_is_required_that_the_host_does_not_ship(shipped):
    for path in shipped:
        optional = OPTIONAL if path.name == "libraries.py" else set()
        assert not optional & {module for _, module in imports(path, at_once=True)}
        for level, module in imports(path):
            top = module.split(".")[0]
            known = (
                top in optional
                or level
                or top in SHIPPED_WITH_THE_HOST | HOST
                or top in __import__("sys").stdlib_module_names
            )
            assert known, f"{path} imports {module}"


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
