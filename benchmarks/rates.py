"""Means and shares of successes, with the interval that the sample size allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from profusion.metrics import scores


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % by default; (0, 1) of nothing at all."""
    if not count:
        return 0.0, 1.0
    share, spread = right / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's); NaN for that of one value."""
    mean, low, high = scores.mean_interval(torch.tensor([float(value) for value in values], dtype=torch.float64))
    return mean, (high - low) / 2


@dataclass(frozen=True)
class Rate:
    """How many of `count` were right."""

    right: int
    count: int

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Rate:
        return cls(sum(map(bool, outcomes)), len(outcomes))

    @property
    def share(self) -> float:
        return self.right / self.count if self.count else 0.0

    def __str__(self) -> str:
        low, high = wilson_interval(self.right, self.count)
        return f"{100 * self.share:5.1f} %  ({self.right} of {self.count}; 95 %: {100 * low:.1f} to {100 * high:.1f})"

    def as_json(self) -> dict[str, object]:
        low, high = wilson_interval(self.right, self.count)
        return {
            "right": self.right,
            "count": self.count,
            "share": round(self.share, 4),
            "interval_95": [round(low, 4), round(high, 4)],
        }
