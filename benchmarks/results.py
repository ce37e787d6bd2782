"""Where a benchmark's results go: figures as JSON, a Markdown table, a picture; and from there into the documents.

In README.md and docs/evidence.md a line `<!-- bench: NAME -->` begins what NAME.md of the results says, and `<!--
/bench -->` ends it. `python -m benchmarks.results` puts it there anew; a test says where a document differs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "evidence.md")
_BLOCK = re.compile(r"(?<=<!-- bench: )(?P<name>\S+)(?P<open> -->\n).*?(?=<!-- /bench -->)", re.DOTALL)


def write(
    path: Path | None,
    recipe: Mapping,
    figures: object,
    markdown: str,
    picture: Image.Image | None = None,
    short: str = "",
) -> None:
    """Print the table; where there is a path, write `path` (.json), and the table and the picture beside it.

    short: what README says of it, in a sentence or a smaller table; written as NAME.short.md.
    """
    print(markdown, flush=True)
    if path is None:
        return
    said = {name: value.name if isinstance(value, Path) else value for name, value in recipe.items() if name != "json"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"recipe": said, "figures": figures}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown.rstrip("\n") + "\n")
    if short:
        path.with_suffix(".short.md").write_text(short.rstrip("\n") + "\n")
    if picture is not None:
        picture.save(path.with_suffix(".png"))


def table(heads: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """In Markdown."""
    lines = [heads := list(heads), ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def percent(rate: Mapping) -> str:
    """A rate of `Rate.as_json` with its interval."""
    low, high = rate["interval_95"]
    return f"{rate['share']:.1%} ({low:.0%} to {high:.0%})"


def plus_minus(mean: Iterable[float], digits: int = 3) -> str:
    """A mean and half its interval."""
    value, half = mean
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def included(text: str, folder: Path = RESULTS) -> str:
    """A document with what the results say now. Raises FileNotFoundError for a result that is not there."""
    return _BLOCK.sub(
        lambda found: f"{found['name']}{found['open']}{(folder / (found['name'] + '.md')).read_text()}", text
    )


def include(folder: Path = RESULTS) -> None:
    """Bring the documents up to date."""
    for document in DOCUMENTS:
        document.write_text(included(document.read_text(), folder))


if __name__ == "__main__":
    include()
