"""Stable Diffusion's noise schedule, and a sampler with k-diffusion's one contract: `model(x, sigma) -> denoised`.

x = x0 + sigma * eps throughout (k-diffusion's units); sigma^2 = (1 - alpha_bar) / alpha_bar. Networks take the
variance-preserving x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps = x / sqrt(sigma^2 + 1); only this file converts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""`model(x, sigma) -> denoised`: x (B, C, H, W), sigma (B,)."""
PredictNoise = Callable[[Tensor, Tensor], Tensor]
"""`predict(x_t, t) -> eps`, a network itself: x_t variance-preserving, (B, C, H, W), t (B,)."""
Prediction = Literal["eps", "v"]
"""What a network was trained to predict: eps or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (arXiv 2202.00512)."""


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
    return evenly_spaced(training_sigmas(), steps)


def evenly_spaced(sigmas: Tensor, steps: int) -> Tensor:
    """`steps` of a schedule's rising levels at even distances, falling from the highest, and a final zero."""
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one is needed")
    chosen = [sigmas[-(1 + int(index * len(sigmas) / steps))] for index in range(steps)]
    return torch.stack([*chosen, torch.tensor(0.0)])


def per_row(sigma: Tensor, x: Tensor) -> Tensor:
    """Noise levels (B,) so that they broadcast over x (B, ...); one for all rows, (), stays."""
    return sigma.view(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma


def variance_preserving(x: Tensor, sigma: Tensor) -> Tensor:
    """x = x0 + sigma eps -> x_t = x / sqrt(sigma^2 + 1), as networks take it; x (B, ...), sigma (B,) or ()."""
    return x / (per_row(sigma, x) ** 2 + 1).sqrt()


def variance_exploding(x: Tensor, sigma: Tensor) -> Tensor:
    """The inverse of `variance_preserving`: x_t -> x, and unit noise -> the start of a run at sigma."""
    return x * (per_row(sigma, x) ** 2 + 1).sqrt()


def noised(clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps (arXiv 2006.11239, Eq. 4), (B, C, H,
    W), timesteps (B,) whole."""
    signal = per_row(alphas_cumprod().to(clean)[timesteps.long().to(clean.device)], clean)
    return signal.sqrt() * clean + (1 - signal).sqrt() * noise


def noise_predictor(
    predict: Callable[[Tensor, Tensor], Tensor], prediction: Prediction = "eps"
) -> Callable[[Tensor, Tensor], Tensor]:
    """Turn a network's eps_theta(x_t, t), or its v, into `predict(x, sigma) -> eps` of x = x0 + sigma * eps."""
    if prediction == "eps":
        return lambda x, sigma: predict(variance_preserving(x, sigma), timestep_of(sigma))

    def noise_of_v(x: Tensor, sigma: Tensor) -> Tensor:
        x_t = variance_preserving(x, sigma)
        # eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t
        return variance_preserving(predict(x_t, timestep_of(sigma)) + per_row(sigma, x) * x_t, sigma)

    return noise_of_v


def v_denoiser(predict: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
    """Turn a network's v_theta(x_t, t) into `model(x, sigma) -> denoised`."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        x_t = variance_preserving(x, sigma)
        # x0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v (arXiv 2202.00512)
        return variance_preserving(x_t - per_row(sigma, x) * predict(x_t, timestep_of(sigma)), sigma)

    return denoise


def denoiser(predict: Callable[[Tensor, Tensor], Tensor], prediction: Prediction) -> Denoiser:
    """Turn a network that predicts eps or v into `model(x, sigma) -> denoised`."""
    return eps_denoiser(predict) if prediction == "eps" else v_denoiser(predict)


def eps_denoiser(predict: PredictNoise) -> Denoiser:
    """Turn a network's eps_theta(x_t, t) into `model(x, sigma) -> denoised`."""
    predict_noise = noise_predictor(predict)
    return lambda x, sigma: x - per_row(sigma, x) * predict_noise(x, sigma)


def sample_euler(
    model: Denoiser, noise: Tensor, sigmas: Tensor, callback: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """Euler in sigma, which for an eps-model is DDIM with eta = 0 (arXiv 2010.02502).

    noise (B, C, H, W), unit variance; sigmas falling to 0; `callback(step, denoised)` after every step.
    """
    return euler(model, variance_exploding(noise, sigmas[0]), sigmas, callback)


def euler(model: Denoiser, x: Tensor, sigmas: Tensor, callback: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Euler in sigma from x (B, C, H, W), which is at sigmas[0]: dx / dsigma = (x - denoised) / sigma."""
    for step in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        denoised = model(x, sigma.expand(len(x)))
        x = denoised + (x - denoised) * (sigma_next / sigma)
        if callback is not None:
            callback(step, denoised)
    return x
