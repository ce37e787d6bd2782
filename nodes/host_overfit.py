"""Two models of the host at the same noisy latents, and their pictures from the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ..profusion.metrics import predictions
from ..profusion.metrics.fisher import NoisyLatents
from .host_training import noise_levels

BATCH = 4  # latents at a time
_SEEDS = 2**64

Tell = Callable[[int], None]
"""Told how many latents more have been evaluated; raises where the user cancelled."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: size (C, H, W) of a latent, the first one's seed, and what KSampler takes."""

    size: tuple[int, int, int]
    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str

    def draw(self, model: Any, positive: list, negative: list, count: int, tell: Tell, skip: int = 0) -> Tensor:
        """`count` pictures, each from a seed of its own: latents (count, C, H, W) as the model takes them, float32.

        skip: how many seeds to leave out first.
        """
        drawn = []
        for first in range(0, count, BATCH):
            seeds = [(self.seed + skip + index) % _SEEDS for index in range(first, min(first + BATCH, count))]
            empty = torch.zeros(len(seeds), *self.size)
            noise = torch.cat([comfy.sample.prepare_noise(empty[:1], seed) for seed in seeds])
            samples = comfy.sample.sample(
                model,
                noise,
                self.steps,
                self.cfg,
                self.sampler,
                self.scheduler,
                positive,
                negative,
                empty,
                callback=lambda *_, rows=empty: tell(len(rows)),
                disable_pbar=True,
                seed=seeds[0],
            )
            drawn.append(model.model.process_latent_in(samples.float()).cpu())
        return torch.cat(drawn)


class _Evaluation(comfy.samplers.Sampler):
    """Takes the place of a sampler in a guider, which has loaded and patched the model for it."""

    def __init__(self, work: Callable[[Any, dict], None]):
        self._work = work

    def sample(self, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
        self._work(guider, extra_args["model_options"])
        return torch.zeros_like(noise)


def noise_predictions(model: Any, conditionings: Sequence[list], noisy: NoisyLatents, tell: Tell) -> Tensor:
    """The model's eps at noisy latents, one conditioning a prompt, with every patch and wrapper but no guidance.

    (n, C, H, W), float32 on the CPU, whatever the model itself predicts.
    """
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [entry for entries in conditionings for entry in entries]})
    found: list[Tensor] = []

    def work(running: Any, options: dict) -> None:
        conds = iter(running.conds["positive"])
        prompts = [[next(conds) for _ in entries] for entries in conditionings]
        done = 0

        def predict(x: Tensor, sigma: Tensor, prompt: int) -> Tensor:
            denoised = comfy.samplers.calc_cond_batch(running.inner_model, [prompts[prompt]], x, sigma, options)[0]
            return ((x - denoised) / sigma.view(-1, 1, 1, 1)).cpu()

        def report(rows: int) -> None:
            nonlocal done
            tell(rows - done)
            done = rows

        device = model.load_device
        there = replace(noisy, x=noisy.x.to(device), sigma=noisy.sigma.to(device))
        found.append(predictions(predict, there, BATCH, report))

    zeros = torch.zeros(BATCH, *noisy.x.shape[1:])
    guider.sample(zeros, zeros, _Evaluation(work), noise_levels(model)[[-1, 0]].cpu(), disable_pbar=True, seed=0)
    return found[0]
