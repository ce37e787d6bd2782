"""Shards that can only be read on: what commands write out, and compressed tars.

They are read in lanes, of which there are as many for any number of processes and workers. A lane has shards of its
own. In each of its epochs it reads them in an order drawn by the seed, and shuffles their pictures in a buffer. Lane l
of L gives rows l G / L to (l + 1) G / L - 1 of each global batch of G.

What is exact: the batches are the same for any number of ranks and workers, and from any step on, as long as the
shards are the same and are read without failing; and within a lane each picture comes once an epoch. What is not:
lanes with fewer pictures come to theirs again sooner. To go on at step k, a lane reads its pictures up to there
without decoding them, one whole epoch at most and what is left of the last; ranks that share a lane each read all of
it, so that the lanes are best a multiple of the ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..decoding import PictureError
from ..problems import printable, why
from .order import generator_of
from .patterns import PIPE
from .shards import Member, ShardError, called, check_there, is_picture, members
from .squares import MOST_BYTES

USUAL_LANES = 16
_LANES = 3  # what a generator is for; see `order.generator_of`
_PAUSE = 1.0  # seconds before a command that failed is tried again, and twice as long each time
NO_COMMANDS = (
    "commands are not part of the archive that ComfyUI's Registry hands out, whose rules let no code start programs: "
    "use a checkout of the repository, or shards on this machine"
)


class Streamed:
    """Pictures in shards that can only be read on. How many there are is not known.

    retries: how often a command that fails is tried again. lanes: see above; default: the most that divide a batch, up
    to USUAL_LANES and the number of shards. buffer, megabytes: of a lane's shuffle. Raises PictureError for local
    shards that are not there.
    """

    def __init__(
        self,
        shards: Sequence[str],
        where: str,
        retries: int = 2,
        lanes: int | None = None,
        buffer: int = 256,
        megabytes: int = 64,
        pause: float = _PAUSE,
    ):
        local = [Path(shard) for shard in shards if not shard.startswith(PIPE)]
        check_there(local)
        if len(local) < len(shards):
            _command_class()
        names = iter(called(local) if local else ())
        self.called = [shard if shard.startswith(PIPE) else next(names) for shard in shards]
        self.where, self.shards, self.retries, self.lanes = where, list(shards), retries, lanes
        self.buffer, self.most_bytes, self.pause = buffer, megabytes << 20, pause

    def lanes_for(self, batch: int) -> int:
        """How many lanes give the rows of a global batch. Raises PictureError for a number that cannot."""
        count = len(self.shards)
        if self.lanes is None:
            return max(lanes for lanes in range(1, min(count, USUAL_LANES, batch) + 1) if batch % lanes == 0)
        if not 1 <= self.lanes <= count or batch % self.lanes:
            raise PictureError(
                f"lanes={self.lanes} must divide the global batch of {batch}, and be at most the {count} shards"
            )
        return self.lanes


@dataclass
class Held:
    """A picture's bytes on their way, or a note. reason: why it is of no use, when that is known."""

    name: str
    data: bytes = b""
    reason: str = ""


class Lane:
    """One lane's pictures, without an end: `rows`, each with those that follow it in reach.

    notes: what was found damaged or had to be tried again since they were taken last.
    """

    def __init__(self, source: Streamed, number: int, lanes: int, seed: int, start: int = 0):
        self._source, self._number, self._lanes, self._seed = source, number, lanes, seed
        self.notes: list[Held] = []
        self._pictures, self._ahead = self._from(start), deque()

    def row(self) -> Iterator[Held]:
        """The next row's picture, and after it those that could stand in for it, which have their own turns yet."""
        if not self._ahead:
            self._ahead.append(next(self._pictures))
        yield self._ahead[0]
        for at in itertools.count(1):
            if at == len(self._ahead):
                self._ahead.append(next(self._pictures))
            yield self._ahead[at]

    def step_on(self) -> None:
        """Leave this row's picture behind."""
        if self._ahead:
            self._ahead.popleft()
        else:
            next(self._pictures)

    def _from(self, start: int) -> Iterator[Held]:
        """The pictures from this one on."""
        epoch = length = 0
        while True:
            if length and start >= length:  # as many as in the epoch that was read
                epoch, start = epoch + start // length, start % length
            length = 0
            for length, one in enumerate(self._epoch(epoch), 1):  # noqa: B007
                if start:
                    start -= 1
                else:
                    yield one
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Held]:
        """An epoch of its own shards, or, where nothing is in them, of the next lane's. Raises PictureError where
        nothing is in any."""
        for turn in range(self._lanes):
            found = False
            for found in self._shuffled(epoch, (self._number + turn) % self._lanes):
                yield found
            if found:
                return
        damaged = f": {self.notes[0].name}" if self.notes else ""
        raise PictureError(f"no picture comes from {self._source.where}{damaged}")

    def _shuffled(self, epoch: int, lane: int) -> Iterator[Held]:
        source, generator = self._source, generator_of(_LANES, self._seed, self._number, epoch)
        own = range(lane, len(source.shards), self._lanes)
        order = torch.randperm(len(own), generator=generator).tolist()
        buffer: list[Held] = []
        size = 0
        for one in itertools.chain.from_iterable(self._shard(own[at]) for at in order):
            buffer.append(one)
            size += len(one.data)
            while len(buffer) > source.buffer or size > source.most_bytes:
                taken = _drawn(buffer, generator)
                size -= len(taken.data)
                yield taken
        while buffer:
            yield _drawn(buffer, generator)

    def _shard(self, number: int) -> Iterator[Held]:
        """A shard's pictures. One that is damaged is noted, and ends there."""
        shard, name = self._source.shards[number], self._source.called[number]
        given, left_out = 0, Counter()
        try:
            for member in self._members(shard):
                if is_picture(member.name, left_out):
                    held = Held(f"{name}/{member.name}")
                    if member.size > MOST_BYTES:
                        held.reason = "too large"
                    else:
                        held.data = member.read()
                    given += 1
                    yield held
        except ShardError as problem:
            self.notes.append(Held(f"{name}, which {problem}", reason="shards damaged or cut short"))
        self.notes += [Held(f"{name} ({reason})", reason=f"members {reason}") for reason in left_out]

    def _members(self, shard: str) -> Iterator[Member]:
        if shard.startswith(PIPE):
            yield from self._of_command(shard.removeprefix(PIPE))
            return
        try:
            file = open(shard, "rb")  # noqa: SIM115
        except OSError as problem:
            raise PictureError(f"the shard {shard} cannot be read: {why(problem)}") from problem
        with file:
            yield from _whole(members(file, streamed=True))

    def _of_command(self, command: str) -> Iterator[Member]:
        """What a command writes out; where it fails it is tried again, and what was had is left out."""
        given = 0
        for tries in range(self._source.retries + 1):
            process = _command_class()(command)
            try:
                problem = None
                try:
                    for at, member in enumerate(_whole(members(process.output, streamed=True))):
                        if at >= given:
                            given += 1
                            yield member
                except ShardError as damaged:
                    problem = damaged
                if problem is None:
                    return
                code = process.ended()
                if not code:
                    raise problem  # the command did what it was to do
                said = process.said()
            finally:
                process.close()
            self.notes.append(Held(f"{PIPE}{command} (try {tries + 1})", reason="failed, and tried again"))
            if tries < self._source.retries:
                time.sleep(self._source.pause * 2**tries)
        words = f": {printable(said)}" if said else ""
        raise PictureError(
            f"the command '{command}' failed {self._source.retries + 1} times, with exit code {code}{words}. Try it in "
            "a shell; the training goes on from its last checkpoint"
        )


def _whole(found: Iterator[Member]) -> Iterator[Member]:
    """The same with their bytes read at once, so that a cut in them is found before they are used."""
    for member in found:
        try:
            data = b"" if member.size > MOST_BYTES else member.read()
        except Exception as problem:  # whatever a damaged archive makes of the library
            raise ShardError(f"is damaged or cut short ({why(problem)})") from problem
        if member.size <= MOST_BYTES and len(data) < member.size:
            raise ShardError("is damaged or cut short: a file in it is not whole")
        yield member._replace(read=lambda data=data: data)


def _drawn(buffer: list[Held], generator: torch.Generator) -> Held:
    """One of them, whose place the last one takes."""
    at = int(torch.randint(len(buffer), (), generator=generator))
    buffer[at], buffer[-1] = buffer[-1], buffer[at]
    return buffer.pop()


def _command_class() -> type:
    try:
        from .pipes import Command
    except ImportError as problem:
        raise PictureError(NO_COMMANDS) from problem
    return Command


def is_compressed(path: Path) -> bool:
    """Whether a file begins as gzip's, bzip2's or xz's do."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00"))
    return False
