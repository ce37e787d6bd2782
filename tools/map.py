"""Write the map of the code into docs/architecture.md: `python -m tools.map`.

Between `<!-- map: FOLDER -->` and `<!-- /map -->` each file of the folder has a line: the first sentence of its
docstring. A test says where the page is behind the code.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
_BLOCK = re.compile(r"(?<=<!-- map: )(?P<folder>\S+)(?P<open> -->\n).*?(?=<!-- /map -->)", re.DOTALL)


def first_sentence(path: Path) -> str:
    """What a file says of itself, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]


def lines(folder: str) -> str:
    """A line for each Python file of a folder, those of its folders apart; `__init__.py` speaks for the folder."""
    files = sorted((ROOT / folder).glob("*.py"), key=lambda path: (path.name != "__init__.py", path.name))
    return "".join(f"- `{path.name}`: {first_sentence(path)}\n" for path in files)


def included(text: str) -> str:
    """The page with what the files say now."""
    return _BLOCK.sub(lambda found: f"{found['folder']}{found['open']}{lines(found['folder'])}", text)


if __name__ == "__main__":
    PAGE.write_text(included(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
