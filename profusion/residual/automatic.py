"""How a residual is trained where nobody says how: steps, bound, masks and end, all measured against the model.

Everything is a share of something that the model itself has, so that one set of numbers serves models of any size:

    step    AdamW's, in units of the noun's own row: its root of the mean square, about 1 in the models known here
    bound   of each layer's residual, in units of the norm of the noun's own row
    loss    the error of C as a share of F's (`training.relative_residual_loss`)
    noise   all levels but the lowest: what is left to say there is how a surface looks from near, and of most
            noise, whatever is learned. Toybox's concepts are learned in half the steps so
    masks   where the model itself sees the noun in the pictures (`noun_map`)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .noun_map import Seen, look

__all__ = [
    "BOUND",
    "CHECK_EVERY",
    "CHECK_ROWS",
    "LEAST_NOISE",
    "STRANGE",
    "Seen",
    "bounded",
    "bounding",
    "look",
    "rate",
    "why_ended",
]

RATE, SLOWING = 0.1, 50  # of the first step; after three times as many steps it is half of that
BOUND = 0.8
LEAST_NOISE = 0.35  # of the timesteps: those below teach nothing
CHECK_EVERY, CHECK_ROWS = 25, 12  # steps; noisy pictures
PATIENCE, WORTHWHILE = 3, 0.01  # checks; of the plain model's error
STRANGE = 3.0  # times as much as of pictures that the model drew itself: what it misses of pictures far from its own


def rate(step: int) -> float:
    """AdamW's learning rate at a step, counted from 0, in units of the noun's own row.

    It falls with the root of the steps, whatever their number is to be: so a training that goes on further than it was
    to is that of one that was to from the start.
    """
    return RATE / math.sqrt(1 + step / SLOWING)


def bounded(delta: Tensor, row_size: float, strangeness: float | None = None) -> Tensor:
    """delta (layers, 1, D) whose rows are no longer than BOUND times the noun's own row; see `bounding`."""
    return delta * bounding(delta.norm(dim=-1, keepdim=True), row_size, delta.shape[-1], strangeness)


def bounding(lengths: Tensor, row_size: float, width: int, strangeness: float | None = None) -> Tensor:
    """What a residual has to be multiplied by in each layer, at most 1, so as to move the noun's row, of D = `width`
    numbers, by no more than BOUND of it.

    lengths (layers, 1, 1): how far it moves it now; with details, wherever it does most (`details.longest`). row_size:
    the root of the mean square of that row. What is longer drowns everything else that the prompt says.
    strangeness: how many times as much the model misses of the pictures as of its own (see `ResidualTraining`). Beyond
    STRANGE the bound falls with it: what is learned of pictures that the model cannot draw is how to leave its world.
    """
    most = BOUND * row_size * math.sqrt(width)
    if strangeness is not None:
        most *= min(1.0, STRANGE / max(round(strangeness, 1), 1e-6))  # the same where a device rounds otherwise
    return (most / lengths.clamp_min(1e-12)).clamp(max=1)


def why_ended(checks: Sequence[float], step: int | None = None) -> str:
    """Why a training need not go on, in words; empty while its checks still fall.

    checks: the loss after every CHECK_EVERY steps, as a share of what it was before the first. step: of the last of
    them, where there were steps before any check.
    """
    if len(checks) <= PATIENCE:
        return ""
    before, since = min(1.0, *checks[:-PATIENCE]), min(checks[-PATIENCE:])
    if since < before - WORTHWHILE:
        return ""
    last = step or len(checks) * CHECK_EVERY
    return (
        f"ended at step {last}: the loss has hardly fallen for {PATIENCE * CHECK_EVERY} steps. On the same noise it is "
        f"{checks[-1]:.0%} of the plain model's"
    )
