"""Picture files into pixels, within bounds: a file of some kilobytes may say that it has any number of pixels.

What is too large to be decoded in MOST_BYTES is refused by its header. What is merely large is reduced: a JPEG while it
is decoded, any other one right after.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from .problems import Explained, why

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
OWN_PIXELS = 2**21  # a picture of its own size has no more: every image encoder takes far fewer
MOST_BYTES = 144 << 20

# What decoding takes for a pixel: the library keeps colours in four bytes, and some decoders have copies of their own.
_BYTES_PER_PIXEL = {"WEBP": 16}
_USUAL_BYTES = 8
_JPEG_AT_ONCE, _JPEG_IN_SCANS = 1, 6  # in several scans, as progressive ones are, the whole is kept until the last

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


def decode(path: Path, side: int | None = None) -> Image.Image:
    """A picture as RGBA, turned as its camera says: of its own size, at most OWN_PIXELS, or the centre of it as a
    square of `side` pixels. Raises PictureError, which names the file."""
    try:
        picture = _decoded(path, side)
    except PictureError as problem:
        raise PictureError(f"{path} is {problem}") from problem
    except Image.DecompressionBombError as problem:
        raise PictureError(f"{path} is too large: it has hundreds of megapixels") from problem
    except Exception as problem:  # whatever a damaged file makes of the library
        raise PictureError(f"{path} cannot be read as a picture: {why(problem)}") from problem
    if side is not None:
        return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    share = (OWN_PIXELS / (picture.width * picture.height)) ** 0.5
    if share >= 1:
        return picture
    sides = max(1, int(picture.width * share)), max(1, int(picture.height * share))
    return picture.resize(sides, Image.Resampling.LANCZOS)


def _decoded(path: Path, side: int | None) -> Image.Image:
    """All of it, but smaller by a whole number where it is much larger than it need be."""
    with Image.open(path, formats=FORMATS) as file:
        _check_size(file, path)
        factor = _factor(file.size, side)
        file.draft(None, (file.width // factor, file.height // factor))
        factor = _factor(file.size, side)
        if file.mode not in ("L", "RGB", "RGBA") or "transparency" in file.info:
            picture = file.convert("RGBA")
        else:
            file.load()
            picture = file
        small = (picture if factor == 1 else picture.reduce(factor)).convert("RGBA")
        turn = _TURNS.get(_orientation(file))
    return small if turn is None else small.transpose(turn)


def _factor(size: tuple[int, int], side: int | None) -> int:
    """How much smaller each side may be: OWN_PIXELS stay, or twice the square that is wanted."""
    most = (size[0] * size[1] / OWN_PIXELS) ** 0.5
    if side is not None:
        most = min(most, min(size) / (2 * side))
    return max(1, int(most))


def _check_size(file: Image.Image, path: Path) -> None:
    """Raise PictureError where decoding would take more than MOST_BYTES, by what the header says."""
    if file.format in ("JPEG", "MPO"):  # MPO: several JPEGs in one file, of which the first counts
        per_pixel = _JPEG_IN_SCANS if _in_scans(path) else _JPEG_AT_ONCE
    else:
        per_pixel = _BYTES_PER_PIXEL.get(file.format, _USUAL_BYTES)
    pixels, most = file.width * file.height, MOST_BYTES // per_pixel
    if pixels > most:
        raise PictureError(
            f"too large: it has {pixels / 1e6:.0f} megapixels, and a {file.format} file may have {most / 1e6:.0f}. "
            "Make it smaller, or save it as a JPEG"
        )


def _in_scans(path: Path) -> bool:
    """Whether a JPEG is progressive, or has its colours in scans of their own; True where that cannot be told."""
    with path.open("rb") as file:
        data, colours = file.read(1 << 20), 3
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
