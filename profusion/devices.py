"""Operations that not every device has, done where they can be: the same numbers, small
tensors, a copy there and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LACKING = {"mps"}
"""Devices that lack adaptive pooling where sizes do not divide, antialiasing, or a linear
solver, or have only lately."""


def on_any_device(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)` on their device, or on the CPU if theirs may lack it; differentiable if it is."""
    device = tensors[0].device
    if device.type not in LACKING:
        return function(*tensors)
    return function(*(tensor.cpu() for tensor in tensors)).to(device)


def area_means(x: Tensor, size: Sequence[int]) -> Tensor:
    """The mean over each cell of a grid of any size: (B, C, H, W) -> (B, C, h, w)."""
    return on_any_device(lambda x: F.adaptive_avg_pool2d(x, tuple(size)), x)


def smoothly_resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear with antialiasing: (B, C, H, W) -> (B, C, h, w)."""
    return on_any_device(lambda x: F.interpolate(x, size=tuple(size), mode="bilinear", antialias=True), x)


def solved(matrix: Tensor, vector: Tensor) -> Tensor:
    """x of matrix x = vector: (D, D), (D,) -> (D,)."""
    return on_any_device(torch.linalg.solve, matrix, vector)
