"""What a training has learned so far, on the disk now and then while it runs.

A kill, a power cut or a crash loses what was done since the last time, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import files

SECONDS = 30.0  # of work between two savings
SHARE = 0.01  # of the time that savings may take: where writing is slow, they are rarer
_TRIAL_BYTES, _HASHED_A_SECOND = 1 << 24, 200e6  # to tell how long writing takes before it has been done
_WHOLE, _SAMPLES = 1 << 20, 4096  # of a tensor with more values than the first, so many are looked at


class Partial:
    """The file of a run that is not finished. There is one at a time: the newest.

    write: writes what there is now, whole or not at all, and returns where; it may be the same path each time.
    expected: the seconds that it takes, roughly, until it has been measured. clock: seconds, for tests.
    """

    def __init__(self, write: Callable[[], Path], expected: float = 0.0, clock: Callable[[], float] = time.monotonic):
        self._write, self._clock = write, clock
        self._cost, self._last = expected, clock()
        self.path: Path | None = None
        self.problem: Exception | None = None  # why the last one could not be written

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
        before, self.path, self.problem = self.path, path, None
        if before is not None and before != path:
            _remove(before)
        return path

    def discard(self) -> None:
        """Remove the file: the run is finished, and saved elsewhere."""
        if self.path is not None:
            _remove(self.path)
        self.path = None

    def _write_after(self, seconds: float) -> None:
        if self._clock() - self._last < seconds:
            return
        try:
            self.save()
        except Exception as problem:  # whatever it is: the training is worth more than one of its copies
            self.problem = problem


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
