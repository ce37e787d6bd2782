"""Flow matching (rectified flow, arXiv 2209.03003; as SD3 uses it, arXiv 2403.03206).

x_sigma = (1 - sigma) x0 + sigma eps with sigma in [0, 1], and networks predict the velocity eps - x0. Every function of
`diffusion` that asks only for `model(x, sigma) -> denoised` works here too, since x - denoised = sigma (eps - x0).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .diffusion import Denoiser, evenly_spaced, per_row

PredictVelocity = Callable[[Tensor, Tensor], Tensor]
"""`predict(x, t) -> eps - x0`, a network itself: x (B, C, H, W), t (B,) in 0..1000."""

TIMESTEPS = 1000


def interpolated(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma eps, (B, C, H, W), sigma (B,) or ()."""
    sigma = per_row(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity_denoiser(predict: PredictVelocity) -> Denoiser:
    """Turn a network's velocity into `model(x, sigma) -> denoised` = x - sigma v."""
    return lambda x, sigma: x - per_row(sigma, x) * predict(x, TIMESTEPS * sigma)


def flow_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """`steps` noise levels from 1 on, and a final zero; sigma = s t / (1 + (s - 1) t) with s = `shift` and t even."""
    times = torch.arange(1, TIMESTEPS + 1) / TIMESTEPS
    return evenly_spaced(shift * times / (1 + (shift - 1) * times), steps)
