"""What a training step takes on a device, before it is tried: measured from shapes, see
benchmarks/training_memory.py."""

from __future__ import annotations

from typing import Any

# The most that a step takes beside the weights, in numbers of the model's type for each cell of the latents, without
# and with gradient checkpointing. In an attention that keeps its map it would be more.
_RESIDUAL = {"SD 1.x": (90_800, 30_000), "SD 2.x": (85_800, 25_000), "SDXL": (153_300, 21_500)}
# What a residual's first detail takes besides, and each further one: rows of their own in every cross-attention.
_DETAILS = {
    "SD 1.x": ((14_400, 1_650), (9_100, 1_000)),
    "SD 2.x": ((14_400, 1_650), (9_100, 1_000)),
    "SDXL": ((35_300, 450), (22_600, 650)),
}
_FINETUNING = {"SD 1.x": (182_400, 41_500), "SD 2.x": (177_400, 38_700), "SDXL": (364_300, 56_000)}

# Of a text encoder that autograd goes through, which computes in float32: the weights that are cast for it wait for
# the way back, and what it computes, of 77 tokens, is this many bytes for each of its parameters
# (CLIP's towers: 0.33, 0.41).
_TEXT_BYTES = 0.5


def step_bytes(
    architecture: str,
    batch: int,
    cells: int,
    element: int,
    checkpointing: bool,
    finetuning: bool = False,
    capacity: int = 1,
) -> float | None:
    """Bytes of a training step beside the model's weights; None for an architecture that was not measured.

    architecture: see `infusion.architecture_name`. cells: of each of the latents. element: bytes of a number.
    finetuning: of PromptNet and attention layers, what they learn and the text encoder left out, and not of a
    residual. capacity: of a residual.
    """
    measured = _FINETUNING if finetuning else _RESIDUAL
    if architecture not in measured:
        return None
    numbers = measured[architecture][checkpointing]
    if capacity > 1 and not finetuning:
        first, further = (each[checkpointing] for each in _DETAILS[architecture])
        numbers += first + (capacity - 2) * further
    return numbers * batch * cells * element


def text_bytes(parameters: int, weights: int, batch: int) -> float:
    """Bytes that a text encoder takes beside its weights while autograd goes through it.

    parameters: how many it has. weights: their bytes.
    """
    cast = 0 if weights >= 4 * parameters else 4 * parameters
    return cast + _TEXT_BYTES * parameters * batch


def optimizer_bytes(learned: float) -> float:
    """Bytes that AdamW's step takes for a moment; learned: those of what it moves, their gradient and moments
    included."""
    return learned / 4


def element_bytes(model: Any) -> int:
    """Bytes of a number that a host's model computes with, which may be of another type than its weights."""
    return (getattr(model, "manual_cast_dtype", None) or model.get_dtype()).itemsize
