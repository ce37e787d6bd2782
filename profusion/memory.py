"""What a training step takes on a device, before it is tried: measured from shapes, see benchmarks/training_memory.py."""

from __future__ import annotations

# The most that a step takes beside the weights, in numbers of the model's type for each cell of the latents, without
# and with gradient checkpointing. In an attention that keeps its map it would be more.
_NUMBERS_A_CELL = {"SD 1.x": (90_800, 30_000), "SD 2.x": (85_800, 25_000), "SDXL": (153_300, 21_500)}


def step_bytes(
    architecture: str, batch: int, cells: int, element: int, checkpointing: bool, finetuning: bool = False
) -> float | None:
    """Bytes of a training step beside the model's weights; None for an architecture that was not measured.

    architecture: see `infusion.architecture_name`. cells: of each of the latents. element: bytes of a number.
    """
    if architecture not in _NUMBERS_A_CELL:
        return None
    return _NUMBERS_A_CELL[architecture][checkpointing] * batch * cells * element
