"""What a step is fed: one process's rows, as features of pictures that are encoded on the way or were before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .encoding import Encoders
from .order import Order
from .stream import PictureStream

Features = tuple[Tensor, Tensor]
"""Latents (rows, C, H, W) and image tokens (rows, L, width)."""


class Feed(Protocol):
    """Features of one process's rows of the global batches, the same whenever the run is taken up."""

    def batches(self, start: int) -> Iterator[Features]:
        """From global batch `start` on, without an end."""

    def epoch_of(self, step: int) -> int:
        """The epoch of a step's first row."""


@dataclass
class Streamed:
    """Pictures that are decoded by workers and encoded in each step, on the device of the encoders."""

    stream: PictureStream
    encoders: Encoders

    def batches(self, start: int) -> Iterator[Features]:
        for batch in self.stream.batches(start):
            yield self.encoders.features(batch.pictures)

    def epoch_of(self, step: int) -> int:
        return self.stream.epoch_of(step)


@dataclass
class Encoded:
    """Pictures that were encoded before: `features` of their numbers (rows,), in the order of a stream."""

    features: Callable[[Tensor], Features]
    order: Order
    batch: int
    rows: range

    def batches(self, start: int) -> Iterator[Features]:
        step = start
        while True:
            yield self.features(self.order.entries(step * self.batch + self.rows.start, len(self.rows)))
            step += 1

    def epoch_of(self, step: int) -> int:
        return step * self.batch // self.order.count


def in_memory(latents: Tensor, image_tokens: Tensor) -> Callable[[Tensor], Features]:
    """The features of a few thousand pictures: latents (N, C, H, W) and image tokens (N, L, width)."""
    return lambda entries: (latents[entries].float(), image_tokens[entries].float())
