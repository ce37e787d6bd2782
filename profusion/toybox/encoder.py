"""Toybox's own image and text towers as a metric's backbone, which is always there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..metrics.checks import MetricError
from ..models.tokenizer import tokenize
from .pipeline import SIZE, Toybox


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
                f"pictures of {pictures.shape[2]}x{pictures.shape[1]} pixels: {self.name} knows Toybox's, of "
                f"{SIZE}x{SIZE}, and nothing else. Take a real CLIP: connect clip_vision (Load CLIP Vision), or "
                "--clip open_clip:ViT-L/14"
            )
        vision = self._toybox.vision
        return vision.embed(vision.preprocess(pictures))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self._toybox.text.embed(tokenize(list(texts)))
