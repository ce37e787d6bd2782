"""Stable Diffusion's noise schedule, and a sampler with k-diffusion's one contract: `model(x, sigma) -> denoised`.

x = x0 + sigma * eps throughout (k-diffusion's units); sigma^2 = (1 - alpha_bar) / alpha_bar.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]


@lru_cache(maxsize=1)
def _alphas_cumprod() -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def alphas_cumprod() -> Tensor:
    """SD's alpha_bar at its 1000 timesteps (scaled-linear betas), float32."""
    return _alphas_cumprod().float()


def training_sigmas() -> Tensor:
    """sigma at the 1000 timesteps, rising, float32."""
    alpha_bar = _alphas_cumprod()
    return ((1 - alpha_bar) / alpha_bar).sqrt().float()


def timestep_of(sigma: Tensor) -> Tensor:
    """The nearest of the 1000 timesteps, by log sigma: (B,) -> (B,)."""
    log_sigmas = training_sigmas().log().to(sigma.device)
    return (sigma.float().log()[None] - log_sigmas[:, None]).abs().argmin(dim=0)


def sampling_sigmas(steps: int) -> Tensor:
    """`steps` noise levels evenly spaced in timestep, from the highest, and a final zero (the host's "simple")."""
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one is needed")
    sigmas = training_sigmas()
    chosen = [sigmas[-(1 + int(index * len(sigmas) / steps))] for index in range(steps)]
    return torch.stack([*chosen, torch.tensor(0.0)])


def eps_denoiser(predict_noise: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
    """Turn eps_theta(x_t, t), which takes SD's variance-preserving x_t, into `model(x, sigma) -> denoised`."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        scale = sigma.view(-1, 1, 1, 1)
        eps = predict_noise(x / (scale**2 + 1).sqrt(), timestep_of(sigma))
        return x - scale * eps

    return denoise


def sample_euler(
    model: Denoiser, noise: Tensor, sigmas: Tensor, callback: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """Euler in sigma, which for an eps-model is DDIM with eta = 0 (arXiv 2010.02502).

    noise (B, C, H, W), unit variance; sigmas falling to 0; `callback(step, denoised)` after every step.
    """
    x = noise * (sigmas[0] ** 2 + 1).sqrt()
    for step in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        denoised = model(x, sigma.expand(len(x)))
        x = denoised + (x - denoised) * (sigma_next / sigma)
        if callback is not None:
            callback(step, denoised)
    return x
