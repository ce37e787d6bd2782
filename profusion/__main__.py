"""`python -m profusion demo --out DIR [--images DIR --noun NOUN]`, `promptnet train --out FILE` and `score --images DIR ...`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import demo
from .loop import TrainingError
from .pictures import PictureError
from .prompt import NounError
from .promptnet import PromptNetError
from .residual import ResidualError
from .residual.training import TrainingOptions
from .toybox import concepts, world
from .toybox import score_command as score
from .toybox import train_command as promptnet


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
    one.add_argument("--steps", type=int, default=400, help="training steps (default: %(default)s)")
    one.add_argument("--learning-rate", type=float, default=0.01, help="AdamW's (default: %(default)s)")
    one.add_argument("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    one.set_defaults(run=_demo)
    promptnet.add_to(commands).set_defaults(run=_promptnet)
    score.add_to(commands).set_defaults(run=_score)
    return top


def _demo(options: argparse.Namespace) -> int:
    training = TrainingOptions(steps=options.steps, learning_rate=options.learning_rate, seed=options.seed)
    if options.images is None:
        concept = concepts.drawn_concept(options.concept)
    else:
        concept = concepts.own_concept(options.images, options.noun)
    print(json.dumps(demo.run(options.out, concept, training), indent=2))
    print(f"\nLook at {options.out / 'grid.png'}")
    return 0


def _promptnet(options: argparse.Namespace) -> int:
    try:
        report = promptnet.run(promptnet.from_arguments(options))
    except KeyboardInterrupt:
        print("profusion: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    print(json.dumps(report, indent=2))
    return 0


def _score(options: argparse.Namespace) -> int:
    print(score.run(options).markdown())
    return 0


def main(arguments: list[str] | None = None) -> int:
    command_line = parser()
    options = command_line.parse_args(arguments)
    if options.command == "demo" and (options.images is None) != (options.noun is None):
        command_line.error("--images and --noun go together: whose pictures, and what is in them")
    try:
        return options.run(options)
    except (PictureError, NounError, ResidualError, PromptNetError, TrainingError, ValueError, OSError) as error:
        print(f"profusion: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
