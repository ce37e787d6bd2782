"""What a training has learned so far, on the disk now and then while it runs.

A kill, a power cut or a crash loses what was done since the last time, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import files, problems

_LOG = logging.getLogger("ProFusion")

SECONDS = 30.0  # of work between two savings
SHARE = 0.01  # of the time that savings may take: where writing is slow, they are rarer
_TRIAL_BYTES, _HASHED_A_SECOND = 1 << 24, 200e6  # to tell how long writing takes before it has been done
_WHOLE, _SAMPLES = 1 << 20, 4096  # of a tensor with more values than the first, so many are looked at


class Partial:
    """The file of a run that is not finished. There is one at a time: the newest.

    write: writes what there is now, whole or not at all, and returns where; it may be the same path each time.
    expected: the seconds that it takes, roughly, until it has been measured. warn: told where it cannot be written,
    and where it can be again; default: the log. clock: seconds, for tests.

    While the run lasts, other processes cannot `take` the file, and what they have put in its place is left alone.
    """

    def __init__(
        self,
        write: Callable[[], Path],
        expected: float = 0.0,
        warn: Callable[[str], None] = _LOG.warning,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._write, self._warn, self._clock = write, warn, clock
        self._cost, self._last = expected, clock()
        self._path: Path | None = None
        self._seen: tuple[int, ...] | None = None  # what tells the file from another one under its name
        self._release: Callable[[], None] = lambda: None
        self.problem: Exception | None = None  # why the last one could not be written

    @property
    def path(self) -> Path | None:
        """The file, as long as it is the one that this run has written or taken."""
        return self._path if self._path is not None and _seen(self._path) == self._seen else None

    def take(self, path: Path) -> bool:
        """Go on from this file, whose place the next one takes. False where the run of another process uses it."""
        release = files.hold(path)
        if release is None:
            return False
        self.leave()
        self._path, self._seen, self._release = path, _seen(path), release
        return True

    def leave(self) -> None:
        """Let go of the file, which stays, and which others may take."""
        self._path = None
        self._release()
        self._release = lambda: None

    def after_step(self) -> None:
        """Write the file if it is time. A failure is noted in `problem`, and tried again when it is time once more."""
        self._write_after(max(SECONDS, self._cost / SHARE))

    def at_a_pause(self) -> None:
        """The same where the run pauses anyway: as early as the cost allows."""
        self._write_after(self._cost / SHARE)

    def save(self) -> Path:
        """Write the file now, and remove the one before it. Raises what `write` raises."""
        started = self._clock()
        try:
            path = self._write()
        finally:
            self._last = self._clock()
            self._cost = self._last - started
        before, release, failed = self.path, self._release, self.problem is not None
        self._release = lambda: None
        if not self.take(path):
            self._path, self._seen = path, _seen(path)
        if before is not None and before != path:
            _remove(before)
        release()
        self.problem = None
        if failed:
            self._warn(f"What has been learned so far is written again: {path}")
        return path

    def discard(self) -> None:
        """Remove the file: the run is finished, and saved elsewhere."""
        if self.path is not None:
            _remove(self.path)
        self.leave()

    def _write_after(self, seconds: float) -> None:
        if self._clock() - self._last < seconds:
            return
        try:
            self.save()
        except Exception as problem:  # whatever it is: the training is worth more than one of its copies
            if self.problem is None:
                self._warn(
                    f"What has been learned so far cannot be written ({problems.why(problem)}). The training goes on, "
                    "and tries again."
                )
            self.problem = problem


def _seen(path: Path) -> tuple[int, ...] | None:
    """What tells a file from another one that is written under its name; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def seconds_to_write(path: Path, size: int) -> float:
    """Roughly, of a file of so many bytes, by writing some of them beside it; 0 where that cannot be done."""
    started, trial = time.monotonic(), max(1, min(size, _TRIAL_BYTES))
    try:
        files.try_writing(path, trial)
    except OSError:
        return 0.0
    return size * ((time.monotonic() - started) / trial + 1 / _HASHED_A_SECOND)


def digest(*things: object) -> str:
    """16 hexadecimal digits that tell trainings apart, of tensors, and of everything else by its repr.

    Lists, tuples and dictionaries may hold both. Of a large tensor, values spread over it are enough: no two trained
    networks agree in them.
    """
    found = hashlib.sha256()
    _add(found, things)
    return found.hexdigest()[:16]


def _add(found, thing: object) -> None:
    if isinstance(thing, Tensor):
        found.update(repr((thing.dtype, tuple(thing.shape))).encode())
        values = thing.detach().reshape(-1)
        stride = 1 if len(values) <= _WHOLE else len(values) // _SAMPLES
        found.update(values[::stride].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    elif isinstance(thing, dict):
        for name in sorted(thing):
            _add(found, (name, thing[name]))
    elif isinstance(thing, (list, tuple)):
        found.update(f"{len(thing)} of".encode())
        for part in thing:
            _add(found, part)
    else:
        found.update(f"{thing!r},".encode())
