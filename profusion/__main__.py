"""The command line: `python -m profusion` with demo, promptnet train or score."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import checkpoint_demo, demo
from .learning import Report, own_concept
from .pretraining import arguments, plan
from .pretraining import command as pretraining
from .pretraining.command import silent
from .pretraining.material import on_checkpoint, sizes_of
from .pretraining.ranks import joined
from .problems import Explained, known, printable
from .residual.training import TrainingOptions
from .stable_diffusion import StableDiffusion
from .toybox import concepts, world
from .toybox import score_command as score
from .toybox.pipeline import SIZE
from .toybox.pretraining import on_toybox, toybox_sizes

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
    one.add_argument(
        "--checkpoint", type=Path, help="draw with this checkpoint of SD 1.x, SD 2.x or SDXL in place of Toybox"
    )
    one.add_argument("--size", type=int, help="pictures' side in pixels with --checkpoint (default: its family's)")
    one.add_argument("--device", default="cpu", help="of --checkpoint, such as cuda (default: %(default)s)")
    one.add_argument("--steps", type=int, default=400, help="training steps (default: %(default)s)")
    one.add_argument("--learning-rate", type=float, default=0.01, help="AdamW's (default: %(default)s)")
    one.add_argument("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    one.set_defaults(prepare=_demo)
    arguments.add_to(commands).set_defaults(prepare=_promptnet)
    score.add_to(commands).set_defaults(prepare=_score)
    return top


def _demo(options: argparse.Namespace) -> Work:
    training = TrainingOptions(steps=options.steps, learning_rate=options.learning_rate, seed=options.seed)

    def work() -> int:
        try:
            report = _on_toybox(options, training) if options.checkpoint is None else _on_checkpoint(options, training)
        except KeyboardInterrupt:
            print("profusion: interrupted; the same command goes on from what it last kept", file=sys.stderr)
            return 130
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
    model = StableDiffusion.load(options.checkpoint, options.size).to(options.device)
    concept = own_concept(options.images, options.noun, model.size)
    return checkpoint_demo.run(options.out, model, concept, training)


def _promptnet(options: argparse.Namespace) -> Work:
    command, data = arguments.command_of(options), arguments.data_of(options)
    checkpoint, tower = options.checkpoint, options.clip_vision

    def planned() -> int:
        sizes = toybox_sizes(command) if checkpoint is None else sizes_of(command, data, checkpoint, tower)
        world = options.cards or max(1, int(os.environ.get("WORLD_SIZE", "1")))
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
            say = print if ranks.first else silent
            try:
                if checkpoint is None:
                    material = on_toybox(command, data, ranks, say)
                else:
                    material = on_checkpoint(command, data, checkpoint, tower, ranks, say)
                report = pretraining.run(command, material, ranks, say)
            except KeyboardInterrupt:
                say("profusion: interrupted; the same command goes on from the last checkpoint")
                return 130
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
    if options.command == "demo":
        _check_demo(command_line, options)
    try:
        work = options.prepare(options)
    except ValueError as error:
        return _failed(str(error))
    try:
        return work()
    except (Explained, OSError) as error:
        return _failed(str(error))
    except (RuntimeError, MemoryError, ValueError) as error:
        words = known(error)
        if words is None:
            raise
        return _failed(words)


def _check_demo(command_line: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program where the demo's options do not go together."""
    if (options.images is None) != (options.noun is None):
        command_line.error("--images and --noun go together: whose pictures, and what is in them")
    if options.checkpoint is None:
        if options.size is not None or options.device != "cpu":
            command_line.error("--size and --device go with --checkpoint")
        if options.noun is not None and options.noun not in world.NOUNS:
            command_line.error(f"--noun {options.noun!r}: Toybox knows {', '.join(world.NOUNS)}")
    elif options.images is None:
        command_line.error("--checkpoint needs --images and --noun: it knows nothing of Toybox's concepts")
    elif not _is_here(options.device):
        command_line.error(f"--device {options.device}: there is no such device here; leave it out for the CPU")


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
