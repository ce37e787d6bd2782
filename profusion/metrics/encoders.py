"""Backbones that turn pictures and prompts into features, under one contract.

Pictures are the host's IMAGE, (B, H, W, 3) in [0, 1]; an encoder crops and scales them as it was trained to. Every
result names its backbone, because numbers of different ones do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..references import NATIVE
from .checks import MetricError
from .similarity import cosine

DISCS: dict[str, tuple[int, int, int]] = {
    "red": (216, 32, 36),
    "orange": (250, 134, 10),
    "yellow": (252, 222, 40),
    "green": (40, 160, 62),
    "blue": (36, 92, 224),
    "purple": (126, 44, 172),
    "pink": (252, 146, 196),
    "white": (250, 250, 250),
}  # colours that any pair can tell, Toybox's too, which knows no others
_SIDE = NATIVE["Toybox"]  # pixels of a disc's picture: Toybox's pair takes no others, and others scale it


class ImageEncoder(Protocol):
    """Any network that makes features of pictures. measure: what similarity under it is called, such as "DINO"."""

    name: str
    measure: str

    def images(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> features (B, D), of any length."""


@runtime_checkable
class PairedEncoder(ImageEncoder, Protocol):
    """One that was trained with a text encoder into the same space, such as CLIP."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Prompts -> features (B, D)."""


def color_check(pair: PairedEncoder) -> int:
    """How many of eight coloured discs a pair finds for "a red ball", "a blue ball" and so on: 0 to 8, by chance 1.

    Whether a text and an image tower belong together, or have their projections at all, cannot be seen from
    their sizes, and cosines of those that do not belong together look like any others. Each tower's own
    preferences are taken out first.
    """
    colors = torch.tensor(list(DISCS.values()), dtype=torch.float32) / 255
    grid = torch.linspace(-1, 1, _SIDE)
    inside = (grid[:, None] ** 2 + grid**2 < 0.45)[..., None]
    discs = torch.where(inside, colors[:, None, None], 0.5)  # (8, _SIDE, _SIDE, 3)
    try:
        cosines = cosine(pair.images(discs), pair.texts([f"a {color} ball" for color in DISCS]))
    except MetricError:
        return 0  # a projection that was never loaded is any bytes: zeros, or no numbers at all
    centred = cosines - cosines.mean(dim=0) - cosines.mean(dim=1, keepdim=True)
    return int((centred.argmax(dim=1) == torch.arange(len(DISCS), device=centred.device)).sum())
