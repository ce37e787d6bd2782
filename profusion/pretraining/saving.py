"""A training's folder: checkpoints that are written while it goes on, and its log.

step-00001000.safetensors   the network, the optimizer's moments and the average: `load_training` reads it
best.safetensors            the network, or its average, as it was when the validation was best: a finished PromptNet
log.jsonl                   a line of JSON for each report and validation
sheets/                     pictures that S* drew

A checkpoint appears under its name when all of it is there. The one before stays until then.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import files
from ..loop import TrainingError
from ..promptnet.file import SUFFIX, load_training, save_weights
from ..promptnet.network import PromptNet, PromptNetConfig, PromptNetError
from .ranks import Ranks

BEST = f"best{SUFFIX}"
LOG = "log.jsonl"
LOCK = "lock"
WAIT = 10.0  # seconds, for the workers of a training that was killed, which hold it until they notice
_STEM = "step-"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 where the name is none."""
    digits = path.name.removeprefix(_STEM).removesuffix(SUFFIX)
    return int(digits) if path.name.startswith(_STEM) and digits.isascii() and digits.isdigit() else -1


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a training's folder, the oldest first."""
    found = [path for path in folder.glob(f"{_STEM}*{SUFFIX}") if step_of(path) >= 0] if folder.is_dir() else []
    return sorted(found, key=step_of)


@contextlib.contextmanager
def held(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other trainings out of a folder, which is made, for so long. Raises TrainingError, in all processes, where
    one is in it."""
    problem, release = None, None
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
        until = time.monotonic() + WAIT
        while (release := files.hold(folder / LOCK)) is None and time.monotonic() < until:
            time.sleep(0.2)
        if release is None:
            problem = TrainingError(
                f"another training is at work in {folder}: stop it, wait for its end, or give another --out"
            )
    try:
        ranks.agree(problem)
        yield
    finally:
        if release is not None:
            release()


@dataclass
class Saver:
    """Writes checkpoints in a thread of its own, one at a time, and keeps the last ones and the best.

    keep: how many of the last. A failure is raised by the next call, as TrainingError: the training still has all
    that it learned, and the checkpoint before is still there.
    """

    folder: Path
    config: PromptNetConfig
    notes: Mapping[str, str]
    keep: int = 3
    _thread: threading.Thread | None = None
    _problem: Exception | None = None
    _best: float = math.inf
    written: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        best = self.folder / BEST
        if best.is_file():
            with contextlib.suppress(files.FileFormatError, OSError, KeyError, ValueError):
                self._best = float(files.read_tensors(best)[1]["notes.validation"])

    def save(self, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], value: float | None) -> None:
        """Begin to write a checkpoint of tensors that nobody changes any more, when the one before is written.

        value: what the validation said of it, less being better, where it was made at this step.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(step, weights, state, value), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is written. Raises TrainingError where it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise TrainingError(
                f"{problem} Make room, or give another --out; the same command goes on from "
                f"{_named(checkpoints(self.folder))}."
            ) from problem

    def _write(
        self, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], value: float | None
    ) -> None:
        try:
            path = self.folder / f"{_STEM}{step:08}{SUFFIX}"
            notes = dict(self.notes) if value is None else {**self.notes, "validation": repr(value)}
            save_weights(weights, self.config, path, "float32", notes, state)
            self.written.append(path)
            if value is not None and value < self._best:
                average = {name.removeprefix("ema."): x for name, x in state.items() if name.startswith("ema.")}
                save_weights(
                    {**weights, **average}, self.config, self.folder / BEST, notes={**notes, "step": str(step)}
                )
                self._best = value
            # Damaged ones of later steps, which were passed over, are not to push out those of this run.
            until_now = [one for one in checkpoints(self.folder) if step_of(one) <= step]
            for old in until_now[: -self.keep]:
                old.unlink(missing_ok=True)
        except Exception as problem:  # whatever it is: the training's thread is to hear of it
            self._problem = problem


def newest(folder: Path, say: Any = print) -> tuple[Path, PromptNet, dict[str, Tensor], dict[str, str]] | None:
    """The newest checkpoint that can be read, its network, the training's state and its notes; None where there is
    none. say: told of those that cannot be read."""
    there = checkpoints(folder)
    for path in reversed(there):
        try:
            return path, *load_training(path)
        except PromptNetError as problem:
            say(f"{problem} " + ("The one before it is taken." if path != there[0] else "The training begins anew."))
    return None


def _named(found: list[Path]) -> str:
    return f"step {step_of(found[-1])}" if found else "the beginning"


class Log:
    """Lines of JSON, and TensorBoard's files where tensorboard is installed. A resumed training's lines come after."""

    def __init__(self, folder: Path, since: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LOG
        self._board = _board(folder / "tensorboard", since)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a line, at once; numbers go to TensorBoard too."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(name, value, step)
            self._board.flush()


def _board(folder: Path, since: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=since)
