"""The command line: `python -m profusion` with demo, promptnet train or score."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from . import demo
from .problems import Explained, known, printable
from .residual.training import TrainingOptions
from .toybox import concepts, world
from .toybox import score_command as score
from .toybox import train_command as promptnet

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
    one.add_argument("--noun", choices=world.NOUNS, help="what the pictures in --images show")
    one.add_argument("--steps", type=int, default=demo.OPTIONS.steps, help="training steps (default: %(default)s)")
    one.add_argument(
        "--learning-rate", type=float, default=demo.OPTIONS.learning_rate, help="AdamW's (default: %(default)s)"
    )
    one.add_argument("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    one.set_defaults(prepare=_demo)
    promptnet.add_to(commands).set_defaults(prepare=_promptnet)
    score.add_to(commands).set_defaults(prepare=_score)
    return top


def _demo(options: argparse.Namespace) -> Work:
    training = TrainingOptions(steps=options.steps, learning_rate=options.learning_rate, seed=options.seed)

    def work() -> int:
        if options.images is None:
            concept = concepts.drawn_concept(options.concept)
        else:
            concept = concepts.own_concept(options.images, options.noun)
        print(json.dumps(demo.run(options.out, concept, training), indent=2))
        print(f"\nLook at {options.out / 'grid.png'}")
        return 0

    return work


def _promptnet(options: argparse.Namespace) -> Work:
    command = promptnet.from_arguments(options)

    def work() -> int:
        try:
            report = promptnet.run(command)
        except KeyboardInterrupt:
            print("profusion: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
            return 130
        print(json.dumps(report, indent=2))
        return 0

    return work


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
    if options.command == "demo" and (options.images is None) != (options.noun is None):
        command_line.error("--images and --noun go together: whose pictures, and what is in them")
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


def _failed(message: str) -> int:
    print(f"profusion: {printable(message)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
