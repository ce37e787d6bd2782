"""An endless stream of batches of pictures, decoded in worker processes, the same for any number of ranks and workers.

The order is that of `order`: by seed and epoch alone. A picture that cannot be read is counted, and the next one of
the epoch's order that can be stands in its place, on every rank alike.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..decoding import PictureError
from ..problems import why
from .order import WHOLE, Order, Share, generator_of
from .sources import Source
from .squares import Framing, StreamError, square

_CHUNK = 8  # rows that a worker decodes at once
_AHEAD = 2  # batches that are decoded before they are asked for
_MOST_TRIES = 10_000  # pictures in a row that cannot be read, after which nothing is believed to be readable
_NAMED = 8  # pictures by name, in a message
_CROPS = 2  # what a generator is for; see `order.generator_of`


@dataclass(frozen=True)
class Batch:
    """Rows of one global batch.

    pictures: (B, size, size, 3) uint8. positions: (B,) int64, see `order`. entries: (B,) int64, which picture of the
    source each is, in its place or in that of one that cannot be read. keys: their names.
    """

    step: int
    pictures: Tensor
    positions: Tensor
    entries: Tensor
    keys: tuple[str, ...]


@dataclass
class Skipped:
    """What could not be read so far: how many by reason, and the names of the first few."""

    reasons: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)
    entries: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return self.reasons.total()

    def add(self, one: Unreadable) -> None:
        if one.entry in self.entries:
            return
        self.entries.add(one.entry)
        self.reasons[one.reason] += 1
        if len(self.names) < _NAMED:
            self.names.append(one.name)

    def __str__(self) -> str:
        counted = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return f"{len(self)} skipped ({counted}), such as {', '.join(self.names)}" if self.reasons else "none skipped"


class Unreadable(NamedTuple):
    """A picture that could not be read, and why."""

    entry: int
    name: str
    reason: str


class _Chunk(NamedTuple):
    """What a worker gives for some rows. problem: why it cannot."""

    pictures: Tensor
    entries: list[int]
    keys: list[str]
    unreadable: list[Unreadable]
    problem: str = ""


class _Rows(Dataset):
    """`rows[(first position, entries)]`: a _Chunk. Each process remembers what it could not read."""

    def __init__(self, source: Source, order: Order, framing: Framing):
        self._source, self._order, self._framing = source, order, framing
        self._known: dict[int, Unreadable] = {}

    def __getitem__(self, task: tuple[int, Sequence[int]]) -> _Chunk:
        first, entries = task
        size = self._framing.size
        chunk = _Chunk(torch.empty(len(entries), size, size, 3, dtype=torch.uint8), [], [], [])
        try:
            for row, entry in enumerate(entries):
                self._fill(chunk, row, first + row, entry)
        except PictureError as problem:
            return chunk._replace(problem=str(problem))
        return chunk

    def _fill(self, chunk: _Chunk, row: int, position: int, entry: int) -> None:
        most = min(_MOST_TRIES, len(self._source))
        for tries in range(most):
            entry = self._order.entry_after(position, tries) if tries else entry
            if entry not in self._known:
                name = self._source.key(entry)
                try:
                    generator = generator_of(_CROPS, self._order.seed, position)
                    chunk.pictures[row] = square(self._source.read(entry), name, self._framing, generator)
                except PictureError as problem:
                    self._known[entry] = Unreadable(entry, name, reason(problem, name))
                else:
                    chunk.entries.append(entry)
                    chunk.keys.append(name)
                    return
            chunk.unreadable.append(self._known[entry])
        last = self._known[entry]
        raise PictureError(
            f"none of {most} pictures in a row of {self._source.where} can be read: {last.name} {last.reason}"
        )


def reason(problem: PictureError, name: str) -> str:
    """Why a picture is left out, without its name and its numbers: few kinds, to be counted."""
    return str(problem).removeprefix(name).split(":")[0].strip().removeprefix("is ")


class _Tasks(Sampler):
    """What the rows of a share are, step after step."""

    def __init__(self, order: Order, batch: int, rows: range, start: int):
        self._order, self._batch, self._rows, self._start = order, batch, rows, start

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        step = self._start
        while True:
            first = step * self._batch + self._rows.start
            entries = self._order.entries(first, len(self._rows)).tolist()
            for at in range(0, len(entries), _CHUNK):
                yield first + at, entries[at : at + _CHUNK]
            step += 1


class PictureStream:
    """Batches of the pictures of a source, from any step on.

    size: pixels a side. batch: rows of the global batch. share: which of them are this process's. workers: processes
    that decode; 0 decodes in this one. crop: "center", or "random", a part of each picture that is drawn by the seed
    and its position. window: shuffle within so many shards at a time, see `order.epoch_order`; 0 shuffles all.

    skipped: what this process could not read. Raises StreamError and OrderError for what cannot be.
    """

    def __init__(
        self,
        source: Source,
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
        self._framing, self._rows = Framing(size, crop), share.rows(batch)
        self._order = Order(len(source), seed, source.parts, window)
        self.skipped = Skipped()

    def epoch_of(self, step: int) -> int:
        """The epoch of a step's first row."""
        return step * self.batch // len(self.source)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batches of this share from step `start` on, without an end.

        Raises PictureError where nothing can be read, StreamError where a worker ends by itself.
        """
        tasks = _Tasks(self._order, self.batch, self._rows, start)
        chunks = -(-len(self._rows) // _CHUNK)
        ahead = {"prefetch_factor": max(2, -(-_AHEAD * chunks // self.workers))} if self.workers else {}
        loader = DataLoader(
            _Rows(self.source, self._order, self._framing),
            batch_size=None,
            sampler=tasks,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=_quiet,
            **ahead,
        )
        for step, parts in _grouped(_guarded(loader), chunks, start):
            yield self._batch(step, parts)

    def _batch(self, step: int, chunks: Sequence[_Chunk]) -> Batch:
        for chunk in chunks:
            for one in chunk.unreadable:
                self.skipped.add(one)
            if chunk.problem:
                raise PictureError(chunk.problem)
        first = step * self.batch + self._rows.start
        return Batch(
            step,
            torch.cat([chunk.pictures for chunk in chunks]),
            torch.arange(first, first + len(self._rows)),
            torch.tensor([entry for chunk in chunks for entry in chunk.entries]),
            tuple(key for chunk in chunks for key in chunk.keys),
        )


def _grouped(parts: Iterator[_Chunk], size: int, step: int) -> Iterator[tuple[int, list[_Chunk]]]:
    """So many at a time, numbered from `step` on."""
    found = []
    for part in parts:
        found.append(part)
        if len(found) == size:
            yield step, found
            found, step = [], step + 1


def _guarded(loader: DataLoader) -> Iterator[_Chunk]:
    """What the workers give. Raises StreamError where one of them ends by itself."""
    try:
        yield from loader
    except RuntimeError as problem:
        if isinstance(problem, PictureError | StreamError) or "DataLoader worker" not in str(problem):
            raise
        raise StreamError(
            f"a worker that reads pictures ended by itself ({why(problem)}): memory may have run out, or a container's "
            "/dev/shm is small. Use fewer workers, or 0"
        ) from problem


def _as_it_is(chunk: _Chunk) -> _Chunk:
    return chunk


def _quiet(_: int) -> None:
    """A worker leaves interrupts to the process that it works for, and ends without a word when it is told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
