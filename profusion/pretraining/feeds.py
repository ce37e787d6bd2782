"""What a step is fed: one process's rows, as features of pictures that are encoded on the way or were before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .cache import FeatureCache, features_of
from .encoding import Encoders
from .stream import PictureStream

Features = tuple[Tensor, Tensor]
"""Latents (rows, C, H, W) and image tokens (rows, L, width)."""


@dataclass
class Feed:
    """Features of one process's rows of the global batches, the same whenever a run is taken up.

    cache: keeps what the encoders make of each picture, so that they do it once.
    """

    stream: PictureStream
    encoders: Encoders
    cache: FeatureCache | None = None

    def batches(self, start: int) -> Iterator[Features]:
        """From global batch `start` on, without an end. Raises PictureError, StreamError and CacheError."""
        if self.cache is None:
            for batch in self.stream.batches(start):
                yield self.encoders.features(batch.pictures)
            return
        for batch in self.stream.batches(start, self.cache.states):
            yield features_of(batch, self.cache, self.encoders.features)

    def epoch_of(self, step: int) -> int | None:
        """The epoch of a step's first row, where that is known."""
        return self.stream.epoch_of(step)

    def skipped(self) -> str:
        """How many pictures could not be read, in words; empty where all could."""
        return f"pictures: {self.stream.skipped}" if len(self.stream.skipped) else ""
