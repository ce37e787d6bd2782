"""`python -m profusion probe`: how much of each layer's attention a noun has, on Toybox or a checkpoint."""

from __future__ import annotations

import argparse

from .pipeline import STEPS, Pipeline, context_length, places, seeded
from .probing import report
from .problems import Explained


class ProbeError(Explained, ValueError):
    """A probe that was asked for and makes no sense."""


def add_to(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Declare the command."""
    one = commands.add_parser("probe", help="print how much of each layer's attention a noun has, where it is drawn")
    one.add_argument("--prompt", required=True, help="what is drawn meanwhile; it must have the noun")
    one.add_argument("--noun", required=True, help="the noun, as a residual has it")
    one.add_argument("--seed", type=int, default=1, help="of the picture, as KSampler's (default: %(default)s)")
    one.add_argument("--steps", type=int, default=STEPS, help="of sampling, Euler's (default: %(default)s)")
    one.add_argument("--cfg", type=float, help="the scale of guidance (default: the model's)")
    return one


def check(given: argparse.Namespace) -> None:
    """Raise ProbeError, NounError or PromptError, before a model is loaded, for what makes no sense."""
    if not 1 <= given.steps <= 1000:
        raise ProbeError(f"--steps {given.steps}: give 1 to 1000; a few show as much")
    if not 0 <= given.seed < 2**63:
        raise ProbeError(f"--seed {given.seed}: give 0 to {2**63 - 1}")
    places(given.prompt, [given.noun], ["--noun"])
    context_length(given.prompt)


def run(given: argparse.Namespace, model: Pipeline) -> str:
    """The table. The object is where the noun has most of the attention, all layers together."""
    shares = model.probe(given.prompt, given.noun, seeded(given.seed), given.steps, given.cfg)
    cells = model.size // model.cell
    return report(given.noun, shares.shares(shares.region((cells, cells))))
