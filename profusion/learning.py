"""Learn a concept by Infusion without a host: its pictures, the training, and the file that it can go on from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .keeping import Partial, digest
from .pictures import read_pictures
from .pipeline import Pipeline
from .residual import SUFFIX, Residual, ResidualError, load_residual, save_residual
from .residual.training import TrainingOptions

Say = Callable[[str], None]
"""Told, line by line, what a person who waits wants to know."""
Report = dict[str, object]
"""What a command did, as JSON has it."""


@dataclass(frozen=True)
class Concept:
    """What is to be learned: pictures (M, H, W, 3), masks (M, H, W), the class noun, and words for people.

    about: what was done to the pictures, in words.
    """

    name: str
    noun: str
    pictures: Tensor
    masks: Tensor
    about: str = ""


def own_concept(folder: Path, noun: str, size: int) -> Concept:
    """The user's pictures, as squares of `size` pixels; an alpha channel is the object's mask."""
    return Concept(f"your {noun}", noun, *read_pictures(folder, size))


@dataclass(frozen=True)
class Trained:
    """A residual, the step its training went on from, the losses since then and the seconds that they took.

    partial: the file it can go on from, where one was written.
    """

    residual: Residual
    first: int
    losses: list[float]
    seconds: float
    partial: Partial | None = None


def train(model: Pipeline, concept: Concept, options: TrainingOptions, say: Say, folder: Path | None = None) -> Trained:
    """Learn the concept. folder: where the file of the unfinished training is written now and then; where one of the
    same training lies there already, it goes on from that."""
    started = time.monotonic()
    training = model.training(concept.pictures, concept.masks, concept.noun, options)
    partial = None
    if folder is not None:
        path = folder / f"training_{digest(training.identity, dict(model.unet.named_parameters()))}{SUFFIX}"
        begun = _begun(path, options, say)
        if begun is None and path.is_file():  # of a longer training, or damaged: it stays as it is
            path = path.with_stem(f"{path.stem}_{options.steps}")
            begun = _begun(path, options, say)
        if begun is not None:
            training = model.training(concept.pictures, concept.masks, concept.noun, options, begun)
        partial = Partial(lambda: save_residual(training.residual(), path, "float32").path)
        if begun is not None:
            partial.take(path)
    first = training.step
    for loss in training.steps(partial):
        if training.step % 25 == 0 or training.step == options.steps:
            say(f"train {training.step}/{options.steps}  loss {training.mean_loss(25):.4f}  (last {loss:.4f})")
    if partial is not None:
        partial.save()
    return Trained(training.residual(), first, training.losses, time.monotonic() - started, partial)


def _begun(path: Path, options: TrainingOptions, say: Say) -> Residual | None:
    """What an earlier run has learned, if it can be read and did not go further than this one is to go."""
    if not path.is_file():
        return None
    try:
        residual = load_residual(path)
    except ResidualError as problem:
        say(f"beginning anew: {problem}")
        return None
    if residual.steps > options.steps:
        say(f"beginning anew: {path} has {residual.steps} steps already")
        return None
    say(f"going on from step {residual.steps} of {path}")
    return residual
