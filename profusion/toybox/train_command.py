"""`python -m profusion promptnet train`: one command from pictures to a PromptNet, resumable at any moment."""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..keeping import Partial
from ..pictures import grid
from ..promptnet.file import SUFFIX, load_promptnet, save_promptnet
from ..promptnet.network import PromptNet, PromptNetConfig, PromptNetError
from ..promptnet.training import PictureSet, PromptNetOptions, PromptNetTraining
from . import world
from .configs import TOYBOX_PROMPTNET
from .fused import FusedToybox
from .picture_sets import Say, toybox_pictures
from .pipeline import Toybox
from .promptnet import new_promptnet, toybox_training

KEPT = 64  # most pictures that are kept from training, to see whether it helps with new ones
REPORT_EVERY = 50
SHOWN, SHEET_STEPS = 8, 20


@dataclass(frozen=True)
class Command:
    """What was asked for. data: "toybox", or a folder of pictures. pictures: how many to draw."""

    data: str
    out: Path
    options: PromptNetOptions
    pictures: int = 12000
    noun: str | None = None
    start: Path | None = None
    with_noise: bool = False
    tokens: int = TOYBOX_PROMPTNET.tokens
    save_every: int = 250
    device: str = "cpu"
    bfloat16: bool = False
    minutes: float | None = None
    sheet_every: int = 2000

    def __post_init__(self) -> None:
        if self.out.suffix != SUFFIX:
            raise ValueError(f"--out {self.out}: give it a name that ends in {SUFFIX}")
        if min(self.pictures, self.tokens, self.save_every, self.sheet_every) < 1:
            raise ValueError("--pictures, --tokens, --save-every and --sheet-every must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes {self.minutes}: give a time above 0, or leave it out to train to the end")
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"--device {self.device}: there is no such device here; leave it out to train on the CPU"
            ) from error

    @property
    def checkpoint(self) -> Path:
        """What the training goes on from."""
        return self.out.with_suffix(f".training{SUFFIX}")

    @property
    def cache(self) -> Path:
        """Where the encoded pictures are kept."""
        return self.out.with_suffix(f".pictures{SUFFIX}")


def sheet(command: Command, name: str) -> Path:
    """Where to look at what S* draws."""
    return command.out.with_suffix(".sheets") / f"{name}.png"


def add_to(commands) -> argparse.ArgumentParser:
    """The command line: `promptnet train`, under an argparse parser's sub-commands. Returns its parser."""
    promptnet = commands.add_parser("promptnet", help="PromptNet, which turns one picture into a word S*")
    train = promptnet.add_subparsers(dest="action", required=True).add_parser(
        "train", help="train Toybox's PromptNet on pictures alone; run it again to go on after an interrupt"
    )
    train.add_argument("--data", default="toybox", help="a folder of pictures, or 'toybox' to draw them (default)")
    train.add_argument(
        "--out", type=Path, required=True, help=f"file to write, {SUFFIX}; its checkpoint is put beside it"
    )
    numbers = (
        ("--pictures", int, 12000, "how many to draw"),
        ("--steps", int, 6000, "training steps, those of a resumed run included"),
        ("--batch", int, 16, "pictures a step"),
        ("--learning-rate", float, 3e-4, "AdamW's highest"),
        ("--warmup", int, 100, "steps over which the learning rate rises"),
        ("--weight-cap", float, 20.0, "rows weigh min(1 / alpha_bar, this); 1 is the paper's loss"),
        (
            "--level-bias",
            float,
            0.0,
            "draws noise level k in proportion to k^this; more is better at what a thing is, not how it shines",
        ),
        ("--tokens", int, TOYBOX_PROMPTNET.tokens, "pseudo-words in S*"),
        ("--save-every", int, 250, "steps between checkpoints"),
        ("--sheet-every", int, 2000, "steps between sheets of pictures that S* draws"),
        ("--seed", int, 0, "of the pictures, the network and the training"),
    )
    for name, kind, default, text in numbers:
        train.add_argument(name, type=kind, default=default, help=f"{text} (default: %(default)s)")
    train.add_argument(
        "--noun", choices=world.NOUNS, help="the word that S* starts as (default: the mean of all words)"
    )
    train.add_argument(
        "--start", type=Path, help="a PromptNet of the same sizes to begin from (default: the UNet's encoder)"
    )
    train.add_argument("--with-noise", action="store_true", help="S* also looks at the latent being denoised")
    train.add_argument("--constant", action="store_true", help="keep the learning rate; default is half a cosine")
    train.add_argument("--device", default="cpu", help="of torch, such as cuda (default: %(default)s)")
    train.add_argument(
        "--bf16", action="store_true", dest="bfloat16", help="in bfloat16: for accelerators, on a CPU it does not pay"
    )
    train.add_argument("--minutes", type=float, help="stop after so many; run it again to go on")
    return train


def from_arguments(given: argparse.Namespace) -> Command:
    """The command of parsed arguments. Raises ValueError, which names the argument."""
    options = PromptNetOptions(
        steps=given.steps,
        learning_rate=given.learning_rate,
        batch_size=given.batch,
        seed=given.seed,
        warmup=given.warmup,
        cosine=not given.constant,
        weight_cap=given.weight_cap,
        level_bias=given.level_bias,
    )
    more = {
        name: getattr(given, name)
        for name in ("noun", "start", "with_noise", "tokens", "save_every", "sheet_every", "device", "pictures")
    }
    more |= {"bfloat16": given.bfloat16, "minutes": given.minutes}
    return Command(given.data, given.out, options, **more)


def run(command: Command, toybox: Toybox | None = None, say: Say = print) -> dict[str, object]:
    """Train, saving a checkpoint every so many steps and seconds, at Ctrl-C or SIGTERM, and when the minutes are over;
    where there is one already, go on from it.

    Writes the PromptNet in float16 at the end, and returns what to report of it; of a run whose minutes were over, how
    far it got.
    """
    toybox = toybox or Toybox.load()
    seed = command.options.seed
    pictures = toybox_pictures(toybox, command.data, command.pictures, seed, command.cache, say)
    pictures, kept = _split(pictures)
    config = replace(TOYBOX_PROMPTNET, tokens=command.tokens, second_latent="noisy" if command.with_noise else "none")
    network = new_promptnet(toybox, config, command.noun, seed)
    if command.start is not None:
        network.load_state_dict(_begun(command.start, config).state_dict())
    network = network.to(command.device)
    for module in (toybox.unet, toybox.text):
        module.to(command.device)
    training = toybox_training(toybox, network, pictures, command.options, command.bfloat16)
    if command.checkpoint.is_file():
        training.resume(command.checkpoint, same_start=True)
        say(f"going on from step {training.step} of {command.checkpoint}")
    shown = pictures if kept is None else kept
    seconds = _train(command, training, kept, lambda name: say(_look(command, toybox, network, shown, name)), say)
    if training.step < command.options.steps:
        say("the minutes are over; the same command goes on from here")
        return {"checkpoint": str(command.checkpoint), "steps": training.step, "seconds": round(seconds, 1)}
    notes = {"data": command.data, "pictures": pictures.fingerprint(), "steps": str(training.step), "seed": str(seed)}
    size = save_promptnet(network.cpu(), command.out, notes=notes)
    return {
        "promptnet": str(command.out),
        "bytes": size,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "pictures": len(pictures),
        "steps": training.step,
        "seconds": round(seconds, 1),
        "loss": round(training.mean_loss(REPORT_EVERY), 5),
    }


def _begun(path: Path, config: PromptNetConfig) -> PromptNet:
    """The PromptNet to begin from. Raises PromptNetError where it is of other sizes."""
    network = load_promptnet(path)
    if network.config != config:
        raise PromptNetError(f"--start {path}: its sizes are {network.config}, and these are to be trained: {config}")
    return network


def _split(pictures: PictureSet) -> tuple[PictureSet, PictureSet | None]:
    """Those to train on, and the last tenth or KEPT of them, if that is any, to check with."""
    kept = min(KEPT, len(pictures) // 10)
    if not kept:
        return pictures, None
    first = PictureSet(pictures.latents[:-kept], pictures.image_tokens[:-kept])
    return first, PictureSet(pictures.latents[-kept:], pictures.image_tokens[-kept:])


@torch.no_grad()
def _look(command: Command, toybox: Toybox, network: PromptNet, pictures: PictureSet, name: str) -> str:
    """Write a sheet of up to SHOWN pictures, and under each what its S* alone draws; says where it is."""
    if network.config.with_noise:
        return "no sheet: this S* depends on the latent being drawn, and only Fusion KSampler draws with it"
    some = PictureSet(pictures.latents[:SHOWN], pictures.image_tokens[:SHOWN])
    for module in (toybox.vae, network):
        module.to(command.device)
    drawn = FusedToybox(toybox, network).drawn_alone(some, SHEET_STEPS)
    rows = [toybox.vae.pictures(latents.to(command.device)).cpu() for latents in (some.latents, drawn)]
    path = sheet(command, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    captions = [str(number) for number in range(1, len(some) + 1)]
    grid([("picture", list(rows[0])), ("S* alone", list(rows[1]))], captions).save(path)
    return f"look at {path}"


def _train(
    command: Command,
    training: PromptNetTraining,
    kept: PictureSet | None,
    look: Callable[[str], None],
    say: Say,
) -> float:
    """The seconds that the rest of a training took, or what of it there was time for. Raises KeyboardInterrupt after an
    interrupted step, when it is saved."""
    started, first = time.monotonic(), training.step
    partial = Partial(lambda: _checkpoint(command, training))
    with _interrupts() as interrupts:
        for _ in training.steps(partial):
            last = training.step == training.options.steps
            late = command.minutes is not None and time.monotonic() - started > 60 * command.minutes
            if training.step % REPORT_EVERY == 0 or last:
                say(_progress(training, (time.monotonic() - started) / (training.step - first)))
            if training.step % command.save_every == 0 or last or late or interrupts:
                say(f"saved {partial.save()} at step {training.step}")
            if interrupts and not last:
                raise KeyboardInterrupt
            if training.step % command.save_every == 0 or last:
                say(_check(training, kept))
            if training.step % command.sheet_every == 0 or last:
                look("finished" if last else f"{training.step:05}")
            if late and not last:
                break
    return time.monotonic() - started


def _checkpoint(command: Command, training: PromptNetTraining) -> Path:
    training.save(command.checkpoint)
    return command.checkpoint


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Gathers Ctrl-C and SIGTERM: in the middle of a step, half of the parameters would have moved."""
    gathered: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield gathered
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: gathered.append(number)) for number in numbers]
    try:
        yield gathered
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _progress(training: PromptNetTraining, pace: float) -> str:
    left = (training.options.steps - training.step) * pace / 60
    return (
        f"step {training.step}/{training.options.steps}  loss {training.mean_loss(REPORT_EVERY):.4f}  "
        f"{pace:.2f} s a step, {math.ceil(left)} min left"
    )


def _check(training: PromptNetTraining, kept: PictureSet | None) -> str:
    """Whether S* says more of a picture than one word for all pictures does."""
    what, pictures = ("training pictures", training.pictures) if kept is None else ("pictures kept from it", kept)
    word, start = training.loss_on(pictures), training.loss_on(pictures, word=training.network.start)
    return f"on {what} the loss is {word:.4f} with S* and {start:.4f} with the word it started as"
