"""`python -m profusion residual train`: a folder of pictures into a residual, resumable at any moment."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from .files import NameTaken, try_writing, why_not_written
from .learning import REPORT_EVERY, Report, Say, own_concept, train, weights_sample
from .pictures import picture_paths
from .pipeline import Pipeline, noun_rows
from .prompt import NounError
from .residual import PRECISIONS, SUFFIX, Residual, ResidualError, load_residual, save_residual
from .residual.origin import other_base
from .residual.training import NOUN_PROMPTS, TrainingOptions

_BYTES = 1 << 20  # at least so many have to be free: SDXL's residual with its training state takes 1.7 MB


@dataclass(frozen=True)
class Command:
    """What was asked for. precision: of the file. resume: a residual to train further."""

    images: Path
    noun: str
    out: Path
    options: TrainingOptions
    precision: str = "float32"
    resume: Path | None = None


def add_to(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """The command line: `residual train`, under an argparse parser's sub-commands. Returns its parser."""
    residual = commands.add_parser("residual", help="residuals: what Infusion learns of a concept")
    one = residual.add_subparsers(dest="action", required=True).add_parser(
        "train", help="train one on a folder of pictures; run it again to go on after an interrupt"
    )
    defaults = TrainingOptions(learning_rate=0.0)
    one.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="pictures of the concept; alpha is the object's mask"
    )
    one.add_argument("--noun", required=True, help="what kind of thing they show, such as cat")
    one.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"file to write, {SUFFIX}")
    numbers = (
        ("--steps", int, defaults.steps, "training steps, those of a resumed run included"),
        (
            "--learning-rate",
            float,
            defaults.learning_rate,
            "AdamW's; 0: automatic, and then masks and an end are found",
        ),
        ("--batch", int, defaults.batch_size, "rows a step"),
        ("--seed", int, defaults.seed, "of the training"),
        (
            "--capacity",
            int,
            defaults.capacity,
            "vectors for each layer: 1 is the paper's, 4 is more alike, in 48 KB for SD 1.5",
        ),
        ("--preserve", float, defaults.preserve, "how strongly the background is held to the plain model's"),
    )
    for name, kind, default, text in numbers:
        one.add_argument(name, type=kind, default=default, help=f"{text} (default: %(default)s)")
    one.add_argument("--no-flip", action="store_true", help="leave mirrored pictures out: left and right matter")
    one.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="of the file; float32 can be trained further"
    )
    one.add_argument("--resume", type=Path, metavar="FILE", help="a residual in float32 to train further")
    return one


def from_arguments(given: argparse.Namespace) -> Command:
    """Raises ValueError for options that make no sense."""
    options = TrainingOptions(
        steps=given.steps,
        learning_rate=given.learning_rate,
        batch_size=given.batch,
        seed=given.seed,
        flip=not given.no_flip,
        preserve=given.preserve,
        capacity=given.capacity,
    )
    return Command(given.images, given.noun.strip(), given.out, options, given.precision, given.resume)


def check(command: Command) -> Residual | None:
    """Find out before anything takes long what would make it worthless. Returns the residual to train further.

    Raises NounError, PictureError and ResidualError, which say what to do.
    """
    if not any(letter.isalnum() for letter in command.noun):
        raise NounError(f"--noun {command.noun!r}: give the class of what the pictures show, such as cat")
    for prompt in NOUN_PROMPTS:
        noun_rows(prompt.format(command.noun), command.noun)
    out = command.out
    if out.suffix != SUFFIX:
        raise ResidualError(f"--out {out}: give it a name that ends in {SUFFIX}")
    if out.exists():
        raise ResidualError(f"--out {out}: there is such a file already. Give another name, or remove it")
    picture_paths(command.images)
    resume = None if command.resume is None else load_residual(command.resume)
    if resume is not None and resume.steps >= command.options.steps:
        raise ResidualError(
            f"--resume {command.resume}: it has {resume.steps} steps already, and --steps {command.options.steps} "
            "counts from the first: raise it to train further"
        )
    try:
        try_writing(out, _BYTES)
    except OSError as problem:
        raise ResidualError(f"--out {out}: nothing can be saved there: {why_not_written(problem)}") from problem
    return resume


def run(command: Command, model: Pipeline, say: Say = print, resume: Residual | None = None) -> Report:
    """Train and write the residual, as Residual Trainer writes it. resume: what `check` returned.

    Until then what has been learned is in training_<digits>.safetensors beside it, from which the same command
    goes on. Raises KeyboardInterrupt after an interrupt, when it is there.
    """
    concept = own_concept(command.images, command.noun, model.size)
    say(f"learning {command.noun!r} from {concept.about} on {model.base}")
    warning = None if resume is None else other_base(resume.noun, resume.origin, weights_sample(model))
    if warning is not None:
        say(f"warning: {warning}")
    trained = train(model, concept, command.options, say, command.out.parent, resume)
    try:
        saved = save_residual(trained.residual, command.out, command.precision, overwrite=False)
    except (ResidualError, NameTaken) as problem:
        why = f"Another program has made '{command.out}' meanwhile." if isinstance(problem, NameTaken) else problem
        raise ResidualError(
            f"{why} What has been learned is in "
            f"{trained.partial.path}, which Residual Loader reads too. Give another --out in the same folder, and the "
            "command ends there at once."
        ) from problem
    trained.partial.discard()
    return {
        "residual": str(saved.path),
        "bytes": saved.size,
        "noun": command.noun,
        "base": trained.residual.origin.base,
        "base_hash": trained.residual.origin.base_hash,
        "pictures": len(concept.pictures),
        "steps": trained.residual.steps,
        **{name: value for name, value in trained.found().items() if name != "trained_steps"},
        "seconds": round(trained.seconds, 1),
        "loss": round(sum(trained.losses[-REPORT_EVERY:]) / max(1, len(trained.losses[-REPORT_EVERY:])), 5),
    }
