"""`python -m profusion draw`: a prompt's plain pictures, and beside them those with what residuals have learned."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import __version__
from .files import try_writing, why_not_written
from .keeping import digest
from .learning import REPORT_SECONDS, Say, weights_sample
from .pipeline import STEPS, Pipeline, context_length, places, seeded
from .problems import Explained
from .residual import Residual, load_residual
from .residual.origin import other_base
from .stamped import SUFFIX, How, made_before, save_stamped

PLAIN, CUSTOMISED = "plain", "customised"
_LONGEST = 80  # bytes of a prompt in a file's name
_MOST_SEED = 2**64 - 1
_BYTES = 1 << 22  # at least so many have to be free


class DrawError(Explained, ValueError):
    """Pictures that cannot be drawn as asked. The message says why and what to do."""


@dataclass(frozen=True)
class Command:
    """What was asked for. out: a folder, or one PNG for all pictures. cfg: None for the model's own. Raises DrawError
    for what makes no sense."""

    prompt: str
    out: Path
    residuals: tuple[Path, ...] = ()
    strengths: tuple[float, ...] = (1.0,)
    negative: str = ""
    seeds: tuple[int, ...] = (1,)
    steps: int = STEPS
    cfg: float | None = None
    shared_latent: bool = False

    def __post_init__(self) -> None:
        if len(self.strengths) not in (1, len(self.residuals)):
            raise DrawError(
                f"--strength has {len(self.strengths)} numbers for {len(self.residuals)} residuals: give one for each, "
                "or one for all"
            )
        if not all(map(math.isfinite, self.strengths)):
            raise DrawError("--strength must be finite: 1 is usual, 0 leaves a concept out")
        if not all(0 <= seed <= _MOST_SEED for seed in self.seeds):
            raise DrawError(f"--seeds must lie in 0 to {_MOST_SEED}")
        if not 1 <= self.steps <= 1000:
            raise DrawError(f"--steps {self.steps}: give 1 to 1000; 20 to 50 is usual")
        if self.cfg is not None and not 0 <= self.cfg <= 100:
            raise DrawError(f"--cfg {self.cfg} must lie in [0, 100]; 6 to 8 is usual for Stable Diffusion")
        if self.shared_latent and not self.residuals:
            raise DrawError("--shared-latent goes with --residual: without one there is only the plain picture")

    @property
    def strength_of_each(self) -> tuple[float, ...]:
        """One strength for each residual."""
        count = len(self.residuals)
        return self.strengths if len(self.strengths) == count else self.strengths[:1] * count

    @property
    def one_file(self) -> bool:
        """Whether all pictures go into one file."""
        return self.out.suffix.lower() == SUFFIX


def add_to(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Declare the command."""
    one = commands.add_parser("draw", help="draw a prompt, plain and with residuals in it")
    one.add_argument(
        "--prompt", required=True, help="may be long, and have weights such as (red:1.2), as in ComfyUI's text boxes"
    )
    one.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR_OR_PNG",
        help=f"a folder for a PNG of each seed, with residuals for {PLAIN}/ and {CUSTOMISED}/; or one PNG, plain above",
    )
    one.add_argument(
        "--residual",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="concepts at their nouns, which the prompt must have; several of one noun take its places in order",
    )
    one.add_argument(
        "--strength",
        type=float,
        nargs="+",
        action="extend",
        metavar="X",
        help="of all residuals, or of each (default: 1)",
    )
    one.add_argument("--negative", default="", help="what should not be in the pictures")
    one.add_argument(
        "--seeds", type=int, nargs="+", default=[1], help="a picture of each, from KSampler's noise (default: 1)"
    )
    one.add_argument("--steps", type=int, default=STEPS, help="of sampling, Euler's (default: %(default)s)")
    one.add_argument("--cfg", type=float, help="the scale of guidance (default: the model's)")
    one.add_argument(
        "--shared-latent",
        action="store_true",
        help="draw with the layout that the plain model sees in the customised picture",
    )
    return one


def from_arguments(given: argparse.Namespace) -> Command:
    """Raises DrawError for options that make no sense."""
    return Command(
        given.prompt,
        given.out,
        tuple(given.residual),
        tuple(given.strength or [1.0]),
        given.negative,
        tuple(dict.fromkeys(given.seeds)),
        given.steps,
        given.cfg,
        given.shared_latent,
    )


def check(command: Command) -> list[Residual]:
    """Find out before anything takes long what would make it worthless. Returns the residuals.

    Raises DrawError, ResidualError, NounError and PromptError, which say what to do.
    """
    residuals = [load_residual(path) for path in command.residuals]
    places(command.prompt, [residual.noun for residual in residuals], [path.name for path in command.residuals])
    for text in (command.prompt, command.negative):
        context_length(text)  # raises what encoding would
    out = command.out
    if command.one_file and out.exists():
        raise DrawError(f"--out {out}: there is such a file already. Give another name, or remove it")
    if not command.one_file and out.exists() and not out.is_dir():
        raise DrawError(f"--out {out}: it is a file, and no folder; a name that ends in {SUFFIX} makes one picture")
    try:
        try_writing(out if command.one_file else out / f"0{SUFFIX}", _BYTES)
    except OSError as problem:
        raise DrawError(f"--out {out}: nothing can be saved there: {why_not_written(problem)}") from problem
    return residuals


def run(command: Command, model: Pipeline, residuals: Sequence[Residual], say: Say = print) -> list[Path]:
    """Draw and write; returns the files. residuals: what `check` returned.

    In a folder, a picture that is there already, made in the same way, is not drawn again: a command that was
    interrupted goes on. Raises ResidualError where a residual does not fit the model.
    """
    drawing = _Drawing(command, model, residuals, say)
    if command.one_file:
        return [drawing.sheet()]
    return [path for seed in command.seeds for path in drawing.files(seed)]


class _Drawing:
    """A command, the model and the residuals that it draws with, and who is told of it."""

    def __init__(self, command: Command, model: Pipeline, residuals: Sequence[Residual], say: Say):
        model.placements(command.prompt, residuals)
        self.command, self.model, self.residuals, self.say = command, model, residuals, say
        self.streams = (PLAIN, CUSTOMISED) if residuals else (PLAIN,)
        self.cfg = command.cfg
        if self.cfg is None:
            self.cfg = model.customised_guidance if residuals else model.guidance
        self.sample = weights_sample(model)
        for residual in residuals:
            warning = other_base(residual.noun, residual.origin, self.sample)
            if warning is not None:
                say(f"warning: {warning}")

    def files(self, seed: int) -> Iterator[Path]:
        """A file of each stream; nothing is drawn where all are there already, made in the same way."""
        how = {stream: self.how(stream) | {"seed": seed} for stream in self.streams}
        kept = {stream: made_before(self._names(stream, seed), how[stream]) for stream in self.streams}
        pictures = {} if all(kept.values()) else self.pictures(seed)
        for stream, path in kept.items():
            already = " is there already" * (path is not None)
            path = path or _save(self._names(stream, seed), pictures[stream], how[stream])
            self.say(f"seed {seed}: {path}{already}")
            yield path

    def sheet(self) -> Path:
        """All pictures in one file: a column for each seed, the customised ones under the plain ones."""
        columns = []
        for seed in self.command.seeds:
            columns.append(torch.cat(list(self.pictures(seed).values())))
            self.say(f"seed {seed} is drawn")
        how = {**self.how(self.streams[-1]), "seeds": list(self.command.seeds), "stream": list(self.streams)}
        out = self.command.out
        path = _save(itertools.chain([out], _numbered(out)), torch.cat(columns, dim=1), how)  # may be taken meanwhile
        self.say(str(path))
        return path

    def pictures(self, seed: int) -> dict[str, Tensor]:
        """The pictures (size, size, 3) of one seed, by their streams."""
        command, model, started = self.command, self.model, [time.monotonic()]

        def tell(step: int, _: Tensor) -> None:
            if time.monotonic() - started[-1] > REPORT_SECONDS:
                started.append(time.monotonic())
                self.say(f"seed {seed}: step {step + 1}/{command.steps}")

        terms = {"steps": command.steps, "guidance": self.cfg, "callback": tell, "negative": command.negative}
        if self.residuals:
            placed = {"strength": command.strength_of_each, "shared_latent": command.shared_latent}
            latents = model.generate_customised(command.prompt, self.residuals, seeded(seed), **placed, **terms)
        else:
            latents = [model.generate([command.prompt], seeded(seed), **terms)]
        return {stream: model.pictures(latent)[0] for stream, latent in zip(self.streams, latents, strict=True)}

    def how(self, stream: str) -> How:
        """How a stream's pictures are made, but for their seeds.

        The plain ones have nothing of the residuals, unless they are what the plain model sees in the others.
        """
        command, shared = self.command, self.command.shared_latent
        used = self.residuals if stream == CUSTOMISED or shared else ()
        placed = list(zip(command.residuals, used, command.strength_of_each, strict=True)) if used else []
        return {
            "prompt": command.prompt,
            "negative": command.negative,
            "steps": command.steps,
            "cfg": self.cfg,
            "sampler": "euler",
            "scheduler": "simple",
            "size": [self.model.size, self.model.size],
            "base": self.model.base,
            "base_sample": self.sample.numbers,
            "precision": str(next(self.model.unet.parameters()).dtype).removeprefix("torch."),
            "stream": stream,
            "shared_latent": shared,
            "residuals": [
                {"file": path.name, "noun": one.noun, "strength": strength, "digest": digest(*one.numbers())}
                for path, one, strength in placed
            ],
            "profusion": __version__,
        }

    def _names(self, stream: str, seed: int) -> Iterator[Path]:
        """The paths that a picture may have; its own is the first that no other one has."""
        words = re.sub(r"\W+", "_", self.command.prompt).strip("_")
        stem = words.encode()[:_LONGEST].decode(errors="ignore") or "picture"
        folder = self.command.out / stream if self.residuals else self.command.out
        path = folder / f"{stem}_seed_{seed}{SUFFIX}"
        return itertools.chain([path], _numbered(path))


def _numbered(path: Path) -> Iterator[Path]:
    return (path.with_stem(f"{path.stem}_{number}") for number in itertools.count(2))


def _save(names: Iterator[Path], picture: Tensor, how: How) -> Path:
    try:
        return save_stamped(names, picture, how)
    except OSError as problem:
        raise DrawError(f"A picture could not be saved: {why_not_written(problem)}") from problem
