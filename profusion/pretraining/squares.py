"""A picture file's bytes as a square of 8 bits, as training takes it, within the bounds of `profusion.decoding`.

What is transparent turns grey, as in `profusion.pictures`. The largest square is cropped and resized by Lanczos
(antialiased), which is what PromptNet's authors do. What is more than GAP times too large is first reduced by a whole
number, a JPEG while it is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..decoding import PictureError, decode_bytes
from ..problems import Explained
from ..references import SMALLEST

CROPS = ("center", "random")
GAP = 2.0  # times the size, to which a picture may be reduced before it is resampled: no difference is seen
MOST_BYTES = 1 << 28  # of a picture's file
_GREY = 128  # as `references.over_grey` has it


class StreamError(Explained, ValueError):
    """Pictures cannot be streamed as asked. The message says what to change."""


@dataclass(frozen=True)
class Framing:
    """How a picture becomes a square of `size` pixels: its centre, or a part drawn anew each time."""

    size: int
    crop: str = "center"

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise StreamError(f"crop={self.crop!r} is none of {', '.join(CROPS)}")
        if self.size < SMALLEST:
            raise StreamError(f"size={self.size} must be at least {SMALLEST} pixels")


def square(data: bytes, name: str, framing: Framing, generator: torch.Generator | None = None) -> Tensor:
    """(size, size, 3) uint8 of a file's bytes. generator: draws where a random crop lies.

    Raises PictureError, which begins with the name, for what is damaged, no picture, too large, too small or wholly
    transparent.
    """
    size = framing.size
    picture = decode_bytes(data, name, lambda sides: max(1, int(min(sides) / (GAP * size))))
    if min(picture.size) < SMALLEST:
        raise PictureError(f"{name} is too small: it has {picture.width}x{picture.height} pixels")
    if picture.mode == "RGBA":
        if picture.getchannel("A").getextrema()[1] == 0:
            raise PictureError(f"{name} is wholly transparent")
        below = Image.new("RGBA", picture.size, (_GREY, _GREY, _GREY, 255))
        picture = Image.alpha_composite(below, picture)
    picture = picture.convert("RGB")
    side = min(picture.size)
    room = picture.width - side, picture.height - side
    if framing.crop == "center" or generator is None:
        left, top = room[0] // 2, room[1] // 2
    else:
        share = torch.rand(2, generator=generator).tolist()
        left, top = (min(int(part * (free + 1)), free) for part, free in zip(share, room, strict=True))
    picture = picture.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(picture.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=GAP)))
