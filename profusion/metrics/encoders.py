"""Backbones that turn pictures and prompts into features, under one contract; and Toybox's own, which is always there.

Pictures are the host's IMAGE, (B, H, W, 3) in [0, 1]; an encoder crops and scales them as it was trained to. Every result
names its backbone, because numbers of different ones do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..models.tokenizer import tokenize
from ..toybox.pipeline import SIZE, Toybox
from ..toybox.world import PALETTE
from .checks import MetricError
from .similarity import cosine


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


class ToyboxEncoder:
    """The image and text towers that Toybox was trained with (128 features). They know its world and nothing else.

    Raises MetricError for pictures that cannot be of it: a number would come out, and mean nothing.
    """

    name, measure = "Toybox's own pair", "CLIP-I"

    def __init__(self, toybox: Toybox | None = None):
        self._toybox = toybox or Toybox.load()

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        if tuple(pictures.shape[1:3]) != (SIZE, SIZE):
            raise MetricError(
                f"pictures of {pictures.shape[2]}x{pictures.shape[1]} pixels: {self.name} knows Toybox's, of {SIZE}x{SIZE}, and "
                "nothing else. Take a real CLIP: connect clip_vision (Load CLIP Vision), or --clip open_clip:ViT-L/14"
            )
        vision = self._toybox.vision
        return vision.embed(vision.preprocess(pictures))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self._toybox.text.embed(tokenize(list(texts)))


def color_check(pair: PairedEncoder) -> int:
    """How many of eight coloured discs a pair finds for "a red ball", "a blue ball" and so on: 0 to 8, by chance 1.

    Whether a text and an image tower belong together, or have their projections at all, cannot be seen from their sizes, and
    cosines of those that do not belong together look like any others. Each tower's own preferences are taken out first.
    """
    colors = torch.tensor(list(PALETTE.values()), dtype=torch.float32) / 255
    grid = torch.linspace(-1, 1, SIZE)
    inside = (grid[:, None] ** 2 + grid**2 < 0.45)[..., None]
    discs = torch.where(inside, colors[:, None, None], 0.5)  # (8, SIZE, SIZE, 3)
    try:
        cosines = cosine(pair.images(discs), pair.texts([f"a {color} ball" for color in PALETTE]))
    except MetricError:
        return 0  # a projection that was never loaded is any bytes: zeros, or no numbers at all
    centred = cosines - cosines.mean(dim=0) - cosines.mean(dim=1, keepdim=True)
    return int((centred.argmax(dim=1) == torch.arange(len(PALETTE), device=centred.device)).sum())
