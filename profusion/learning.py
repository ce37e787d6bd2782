"""Learn a concept by Infusion without a host: its pictures, the training, and the file that it can go on from."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from torch import Tensor

from . import __version__
from .files import sha256_of
from .interrupts import gathered
from .keeping import Partial, digest
from .pictures import read_pictures
from .pipeline import Pipeline, seeded
from .residual import SUFFIX, Origin, Residual, ResidualError, load_residual, save_residual
from .residual.origin import SAMPLED, Sample, sample_of
from .residual.training import NOUN_PROMPTS, ResidualTraining, TrainingOptions

REPORT_EVERY, REPORT_SECONDS = 25, 30.0  # steps, and at most so long, between two lines
OWN_SEEDS, OWN_STEPS = (101, 102), 15  # of the pictures that the model draws to compare the user's with
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

    partial: the file it can go on from, where one was written. remarks: what was said of the pictures, and why it ended
    early. masks: weights (M, h, w) of the pictures' cells where they were found, and not given. strangeness, left: see
    `ResidualTraining`; of the plain model's error, the share that is left at the end, where it was checked.
    """

    residual: Residual
    first: int
    losses: list[float]
    seconds: float
    partial: Partial | None = None
    remarks: tuple[str, ...] = ()
    masks: Tensor | None = None
    strangeness: float | None = None
    left: float | None = None

    def found(self) -> Report:
        """What a report says of it."""
        numbers = {"strangeness": self.strangeness, "error_left": self.left}
        return {
            "trained_steps": self.residual.steps,
            "masks": "found" if self.masks is not None else "as given",
            **{name: round(value, 4) for name, value in numbers.items() if value is not None},
            "remarks": list(self.remarks),
        }


def train(
    model: Pipeline,
    concept: Concept,
    options: TrainingOptions,
    say: Say,
    folder: Path | None = None,
    resume: Residual | None = None,
) -> Trained:
    """Learn the concept, saying now and then how far it is.

    folder: where the file of the unfinished training, training_<digits>.safetensors, is written now and then; where one
    of the same training lies there already, it goes on from that. resume: a residual to train further. At Ctrl-C,
    SIGTERM and SIGHUP that file is written, and KeyboardInterrupt raised.
    """
    started = time.monotonic()
    base = BaseHash(model.path)

    def begin(resume: Residual | None) -> ResidualTraining:
        return model.training(concept.pictures, concept.masks, concept.noun, options, resume)

    def learned() -> Residual:
        return replace(training.residual(), origin=origin_on(model, options.learning_rate, base.so_far()))

    training, partial = begin(resume), None
    learned()  # raises ResidualError now, and not after the training, where the noun is none that a file can have
    if folder is not None:
        path = folder / f"training_{_identity(model, concept.noun, training, resume)}{SUFFIX}"
        begun = _begun(path, options, say)
        if begun is None and path.is_file():  # of a longer training, or damaged: it stays as it is
            path = path.with_stem(f"{path.stem}_{options.steps}")
            begun = _begun(path, options, say)
        if begun is not None:
            training = begin(begun)
        partial = Partial(lambda: save_residual(learned(), path, "float32").path)
        if begun is not None:
            partial.take(path)
    first = training.step
    if options.automatic and first < options.steps:
        own = [NOUN_PROMPTS[0].format(concept.noun)] * len(OWN_SEEDS)
        training.own = model.generate(own, seeded(*OWN_SEEDS), OWN_STEPS)
    _take_steps(training, partial, say)
    if training.why_ended():
        say(training.why_ended())
    if partial is not None:
        partial.save()
    base.wait()
    return Trained(
        learned(),
        first,
        training.losses,
        time.monotonic() - started,
        partial,
        tuple(filter(None, [*training.remarks(), training.why_ended()])),
        training.masks.cpu() if training.found_masks else None,
        training.strangeness,
        training.checks[-1] if training.checks else None,
    )


def _take_steps(training: ResidualTraining, partial: Partial | None, say: Say) -> None:
    """Train to the end. Raises KeyboardInterrupt after an interrupted step, when it is saved."""
    started, first, steps = time.monotonic(), training.step, training.options.steps
    said = started
    with gathered() as interrupts:
        for loss in training.steps(partial):
            now, done = time.monotonic(), training.step
            if done == first + 1:
                for remark in training.remarks():
                    say(f"note: {remark}")
            if done % REPORT_EVERY == 0 or done == steps or now - said > REPORT_SECONDS:
                pace, said = (now - started) / (done - first), now
                say(
                    f"train {done}/{steps}  loss {training.mean_loss(REPORT_EVERY):.4f}  (last {loss:.4f})  "
                    f"{pace:.2f} s a step, {math.ceil((steps - done) * pace / 60)} min left"
                )
            if interrupts and done < steps:
                if partial is not None:
                    say(f"saved {partial.save()} at step {done}")
                raise KeyboardInterrupt


def _identity(model: Pipeline, noun: str, training: ResidualTraining, resume: Residual | None) -> str:
    """What must be the same for one training to go on as another: also what the text says, and how it is read."""
    contexts = model.embedded([prompt.format(noun) for prompt in NOUN_PROMPTS], (model.size, model.size))
    begun = None if resume is None else (resume.steps, *resume.numbers())
    return digest(training.identity, dict(model.unet.named_parameters()), contexts, model.prediction, begun)


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


class BaseHash:
    """The hash of a model's file, read beside a training, which takes longer."""

    def __init__(self, path: Path | None):
        self._found, self._thread = "", None
        if path is not None:
            self._thread = threading.Thread(target=self._read, args=(path,), daemon=True)
            self._thread.start()

    def _read(self, path: Path) -> None:
        try:
            self._found = sha256_of(path)
        except OSError:
            return  # it is told nothing of

    def so_far(self) -> str:
        """The first ten hexadecimal digits of its SHA-256, as model sites have it; empty while it is being read."""
        return self._found[:10]

    def wait(self) -> None:
        """Until the file has been read."""
        if self._thread is not None:
            self._thread.join()


def origin_on(model: Pipeline, learning_rate: float, base_hash: str = "") -> Origin:
    """What is learned on a model today comes from."""
    return Origin(
        base=model.base,
        base_hash=base_hash,
        sample=weights_sample(model),
        learning_rate=learning_rate,
        prompts=NOUN_PROMPTS,
        version=__version__,
        day=date.today().isoformat(),
    )


def weights_sample(model: Pipeline) -> Sample:
    """What the model's UNet is known again by, here and in a host."""
    return sample_of([weight for name, weight in model.unet.named_parameters() if name.endswith(SAMPLED)])
