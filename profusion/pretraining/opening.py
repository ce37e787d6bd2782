"""What a text says about where the pictures are: a folder, tar shards, or commands that write such shards out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..decoding import PictureError
from .lanes import Streamed, is_compressed
from .patterns import PIPE, shards
from .shards import Shards
from .sources import Folder, Source


def open_source(
    where: str,
    index: Path | None = None,
    retries: int = 2,
    lanes: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Source | Streamed:
    """The pictures of a folder and of the folders in it, or in tar shards; see `patterns.shards`.

    Shards of commands and compressed ones are only read on: if there is any, all are, see `lanes`. index: a folder for
    what is known of other shards; default: beside each. retries, lanes: see `Streamed`. say: told how far it is. Raises
    PictureError, which says what is missing, where there are none.
    """
    if not where.strip():
        raise PictureError("no pictures are given: name a folder, or tar shards")
    path = Path(where).expanduser()
    if path.is_dir():
        return Folder(path)
    found = shards(where)
    folders = [one for one in found if Path(one).is_dir()]
    if folders:
        raise PictureError(f"{folders[0]} is a folder: give one folder alone, or the shards in it")
    if any(one.startswith(PIPE) or is_compressed(Path(one)) for one in found):
        return Streamed(found, where, retries, lanes)
    return Shards([Path(one) for one in found], where, index, say)
