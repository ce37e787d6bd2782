"""Picture files into pixels, within bounds: a file of some kilobytes may say that it has any number of pixels.

What is too large to be decoded in MOST_BYTES is refused by its header. What is merely large is reduced: a JPEG while it
is decoded, any other one right after.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
from PIL import Image

from .problems import Explained, why

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
"""Of the files that are read, as far as the library can."""
OTHER_SUFFIXES = (
    ".psd",
    ".xcf",
    ".kra",
    ".svg",
    ".jxl",
    ".jp2",
    ".jpx",
    ".exr",
    ".hdr",
    ".tga",
    ".ppm",
    ".pgm",
    ".pdf",
)
RAW_SUFFIXES = (".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf")
"""Of pictures that are not read; those of cameras' raw files seem to be TIFF, with a small picture in them."""
OWN_PIXELS = 2**21  # a picture of its own size has no more: every image encoder takes far fewer
MOST_BYTES = 144 << 20

# What decoding takes for a pixel: the library keeps colours in four bytes, and some decoders have copies of their own.
_BYTES_PER_PIXEL = {"WEBP": 16, "TIFF": 16, "AVIF": 16, "HEIF": 16}
_USUAL_BYTES = 8
_DEEP_BYTES = 16  # more than eight bits of a colour, which are scaled
_JPEG_AT_ONCE, _JPEG_IN_SCANS = 1, 6  # in several scans, as progressive ones are, the whole is kept until the last

_DEEP = ("I", "F")  # modes of the library: I, I;16, I;16B, F
BEYOND = 2.0  # times a range: floats that reach no further are of that range, which sharp resampling overshoots
_HEIF = (".heic", ".heif")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(Explained, ValueError):
    """Pictures that cannot be used. The message says which, why and what to do."""


def decode(path: Path) -> Image.Image:
    """A picture as RGBA, turned as its camera says: of its own size, at most OWN_PIXELS. Raises PictureError, which
    names the file."""
    with _explained(str(path)), path.open("rb") as file:
        picture = _decoded(file, path.suffix, _factor).convert("RGBA")
    share = (OWN_PIXELS / (picture.width * picture.height)) ** 0.5
    if share >= 1:
        return picture
    sides = max(1, int(picture.width * share)), max(1, int(picture.height * share))
    return picture.resize(sides, Image.Resampling.LANCZOS)


def decode_bytes(data: bytes, name: str, factor: Callable[[tuple[int, int]], int]) -> Image.Image:
    """The picture in a file's bytes as L, RGB or RGBA, turned as its camera says.

    factor: of a size (width, height), the number by which each side may be smaller. A JPEG is where that saves time,
    and others are not. Raises PictureError, which begins with the name.
    """
    with _explained(name):
        return _decoded(io.BytesIO(data), PurePath(name).suffix, factor, reduced=False)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Whatever goes wrong inside as PictureError."""
    try:
        yield
    except PictureError as problem:
        raise PictureError(f"{name} is {problem}") from problem
    except Image.DecompressionBombError as problem:
        raise PictureError(f"{name} is too large: it has hundreds of megapixels") from problem
    except Exception as problem:  # whatever a damaged file makes of the library
        raise PictureError(f"{name} cannot be read as a picture: {why(problem)}") from problem


def _decoded(
    data: BinaryIO, suffix: str, factor_of: Callable[[tuple[int, int]], int], reduced: bool = True
) -> Image.Image:
    """All of it as L, RGB or RGBA, but smaller by a whole number where it is much larger than it need be; if not
    `reduced`, only where its decoder can do that."""
    if suffix.lower() in _HEIF:
        _learn_heif()
    with Image.open(data, formats=[name for name in FORMATS if name in _known_formats()]) as file:
        _check_size(file, data)
        factor = factor_of(file.size)
        file.draft(None, (file.width // factor, file.height // factor))
        factor = factor_of(file.size) if reduced else 1
        if file.mode.startswith(_DEEP):
            picture = _eight_bits(file)
        elif file.mode not in ("L", "RGB", "RGBA") or "transparency" in file.info:
            picture = file.convert("RGBA")
        else:
            file.load()
            picture = file
        small = picture.copy() if factor == 1 else picture.reduce(factor)
        turn = _TURNS.get(_orientation(file))
    return small if turn is None else small.transpose(turn)


def _eight_bits(file: Image.Image) -> Image.Image:
    """Grey of more than eight bits, by its range: that of 16 bits, or, where the type says nothing (32 bits, floats),
    the least of 1 (floats), 255, 65535 and its own largest that holds all of it. Floats may go beyond a range, as
    resampling makes them, and are clipped to it."""
    values = np.asarray(file)
    if not np.isfinite(values).all():
        raise PictureError("no picture: it has values that are not numbers")
    most = float(values.max())
    if file.mode.startswith("I;16") or file.format == "PNG":
        top = 65535.0
    else:
        floats = file.mode == "F"
        ranges = (1.0, 255.0, 65535.0) if floats else (255.0, 65535.0)
        top = next((one for one in ranges if most <= one * (BEYOND if floats else 1)), most)
    scaled = np.clip(values, 0, top).astype(np.float32)
    scaled *= 255 / top
    return Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))


def _known_formats() -> set[str]:
    """Those that the library reads here."""
    Image.init()
    return set(Image.OPEN)


def _learn_heif() -> None:
    """Have the library read what iPhones write, where that is installed."""
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def is_picture(path: Path) -> bool:
    """Whether a file, whatever its name, is of a format that is read, by its first bytes."""
    _learn_heif()
    try:
        Image.open(path, formats=[name for name in FORMATS if name in _known_formats()]).close()
    except Image.DecompressionBombError:
        return True  # which decoding it will say
    except Exception:  # whatever another kind of file makes of the library
        return False
    return True


def unreadable(paths: Iterable[Path]) -> list[Path]:
    """Those of these pictures, by their names, whose formats nothing here reads."""
    paths = list(paths)
    if any(path.suffix.lower() in _HEIF for path in paths):
        _learn_heif()
    Image.init()
    kinds = {path: Image.EXTENSION.get(path.suffix.lower()) for path in paths}
    return [path for path, kind in kinds.items() if kind not in FORMATS or kind not in Image.OPEN]


def _factor(size: tuple[int, int]) -> int:
    """How much smaller each side may be, so that OWN_PIXELS stay."""
    return max(1, int((size[0] * size[1] / OWN_PIXELS) ** 0.5))


def _check_size(file: Image.Image, data: BinaryIO) -> None:
    """Raise PictureError where decoding would take more than MOST_BYTES, by what the header says."""
    if file.format in ("JPEG", "MPO"):  # MPO: several JPEGs in one file, of which the first counts
        per_pixel = _JPEG_IN_SCANS if _in_scans(data) else _JPEG_AT_ONCE
    else:
        per_pixel = _BYTES_PER_PIXEL.get(file.format, _USUAL_BYTES)
        per_pixel = max(per_pixel, _DEEP_BYTES) if file.mode.startswith(_DEEP) else per_pixel
    pixels, most = file.width * file.height, MOST_BYTES // per_pixel
    if pixels > most:
        raise PictureError(
            f"too large: it has {pixels / 1e6:.0f} megapixels, and a {file.format} file may have {most / 1e6:.0f}. "
            "Make it smaller, or save it as a JPEG"
        )


def _in_scans(file: BinaryIO) -> bool:
    """Whether a JPEG is progressive, or has its colours in scans of their own; True where that cannot be told."""
    place, colours = file.tell(), 3
    file.seek(0)
    data = file.read(1 << 20)
    file.seek(place)
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0xC2, 0xC6, 0xCA, 0xCE):
            return True
        if marker in (0xC0, 0xC1):
            colours = data[at + 9] if at + 9 < len(data) else 0
        if marker == 0xDA:
            return at + 4 >= len(data) or data[at + 4] != colours
        at += 2 + length
    return True


def _orientation(file: Image.Image) -> int | None:
    """How a camera held it. A header that is damaged says nothing: the picture itself is whole."""
    try:
        return file.getexif().get(_ORIENTATION)
    except Exception:  # whatever a damaged header makes of the library
        return None
