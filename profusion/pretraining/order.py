"""Which picture comes when: by seed and epoch alone, so that a run may stop anywhere, and go on with other ranks.

A place is a picture's turn within an epoch. A position counts places over all epochs: epoch * length + place. Global
batch k of G rows holds positions k G to (k + 1) G - 1, so that an epoch may end within a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from ..problems import Explained

_ORDERS = 1  # what a generator is for: the first number of its seed
_KEPT = 2  # orders: an epoch's, and the next one's where a batch goes on into it


class OrderError(Explained, ValueError):
    """Rows that cannot be shared out as asked. The message says what to change."""


@dataclass(frozen=True)
class Share:
    """Whose rows of a global batch: those of `rank` among `world` processes, which must divide the batch."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        for name in ("rank", "world"):
            if not isinstance(getattr(self, name), Integral):
                raise OrderError(f"{name}={getattr(self, name)!r} must be a whole number")
        if not 0 <= self.rank < self.world:
            raise OrderError(f"rank={self.rank} must lie in 0..{self.world - 1}, for there are world={self.world}")

    def rows(self, batch: int) -> range:
        """Its rows of a global batch of so many. Raises OrderError where the ranks cannot have as many each."""
        if batch < 1 or batch % self.world:
            near = max(self.world, batch // self.world * self.world)
            raise OrderError(
                f"a global batch of {batch} cannot be shared by {self.world} processes: give a multiple of "
                f"{self.world}, such as {near}"
            )
        size = batch // self.world
        return range(self.rank * size, (self.rank + 1) * size)


WHOLE = Share()


def epoch_order(count: int, seed: int, epoch: int, parts: Sequence[int] = (), window: int = 0) -> Tensor:
    """A permutation (count,) of the pictures: at each place of the epoch, which one. int32, or int64 from 2^31 on.

    All are shuffled with all. With `window` they are shuffled among so many parts at a time, which are next to each
    other in a shuffled order of the parts: kinder to disks that turn. parts: how many pictures each has.
    """
    generator = generator_of(_ORDERS, seed, epoch)
    kind = torch.int32 if count < 2**31 else torch.int64
    if not window or window >= len(parts):
        return torch.randperm(count, generator=generator, dtype=kind)
    ends = np.cumsum(parts)
    if count != ends[-1]:
        raise ValueError(f"parts of {ends[-1]} pictures in all, and there are {count}")
    found, filled = torch.empty(count, dtype=kind), 0
    for those in torch.randperm(len(parts), generator=generator).split(window):
        ranges = [torch.arange(ends[part] - parts[part], ends[part], dtype=kind) for part in those.tolist()]
        near = torch.cat(ranges)
        found[filled : filled + len(near)] = near[torch.randperm(len(near), generator=generator)]
        filled += len(near)
    return found


def generator_of(*numbers: int) -> torch.Generator:
    """A generator seeded by all of these numbers, of which each counts. (torch's takes 32 bits of a seed.)"""
    mixed = np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


class Order:
    """Which picture comes at each position."""

    def __init__(self, count: int, seed: int, parts: Sequence[int] = (), window: int = 0):
        self.count, self.seed, self._parts, self._window = count, seed, tuple(parts) if window else (), window
        self._epoch = lru_cache(_KEPT)(self._made)

    def __reduce__(self) -> tuple:
        return Order, (self.count, self.seed, self._parts, self._window)

    def _made(self, epoch: int) -> Tensor:
        return epoch_order(self.count, self.seed, epoch, self._parts, self._window)

    def entries(self, first: int, count: int) -> Tensor:
        """The pictures (count,) at positions from `first` on, int64."""
        found = []
        while count:
            epoch, place = divmod(first, self.count)
            some = self._epoch(epoch)[place : place + count].long()
            found.append(some)
            first, count = first + len(some), count - len(some)
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)

    def entry_after(self, position: int, tries: int) -> int:
        """The picture that is so many places on, within the same epoch; after its last place comes its first."""
        epoch, place = divmod(position, self.count)
        return int(self._epoch(epoch)[(place + tries) % self.count])
