"""The command line: `python -m profusion` with demo, residual train, draw, probe, promptnet train or score."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import checkpoint_demo, demo
from . import draw_command as draw
from . import probe_command as probe
from . import residual_command as residual
from .learning import Report, own_concept
from .pipeline import Pipeline
from .pretraining import arguments, plan
from .pretraining import command as pretraining
from .pretraining.command import silent
from .pretraining.engine import rounds
from .pretraining.material import on_checkpoint, sizes_of
from .pretraining.ranks import joined
from .problems import Explained, known, printable
from .residual.training import TrainingOptions
from .stable_diffusion import StableDiffusion
from .toybox import concepts, world
from .toybox import score_command as score
from .toybox.pipeline import SIZE, Toybox
from .toybox.pretraining import on_toybox, toybox_sizes

_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Work = Callable[[], int]
"""What a command does once its options make sense; returns the exit status."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m profusion", description="Customised text-to-image, without a host.")
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("demo", help="draw a concept in new places on Toybox, by Infusion and by ProFusion")
    one.add_argument(
        "--out", type=Path, required=True, help="folder for grid.png, residual.safetensors and report.json"
    )
    one.add_argument(
        "--concept", choices=list(world.CONCEPTS), default=concepts.CONCEPT, help="a concept to be drawn and learned"
    )
    one.add_argument(
        "--images", type=Path, help="learn from the pictures in this folder instead; alpha is the object's mask"
    )
    one.add_argument(
        "--noun",
        help=f"what the pictures in --images show: any word with --checkpoint, else of {', '.join(world.NOUNS)}",
    )
    _add_model(one)
    one.add_argument("--steps", type=int, default=demo.OPTIONS.steps, help="training steps (default: %(default)s)")
    one.add_argument(
        "--learning-rate",
        type=float,
        default=demo.OPTIONS.learning_rate,
        help="AdamW's; 0: automatic, and then masks and an end are found (default: %(default)s)",
    )
    one.add_argument(
        "--capacity",
        type=int,
        default=demo.OPTIONS.capacity,
        help="of the residual; 1 is the paper's (default: %(default)s)",
    )
    one.add_argument("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    one.set_defaults(prepare=_demo)
    arguments.add_to(commands).set_defaults(prepare=_promptnet)
    for command, prepare in ((residual, _residual), (draw, _draw), (probe, _probe)):
        one = command.add_to(commands)
        _add_model(one)
        one.set_defaults(prepare=prepare)
    score.add_to(commands).set_defaults(prepare=_score)
    return top


def _add_model(command: argparse.ArgumentParser) -> None:
    """Declare what every command has that draws or trains on Toybox or on a checkpoint."""
    command.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="draw with this checkpoint of SD 1.x, SD 2.x or SDXL in place of Toybox",
    )
    command.add_argument("--size", type=int, help="pictures' side in pixels with --checkpoint (default: its family's)")
    command.add_argument("--device", default="cpu", help="of --checkpoint, such as cuda (default: %(default)s)")
    command.add_argument(
        "--dtype",
        choices=list(_TYPES),
        help="of the checkpoint's weights while it runs (default: float32 on the CPU, float16 elsewhere)",
    )


def _model(options: argparse.Namespace) -> Pipeline:
    """Toybox, or the checkpoint that was asked for. Raises CheckpointError and FileNotFoundError."""
    if options.checkpoint is None:
        return Toybox.load()
    usual = "float32" if torch.device(options.device).type == "cpu" else "float16"
    dtype = _TYPES[options.dtype or usual]
    return StableDiffusion.load(options.checkpoint, options.size, dtype).to(options.device)


def _demo(options: argparse.Namespace) -> Work:
    rate, capacity = options.learning_rate, options.capacity
    training = TrainingOptions(options.steps, rate, seed=options.seed, capacity=capacity)

    def work() -> int:
        report = _on_toybox(options, training) if options.checkpoint is None else _on_checkpoint(options, training)
        print(json.dumps(report, indent=2))
        print(f"\nLook at {options.out / 'grid.png'}")
        return 0

    return work


def _on_toybox(options: argparse.Namespace, training: TrainingOptions) -> Report:
    if options.images is None:
        concept = concepts.drawn_concept(options.concept)
    else:
        concept = own_concept(options.images, options.noun, SIZE)
    return demo.run(options.out, concept, training)


def _on_checkpoint(options: argparse.Namespace, training: TrainingOptions) -> Report:
    model = _model(options)
    concept = own_concept(options.images, options.noun, model.size)
    return checkpoint_demo.run(options.out, model, concept, training)


def _residual(options: argparse.Namespace) -> Work:
    command = residual.from_arguments(options)

    def work() -> int:
        resume = residual.check(command)
        print(json.dumps(residual.run(command, _model(options), resume=resume), indent=2))
        return 0

    return work


def _draw(options: argparse.Namespace) -> Work:
    command = draw.from_arguments(options)

    def work() -> int:
        residuals = draw.check(command)
        draw.run(command, _model(options), residuals)
        return 0

    return work


def _probe(options: argparse.Namespace) -> Work:
    def work() -> int:
        probe.check(options)
        print(probe.run(options, _model(options)))
        return 0

    return work


def _promptnet(options: argparse.Namespace) -> Work:
    command, data = arguments.command_of(options), arguments.data_of(options)
    checkpoint, tower = options.checkpoint, options.clip_vision

    def planned() -> int:
        sizes = toybox_sizes(command) if checkpoint is None else sizes_of(command, data, checkpoint, tower)
        world = options.cards
        found = plan.need(
            sizes,
            command.options,
            world,
            command.bfloat16,
            command.checkpointing,
            command.shard,
            encode=not data.cache,
        )
        cards = [plan.CARDS[name] for name in options.card]
        print(plan.report(found, command.options, cards, world, options.samples_a_second, options.price))
        return 0

    def work() -> int:
        with joined(options.device) as ranks:
            rounds(command.options, ranks.world)  # before a checkpoint is read for nothing
            say = print if ranks.first else silent
            if checkpoint is None:
                material = on_toybox(command, data, ranks, say)
            else:
                material = on_checkpoint(command, data, checkpoint, tower, ranks, say)
            report = pretraining.run(command, material, ranks, say)
            say(json.dumps(report, indent=2))
            return 0

    return planned if options.plan else work


def _score(options: argparse.Namespace) -> Work:
    def work() -> int:
        print(score.run(options).markdown())
        return 0

    return work


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 where it succeeded.

    What a user can mend is one line: options that make no sense, the kernel's own errors, files, memory. Any other
    error is a fault of this program or of a library, and keeps its traceback.
    """
    command_line = parser()
    options = command_line.parse_args(arguments)
    if "dtype" in options:  # declared by _add_model
        _check_model(command_line, options)
    if options.command == "demo":
        _check_demo(command_line, options)
    try:
        work = options.prepare(options)
    except ValueError as error:
        return _failed(str(error))
    try:
        return work()
    except KeyboardInterrupt:
        print("profusion: interrupted; the same command goes on from what it last kept", file=sys.stderr)
        return 130
    except (Explained, OSError) as error:
        return _failed(str(error))
    except (RuntimeError, MemoryError, ValueError) as error:
        words = known(error)
        if words is None:
            raise
        return _failed(words)


def _check_model(command_line: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program where the model's options do not go together, or with the noun."""
    if options.checkpoint is None:
        if options.size is not None or options.device != "cpu" or options.dtype is not None:
            command_line.error("--size, --device and --dtype go with --checkpoint")
        noun = getattr(options, "noun", None)
        if noun is not None and noun not in world.NOUNS:
            command_line.error(f"--noun {noun!r}: Toybox knows {', '.join(world.NOUNS)}")
    elif not _is_here(options.device):
        command_line.error(f"--device {options.device}: there is no such device here; leave it out for the CPU")


def _check_demo(command_line: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program where the demo's options do not go together."""
    if (options.images is None) != (options.noun is None):
        command_line.error("--images and --noun go together: whose pictures, and what is in them")
    if options.checkpoint is not None and options.images is None:
        command_line.error("--checkpoint needs --images and --noun: it knows nothing of Toybox's concepts")


def _is_here(device: str) -> bool:
    try:
        return torch.zeros(1, device=device).device.type != "meta"
    except (RuntimeError, AssertionError, NotImplementedError):  # torch's words for it differ by device
        return False


def _failed(message: str) -> int:
    print(f"profusion: {printable(message)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
