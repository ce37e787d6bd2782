"""Pictures drawn by the host's own samplers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
SEEDS = 2**64  # how many there are
BATCH = 4  # latents at a time where many are drawn

Tell = Callable[[int], None]
"""Told how many latents more have been evaluated; raises where the user cancelled."""


@dataclass(frozen=True)
class Sampling:
    """How a picture is drawn: what KSampler takes besides its conditionings."""

    steps: int
    cfg: float
    sampler: str = "euler"
    scheduler: str = "simple"


def stop_if_cancelled(*_: Any) -> None:
    """Raise what the host raises at Cancel. Newer hosts throttle the progress bar, whose hook polled it before."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def draw(
    model: ModelPatcher,
    positive: list,
    negative: list,
    latent: Tensor,
    seed: int,
    sampling: Sampling,
    callback: Callable = stop_if_cancelled,
    noise: Tensor | None = None,
    noise_mask: Tensor | None = None,
) -> Tensor:
    """KSampler's latents (B, C, h, w) from a latent, unscaled as the host keeps them; noise: default the seed's."""
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, seed) if noise is None else noise,
        sampling.steps,
        sampling.cfg,
        sampling.sampler,
        sampling.scheduler,
        positive,
        negative,
        latent,
        noise_mask=noise_mask,
        callback=callback,
        disable_pbar=True,
        seed=seed,
    )


def draw_seeds(
    model: ModelPatcher,
    positive: list,
    negative: list,
    size: tuple[int, int, int],
    seed: int,
    count: int,
    sampling: Sampling,
    tell: Tell,
) -> Tensor:
    """`count` pictures, each from a seed of its own: latents (count, C, H, W) as the model takes them, float32. A video
    model's have a frame, (count, C, 1, H, W).

    size: (C, H, W) of a latent. seed: the first picture's; the next has the next.
    """
    drawn = []
    for first in range(0, count, BATCH):
        seeds = [(seed + index) % SEEDS for index in range(first, min(first + BATCH, count))]
        empty = empty_latents(model, {"samples": torch.zeros(len(seeds), *size)})
        noise = torch.cat([comfy.sample.prepare_noise(empty[:1], one) for one in seeds])
        samples = draw(
            model, positive, negative, empty, seeds[0], sampling, lambda *_, rows=empty: tell(len(rows)), noise
        )
        drawn.append(model.model.process_latent_in(samples.float()).cpu())
    return torch.cat(drawn)


# What newer hosts note of an empty latent until it has been sampled: how large its cells are.
_RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")


def empty_latents(model: ModelPatcher, latent: dict) -> Tensor:
    """A LATENT's samples, with the model's channels and size where they are empty."""
    ratios = {name: latent[name] for name in _RATIOS if name in latent}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)


def drawn_latent(latent: dict, samples: Tensor) -> dict:
    """The LATENT that a sampler gives for one that it was given."""
    return {name: value for name, value in latent.items() if name not in _RATIOS} | {"samples": samples}
