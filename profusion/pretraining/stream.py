"""An endless stream of batches of pictures, decoded in worker processes, the same for any number of ranks and workers.

The order is that of `order`, by seed and epoch alone, or of `lanes` where shards can only be read on. What cannot be
read is left out as `rows` says.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ..decoding import PictureError
from ..problems import Explained, printable, why
from .lanes import Streamed
from .order import WHOLE, Order, Share
from .rows import NO_ENTRY, Chunk, IndexedRows, Known, LaneRows, Task, Unreadable
from .sources import Source
from .squares import Framing, StreamError

_CHUNK = 8  # rows that a worker decodes at once
_AHEAD = 2  # batches that are decoded before they are asked for
_LOOKS = 1.0  # seconds between two looks at whether a worker's process is there
_WORKER = "DataLoader worker"  # in the library's words for one that ended
_NAMED = 8  # pictures by name, in a message


@dataclass(frozen=True)
class Batch:
    """Rows of one global batch.

    pictures: (B, size, size, 3) uint8, without those that a cache has: `cached` (B,) says which. positions: (B,) int64,
    see `order`. entries: (B,) int64, which picture of the source each is, in its place or in that of one that cannot be
    read; -1 where it is streamed. keys: their names.
    """

    step: int
    pictures: Tensor
    positions: Tensor
    entries: Tensor
    keys: tuple[str, ...]
    cached: Tensor


@dataclass
class Skipped:
    """What could not be read so far, each once: how many by reason, and the names of the first few."""

    reasons: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)
    _found: dict[int | str, str] = field(default_factory=dict, repr=False)

    @property
    def entries(self) -> list[int]:
        """Which pictures of the source."""
        return sorted(one for one in self._found if isinstance(one, int))

    def __len__(self) -> int:
        return len(self._found)

    def add(self, one: Unreadable) -> None:
        self._add(one.name if one.entry == NO_ENTRY else one.entry, one.reason, [printable(one.name)])

    def update(self, other: Skipped) -> None:
        """Add what another process found."""
        for known, reason in other._found.items():
            self._add(known, reason, [])
        self.names += [name for name in other.names if name not in self.names][: _NAMED - len(self.names)]

    def _add(self, known: int | str, reason: str, names: list[str]) -> None:
        if known in self._found:
            return
        self._found[known] = reason
        self.reasons[reason] += 1
        if len(self.names) < _NAMED:
            self.names += names

    def __str__(self) -> str:
        counted = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return f"{len(self)} skipped ({counted}), such as {', '.join(self.names)}" if self._found else "none skipped"


class _Tasks(Sampler):
    """What the rows of a share are, step after step."""

    def __init__(self, order: Order, batch: int, rows: range, start: int):
        self._order, self._batch, self._rows, self._start = order, batch, rows, start

    def __iter__(self) -> Iterator[Task]:
        for step in itertools.count(self._start):
            first = step * self._batch + self._rows.start
            entries = self._order.entries(first, len(self._rows)).tolist()
            for row in range(0, len(entries), _CHUNK):
                yield Task(row, first + row, entries[row : row + _CHUNK])


class PictureStream:
    """Batches of the pictures of a source, from any step on.

    size: pixels a side. batch: rows of the global batch. share: which of them are this process's. workers: processes
    that decode; 0 decodes in this one. crop: "center", or "random", a part of each picture that is drawn by the seed
    and its position. window: shuffle within so many shards at a time, see `order.epoch_order`; 0 shuffles all. Where
    shards can only be read on, no more workers are started than the share has lanes.

    skipped: what this process could not read. Raises StreamError and OrderError for what cannot be.
    """

    def __init__(
        self,
        source: Source | Streamed,
        size: int = 512,
        batch: int = 64,
        seed: int = 0,
        share: Share = WHOLE,
        workers: int = 2,
        crop: str = "center",
        window: int = 0,
    ):
        self.source, self.batch, self.share, self.workers = source, batch, share, workers
        if workers < 0:
            raise StreamError(f"workers={workers} must not be negative; 0 decodes in the training's own process")
        self._framing, self._rows, self._seed = Framing(size, crop), share.rows(batch), seed
        self._order = None
        if isinstance(source, Streamed):
            source.lanes_for(batch)
        else:
            self._order = Order(len(source), seed, source.parts, window)
        self.skipped = Skipped()

    def epoch_of(self, step: int) -> int | None:
        """The epoch of a step's first row; None where nobody knows how many pictures there are."""
        return None if self._order is None else step * self.batch // self._order.count

    def batches(self, start: int = 0, cached: Known | None = None) -> Iterator[Batch]:
        """The batches of this share from step `start` on, without an end.

        cached: what a cache knows, such as `FeatureCache.states`; what it has is not decoded. Raises PictureError where
        nothing can be read, or a command fails; StreamError where a worker ends by itself.
        """
        if cached is not None and (self._order is None or self._framing.crop != "center"):
            raise StreamError("a cache has one square of each picture: give a folder or shards, and crop='center'")
        loader, chunks = self._loader(start, cached)
        for step, parts in _grouped(_guarded(loader), chunks, start):
            yield self._batch(step, parts)

    def _loader(self, start: int, cached: Known | None) -> tuple[DataLoader, int]:
        """What gives chunks, and how many of them are a batch."""
        if self._order is None:
            rows, tasks = LaneRows(self.source, self.batch, self._rows, self._seed, self._framing, start), None
            workers = min(self.workers, len(rows.own))
            chunks, ahead = max(1, workers), _AHEAD
        else:
            rows = IndexedRows(self.source, self._order, self._framing, cached)
            tasks, workers = _Tasks(self._order, self.batch, self._rows, start), self.workers
            chunks = -(-len(self._rows) // _CHUNK)
            ahead = max(_AHEAD, -(-_AHEAD * chunks // max(1, workers)))
        loader = DataLoader(
            rows,
            batch_size=None,
            sampler=tasks,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_quiet,
            prefetch_factor=ahead if workers else None,
            generator=torch.Generator(),  # or it would draw from everybody's
        )
        return loader, chunks

    def _batch(self, step: int, chunks: Sequence[Chunk]) -> Batch:
        count, size = len(self._rows), self._framing.size
        entries, keys, cached = (
            torch.empty(count, dtype=torch.int64),
            [""] * count,
            torch.zeros(count, dtype=torch.bool),
        )
        for chunk in chunks:
            for one in chunk.unreadable:
                self.skipped.add(one)
            if chunk.problem:
                raise PictureError(chunk.problem)
            entries[chunk.rows], cached[chunk.rows] = torch.tensor(chunk.entries), torch.tensor(chunk.cached)
            for row, key in zip(chunk.rows, chunk.keys, strict=True):
                keys[row] = key
        pictures = torch.empty(int((~cached).sum()), size, size, 3, dtype=torch.uint8)
        places = (~cached).cumsum(0) - 1
        for chunk in chunks:
            rows = torch.tensor(chunk.rows)
            pictures[places[rows[~cached[rows]]]] = torch.from_numpy(chunk.pictures)
        first = step * self.batch + self._rows.start
        return Batch(step, pictures, torch.arange(first, first + count), entries, tuple(keys), cached)


def _grouped(parts: Iterator[Chunk], size: int, step: int) -> Iterator[tuple[int, list[Chunk]]]:
    """So many at a time, numbered from `step` on."""
    found = []
    for part in parts:
        found.append(part)
        if len(found) == size:
            yield step, found
            found, step = [], step + 1


def _guarded(loader: DataLoader) -> Iterator[Chunk]:
    """What the workers give. Raises StreamError where one of them ends by itself."""
    try:
        yield from loader
    except (RuntimeError, OSError, EOFError) as problem:
        found = ended_worker(problem) if loader.num_workers else None
        if found is None:
            raise
        raise found from problem


def ended_worker(problem: Exception) -> StreamError | None:
    """What to say where an exception means that a worker ended by itself; None where it means something else.

    While there are workers, torch may raise its RuntimeError wherever this process is. While a worker's answer is
    taken, it may be any of the system's.
    """
    of_torch = isinstance(problem, RuntimeError) and _WORKER in str(problem)
    if isinstance(problem, Explained) or not (of_torch or isinstance(problem, OSError | EOFError)):
        return None
    return StreamError(
        f"a worker that reads pictures ended by itself ({why(problem)}): memory may have run out. Use fewer "
        "workers, or 0"
    )


def _as_it_is(chunk: Chunk) -> Chunk:
    return chunk


def _quiet(_: int) -> None:
    """A worker leaves interrupts to the process that it works for, and ends without a word when it is told to, or when
    that process is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # a worker that a signal ended would be raised as an error
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """The library does so too, but after it has sent what it decoded, which nobody takes any more."""
    parent, number = multiprocessing.parent_process(), os.getppid()
    while not wait([parent.sentinel], _LOOKS) and os.getppid() == number:
        pass
    os._exit(0)
