"""Rows of batches, decoded: what a worker process does.

A picture that cannot be read is counted, and the next one of the epoch's order, or of the lane, that can be stands in
its place: the same one for any number of ranks and workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..decoding import PictureError
from .lanes import Lane, Streamed
from .order import Order, generator_of
from .sources import Source
from .squares import Framing, square

_MOST_TRIES = 10_000  # pictures in a row that cannot be read, after which nothing is believed to be readable
_CROPS = 2  # what a generator is for; see `order.generator_of`
_BEFORE = "could not be read before, as the cache says"
NO_ENTRY = -1  # of a picture that has no number, as in a stream


class Unreadable(NamedTuple):
    """A picture that could not be read, and why."""

    entry: int
    name: str
    reason: str


class Chunk(NamedTuple):
    """Some rows of a batch. rows: which of the share's. cached: which of these need not be decoded; the pictures are
    those of the others. problem: why they cannot be had.

    No tensors: torch would send them through /dev/shm, which is small in containers, and wait for ever where it is
    full.
    """

    pictures: np.ndarray
    rows: list[int]
    entries: list[int]
    keys: list[str]
    cached: list[bool]
    unreadable: list[Unreadable]
    problem: str = ""

    def add(self, entry: int, key: str, picture: Tensor | None) -> None:
        if picture is not None:
            self.pictures[self.cached.count(False)] = picture.numpy()
        self.entries.append(entry)
        self.keys.append(key)
        self.cached.append(picture is None)


class Task(NamedTuple):
    """Rows of a batch that are next to each other: the first row of the share, its position, and their pictures."""

    row: int
    position: int
    entries: Sequence[int]


class Known(Protocol):
    """What a cache knows of each picture by now: 0 nothing, 1 all that is needed, 2 that it cannot be read."""

    def __getitem__(self, entry: int) -> int: ...


class IndexedRows(Dataset):
    """`rows[Task]`: a Chunk. Each process remembers what it could not read."""

    def __init__(self, source: Source, order: Order, framing: Framing, cached: Known | None = None):
        self._source, self._order, self._framing, self._cached = source, order, framing, cached
        self._unreadable: dict[int, Unreadable] = {}

    def __getitem__(self, task: Task) -> Chunk:
        chunk = _empty(self._framing, range(task.row, task.row + len(task.entries)))
        return _filled(chunk, lambda: self._fill_all(chunk, task))

    def _fill_all(self, chunk: Chunk, task: Task) -> None:
        for row, entry in enumerate(task.entries):
            self._fill(chunk, row, task.position + row, entry)

    def _fill(self, chunk: Chunk, row: int, position: int, entry: int) -> None:
        most = min(_MOST_TRIES, len(self._source))
        for tries in range(most):
            entry = self._order.entry_after(position, tries) if tries else entry
            name = self._source.key(entry)
            try:
                picture = self._picture(entry, name, position)
            except PictureError as problem:
                self._unreadable[entry] = Unreadable(entry, name, reason(problem, name))
                chunk.unreadable.append(self._unreadable[entry])
            else:
                chunk.add(entry, name, picture)
                return
        raise _nothing(self._source.where, most, self._unreadable[entry])

    def _picture(self, entry: int, name: str, position: int) -> Tensor | None:
        """None where the cache has it. Raises PictureError."""
        known = self._cached[entry] if self._cached is not None else 0
        if known == 1:
            return None
        if entry in self._unreadable or known == 2:
            raise PictureError(f"{name} {self._unreadable[entry].reason if entry in self._unreadable else _BEFORE}")
        return _square(self._source.read(entry), name, self._framing, self._order.seed, position)


class LaneRows(IterableDataset):
    """For each step from `start` on, each worker's rows of a share as a Chunk, without an end.

    batch: rows of the global batch; rows: those of the share.
    """

    def __init__(self, source: Streamed, batch: int, rows: range, seed: int, framing: Framing, start: int):
        self._source, self._batch, self._rows, self._seed = source, batch, rows, seed
        self._framing, self._start = framing, start
        self._lanes = source.lanes_for(batch)
        self._each = batch // self._lanes
        self.own = range(rows.start // self._each, -(-rows.stop // self._each))

    def __iter__(self) -> Iterator[Chunk]:
        worker = get_worker_info()
        own = self.own if worker is None else self.own[worker.id :: worker.num_workers]
        before = self._start * self._each
        lanes = {number: Lane(self._source, number, self._lanes, self._seed, before) for number in own}
        rows = [row for number in own for row in self._rows_of(number) if row in self._rows]
        for step in itertools.count(self._start):
            chunk = _empty(self._framing, [row - self._rows.start for row in rows])
            yield _filled(chunk, lambda chunk=chunk, step=step: self._fill_all(chunk, step, lanes))

    def _rows_of(self, lane: int) -> range:
        return range(lane * self._each, (lane + 1) * self._each)

    def _fill_all(self, chunk: Chunk, step: int, lanes: dict[int, Lane]) -> None:
        for number, lane in lanes.items():
            for row in self._rows_of(number):
                if row in self._rows:
                    self._fill(chunk, step * self._batch + row, lane)
                lane.step_on()
            chunk.unreadable.extend(Unreadable(NO_ENTRY, note.name, note.reason) for note in lane.notes)
            lane.notes.clear()

    def _fill(self, chunk: Chunk, position: int, lane: Lane) -> None:
        for held, _ in zip(lane.row(), range(_MOST_TRIES), strict=False):
            if not held.reason:
                try:
                    found = _square(held.data, held.name, self._framing, self._seed, position)
                except PictureError as problem:
                    held.reason, held.data = reason(problem, held.name), b""
                else:
                    chunk.add(NO_ENTRY, held.name, found)
                    return
            chunk.unreadable.append(Unreadable(NO_ENTRY, held.name, held.reason))
        raise _nothing(self._source.where, _MOST_TRIES, chunk.unreadable[-1])


def reason(problem: PictureError, name: str) -> str:
    """Why a picture is left out, without its name and its numbers: few kinds, to be counted."""
    return str(problem).removeprefix(name).split(":")[0].strip().removeprefix("is ")


def _square(data: bytes, name: str, framing: Framing, seed: int, position: int) -> Tensor:
    generator = generator_of(_CROPS, seed, position) if framing.crop == "random" else None
    return square(data, name, framing, generator)


def _empty(framing: Framing, rows: Sequence[int]) -> Chunk:
    pictures = np.empty((len(rows), framing.size, framing.size, 3), dtype=np.uint8)
    return Chunk(pictures, list(rows), [], [], [], [])


def _filled(chunk: Chunk, fill: Callable[[], None]) -> Chunk:
    """The chunk after it was filled, or with what is wrong: errors of workers come without a trace of theirs."""
    try:
        fill()
    except PictureError as problem:
        return chunk._replace(problem=str(problem))
    decoded = chunk.cached.count(False)
    return chunk if decoded == len(chunk.rows) else chunk._replace(pictures=chunk.pictures[:decoded].copy())


def _nothing(where: str, tries: int, last: Unreadable) -> PictureError:
    return PictureError(f"none of {tries} pictures in a row of {where} can be read: {last.name} {last.reason}")
