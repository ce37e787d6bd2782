"""The command line of `promptnet train`: what can be asked for, and the command of what was."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..promptnet.file import SUFFIX
from .command import Command
from .engine import PretrainingOptions
from .plan import CARDS

TOYBOX = "toybox"
# By what is trained: Toybox's is small and learns from few pictures; the other is the paper's (section 3.1).
_DEFAULTS = {
    True: {
        "steps": 6000,
        "batch": 16,
        "learning_rate": 6e-4,
        "warmup": 100,
        "weight_cap": 20.0,
        "level_bias": 1.0,
        "ema": 0.999,
        "tokens": 4,
    },
    False: {
        "steps": 80000,
        "batch": 64,
        "learning_rate": 2e-5,
        "warmup": 500,
        "weight_cap": 1.0,
        "level_bias": 0.0,
        "ema": 0.0,
        "tokens": 1,
    },
}


@dataclass(frozen=True)
class Data:
    """Where pictures come from and how they are read. pictures: how many to draw, of Toybox. kept: so many are kept
    apart, or taken from kept_where. cache: a folder for what the encoders make of pictures, "" for none."""

    where: str
    pictures: int = 12000
    kept: int = 64
    crop: str = "center"
    workers: int = 2
    size: int | None = None
    cache: str = ""
    kept_where: str = ""


def add_to(commands) -> argparse.ArgumentParser:
    """`promptnet train`, under an argparse parser's sub-commands. Returns its parser."""
    promptnet = commands.add_parser("promptnet", help="PromptNet, which turns one picture into a word S*")
    train = promptnet.add_subparsers(dest="action", required=True).add_parser(
        "train",
        help="train a PromptNet on pictures alone; run it again to go on after an interrupt",
        description="Train a PromptNet on pictures alone, for Toybox or for a checkpoint of SD 1.x, SD 2.x or SDXL. "
        "Under torchrun or accelerate launch it uses all their processes. The same command goes on where one stopped.",
    )
    _add_model(train)
    _add_data(train)
    _add_training(train)
    _add_machine(train)
    return train


def _add_model(train: argparse.ArgumentParser) -> None:
    add = train.add_argument_group("what is trained").add_argument
    add("--out", type=Path, required=True, help=f"file to write, {SUFFIX}; checkpoints go into a folder beside it")
    add("--checkpoint", type=Path, help="the base: SD 1.x, SD 2.x or SDXL in one file (default: Toybox)")
    add("--clip-vision", type=Path, help="CLIP's image tower, ViT-L/14 or ViT-H/14; goes with --checkpoint")
    add("--tokens", type=int, help="pseudo-words in S* (default: 1, Toybox 4)")
    add("--with-noise", action="store_true", help="S* also looks at the latent being denoised, as the authors' does")
    add("--noun", help="the word that S* starts as (default: the mean of all words)")
    add("--start", type=Path, help="a PromptNet of the same sizes to begin from (default: the UNet's encoder)")
    add(
        "--layout",
        choices=("profusion", "authors"),
        default="profusion",
        help="authors: one that their released class reads, written in their layout too",
    )


def _add_data(train: argparse.ArgumentParser) -> None:
    add = train.add_argument_group("pictures").add_argument
    add(
        "--data",
        default=TOYBOX,
        help="a folder, tar shards such as 'DIR/{0000..0099}.tar', 'pipe:COMMAND' that writes such shards, or 'toybox' "
        "to draw them (default)",
    )
    add("--pictures", type=int, default=12000, help="how many to draw of Toybox (default: %(default)s)")
    add("--validation", type=int, default=64, help="pictures kept apart to check with (default: %(default)s)")
    add("--validation-data", default="", help="where those are instead: a folder or tar shards")
    add("--size", type=int, help="pixels a side (default: the base's own)")
    add("--crop", choices=("center", "random"), default="center", help="which square (default: %(default)s)")
    add("--workers", type=int, default=2, help="processes that read pictures, for each card (default: %(default)s)")
    add("--cache", default="", help="a folder for encoded pictures, which are then encoded once and not in every step")


def _add_training(train: argparse.ArgumentParser) -> None:
    add = train.add_argument_group("training").add_argument
    add("--steps", type=int, help="those of a resumed run included (default: 80000, Toybox 6000)")
    add("--batch", type=int, help="pictures a step, of all processes together (default: 64, Toybox 16)")
    add("--micro", type=int, default=0, help="of them at once on one card; the rest in turns (default: all)")
    add("--learning-rate", type=float, help="AdamW's highest (default: 2e-5, Toybox 6e-4)")
    add("--warmup", type=int, help="steps over which it rises (default: 500, Toybox 100)")
    add("--constant", action="store_true", help="keep the learning rate; default is half a cosine")
    add("--weight-decay", type=float, default=0.0, help="AdamW's (default: %(default)s)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default: %(default)s)")
    add(
        "--ema",
        type=float,
        help="share kept of the average of all steps, such as 0.9999 (default: 0, none; Toybox 0.999)",
    )
    add("--weight-cap", type=float, help="rows weigh min(1 / alpha_bar, this); 1, the default, is the paper's loss")
    add("--level-bias", type=float, help="draws noise level k in proportion to k^this (default: 0, Toybox 1)")
    add("--seed", type=int, default=0, help="of the pictures, the network and the training (default: %(default)s)")
    add("--minutes", type=float, help="stop after so many; run it again to go on")
    for name, value, what in (
        ("--report-every", 50, "steps between lines"),
        ("--save-every", 1000, "steps between checkpoints"),
        ("--validate-every", 1000, "steps between checks with the pictures kept apart"),
        ("--sheet-every", 2000, "steps between sheets of pictures that S* draws"),
        ("--keep", 3, "checkpoints to keep, beside the best"),
    ):
        add(name, type=int, default=value, help=f"{what} (default: %(default)s)")


def _add_machine(train: argparse.ArgumentParser) -> None:
    add = train.add_argument_group("machine").add_argument
    add("--device", default="cpu", help="of torch, such as cuda (default: %(default)s)")
    add("--bf16", action="store_true", dest="bfloat16", help="in bfloat16: for accelerators; on a CPU it does not pay")
    add("--gradient-checkpointing", action="store_true", help="less memory for a third more time")
    add("--shard", action="store_true", help="cut weights, gradients and moments between the cards (FSDP)")
    add("--plan", action="store_true", help="print what it takes, memory, days and price, and run nothing")
    add("--cards", type=int, default=1, help="how many, for the plan (default: %(default)s)")
    add("--card", nargs="+", choices=list(CARDS), default=list(CARDS), help="kinds of cards in the plan")
    add("--price", type=float, help="of one card and hour, in any currency, for the plan")
    add("--samples-a-second", type=float, help="measured, of all cards together, for the plan")


def command_of(given: argparse.Namespace) -> Command:
    """The command of parsed arguments. Raises ValueError, which names the argument."""
    defaults = _DEFAULTS[given.checkpoint is None]
    asked = {name: getattr(given, name) for name in defaults}
    chosen = {name: defaults[name] if value is None else value for name, value in asked.items()}
    if given.layout == "authors" and given.tokens is None:
        chosen["tokens"] = 1
    if given.layout == "authors" and chosen["tokens"] > 1:
        raise ValueError("--layout authors makes one word: leave --tokens at 1, or leave the layout out")
    if given.start is not None and given.noun is not None:
        raise ValueError("--start begins from another PromptNet's word, and --noun from its own: give one of them")
    if given.out.is_dir():
        raise ValueError(f"--out {given.out} is a folder: give another name")
    options = PretrainingOptions(
        steps=chosen["steps"],
        learning_rate=chosen["learning_rate"],
        batch_size=chosen["batch"],
        seed=given.seed,
        warmup=chosen["warmup"],
        cosine=not given.constant,
        clip=given.clip,
        weight_cap=chosen["weight_cap"],
        level_bias=chosen["level_bias"],
        micro=given.micro,
        ema=chosen["ema"],
        weight_decay=given.weight_decay,
    )
    same = ("out", "noun", "start", "with_noise", "layout", "bfloat16", "shard", "minutes")
    same += ("report_every", "save_every", "validate_every", "sheet_every", "keep")
    return Command(
        options=options,
        tokens=chosen["tokens"],
        checkpointing=given.gradient_checkpointing,
        **{name: getattr(given, name) for name in same},
    )


def data_of(given: argparse.Namespace) -> Data:
    """The pictures of parsed arguments. Raises ValueError, which names the argument."""
    if (given.checkpoint is None) != (given.clip_vision is None):
        raise ValueError("--checkpoint and --clip-vision go together: the base, and the image tower S* is made with")
    if given.checkpoint is not None and given.data == TOYBOX and not given.plan:
        raise ValueError("--data: say where the pictures are, a folder or tar shards")
    if given.pictures < 1 or given.validation < 1 or given.workers < 0:
        raise ValueError("--pictures and --validation must be at least 1, and --workers not negative")
    if given.cache and given.crop == "random":
        raise ValueError("--cache keeps one square of each picture, and --crop random draws another each time")
    if given.checkpoint is None and given.size is not None:
        raise ValueError("--size goes with --checkpoint: Toybox has one size")
    return Data(
        given.data,
        given.pictures,
        given.validation,
        given.crop,
        given.workers,
        given.size,
        given.cache,
        given.validation_data,
    )
