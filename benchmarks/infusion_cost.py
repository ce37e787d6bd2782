"""What Infusion costs: seconds per picture against plain sampling, for one to four concepts, and per training step.

`python -m benchmarks.infusion_cost [--rounds 7] [--out FILE]`. Everything runs interleaved in one process; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import interleaved
from profusion.infusion import architecture_name, cross_attention_layers
from profusion.residual import Residual
from profusion.toybox.pipeline import Toybox, seeded
from profusion.training import TrainingOptions

NOUNS = ("ball", "star", "cup", "cat")
PROMPT = "a photo of a ball and a star and a cup and a cat on grass"
STEPS = 8


def measure(rounds: int) -> dict[str, float]:
    toybox = Toybox.load()
    layers = cross_attention_layers(dict(toybox.unet.named_parameters()))
    names, generator = tuple(layer.name for layer in layers), torch.Generator().manual_seed(0)
    residuals = [
        Residual(torch.randn(len(layers), 1, layers[0].context_dim, generator=generator), noun, names, architecture_name(layers))
        for noun in NOUNS
    ]
    tasks: dict[str, Callable[[], object]] = {"plain": lambda: toybox.generate([PROMPT], seeded(0), steps=STEPS)}
    for count in (1, 2, 4):
        chosen = residuals[:count]
        tasks[f"infusion, {count} concepts"] = lambda chosen=chosen: toybox.generate_customised(
            PROMPT, chosen, seeded(0), steps=STEPS
        )
    training = toybox.training(torch.rand(2, 96, 96, 3), torch.ones(2, 96, 96), "ball", TrainingOptions(steps=10**6))
    steps = training.steps()
    tasks["training step (batch 4)"] = lambda: next(steps)
    return {name: statistics.median(values) for name, values in interleaved(tasks, rounds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the medians as JSON")
    arguments = parser.parse_args()
    medians = measure(arguments.rounds)
    for name, value in medians.items():
        print(f"{name:28s} {value:7.3f} s   {value / medians['plain']:5.2f} x plain")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(medians, indent=2) + "\n")


if __name__ == "__main__":
    main()
