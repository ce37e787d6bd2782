"""Picture files as people's sets have them: good ones, and all kinds of bad ones."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """One that is told from the others by its colours."""
    values = np.random.default_rng(number).integers(0, 40, (size[1], size[0], 3)) + 5 * (number % 40)
    return Image.fromarray(values.astype(np.uint8))


def coded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of some bytes whose header promises billions of pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(bytes(4096))) + part(b"IEND", b"")


def broken() -> dict[str, bytes]:
    """Bytes of no use by what a picture of them would be left out for."""
    good = coded(picture(1, (64, 64)), "JPEG")
    return {
        "cut": good[: len(good) // 2],
        "text": b"an error message of a server",
        "empty": b"",
        "bomb": bomb(),
        "large": bomb(9_000, 9_000),
        "tiny": coded(picture(2, (3, 3))),
        "clear": coded(Image.new("RGBA", (20, 20), (9, 9, 9, 0))),
    }


def packed(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    """A tar of these files."""
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
