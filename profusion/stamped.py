"""A picture's file that says how it was made: a PNG with a text in it."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .files import write_atomically, write_numbered
from .pictures import to_image

SUFFIX = ".png"
TEXT = "profusion"
"""The name of the text in the file. It is JSON."""

How = dict[str, object]
"""How a picture was made, as JSON has it."""


def save_stamped(paths: Iterable[Path], picture: Tensor, how: How) -> Path:
    """Write a picture (H, W, 3) in [0, 1] under the first of these paths that is free; missing folders are made.

    Raises OSError as the system words it, ValueError where none is free.
    """
    info, png = PngInfo(), io.BytesIO()
    info.add_text(TEXT, json.dumps(how))
    to_image(picture).save(png, "PNG", pnginfo=info)

    def write(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, png.getvalue(), overwrite=False)
        return path

    return write_numbered(paths, write)


def how_made(path: Path) -> How | None:
    """What a picture's file says of how it was made; None where it says nothing of it."""
    try:
        with Image.open(path) as image:
            found = json.loads(image.text[TEXT])
    except (OSError, AttributeError, KeyError, ValueError, SyntaxError):  # whatever a strange file makes of a library
        return None
    return found if isinstance(found, dict) else None


def made_before(paths: Iterable[Path], how: How) -> Path | None:
    """The first of those paths that are taken whose picture was made in this way."""
    taken = itertools.takewhile(Path.exists, paths)
    return next((path for path in taken if how_made(path) == how), None)
