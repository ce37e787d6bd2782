"""Latent Fisher divergence (arXiv 2404.14007, section 3): how far customisation moved what it should have left alone.

    F = 1/2 E_{t, z_t} |eps(z_t, t, c) - eps'(z_t, t, c)|^2

eps, eps' the noise predictions of the base and of the customised model, t uniform, c a prompt *without* the concept.
|.|^2 is the squared Euclidean norm of a latent, the sum over its C H W elements, as the paper writes it: noise has E
|eps|^2 = C H W, so F / (C H W), per element, is what compares between sizes of latents. 0 is a model that
customisation left as it was.

Latents are written x = z_0 + sigma eps (k-diffusion's units), (n, C, H, W); the model scales them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion import training_sigmas
from .checks import MetricError, check_finite

Predict = Callable[[Tensor, Tensor, int], Tensor]
"""`predict(x, sigma, prompt) -> eps`: x (B, C, H, W), sigma (B,), the index of the prompt that all B rows take."""

_OVERFLOW = "the model overflowed; evaluate it in float32 or bfloat16"


@dataclass(frozen=True)
class NoisyLatents:
    """Where two models are compared: x (n, C, H, W), sigma (n,), and each row's prompt, rows
    of a prompt side by side."""

    x: Tensor
    sigma: Tensor
    prompts: tuple[int, ...]

    def batches(self, size: int) -> Iterator[slice]:
        """Runs of at most `size` rows of one prompt."""
        first = 0
        while first < len(self.prompts):
            last = first + 1
            while last < min(len(self.prompts), first + size) and self.prompts[last] == self.prompts[first]:
                last += 1
            yield slice(first, last)
            first = last


def noisy_latents(
    latents: Sequence[Tensor], draws: int, generator: torch.Generator, sigmas: Tensor | None = None
) -> NoisyLatents:
    """Noise latents at uniformly drawn timesteps, `draws` times for each prompt.

    latents: for each prompt a set (m, C, H, W), scaled as the model takes them, from which z_0 is drawn; the base
    model's own pictures of the prompt follow the paper, `unit_latents` need no sampling. sigmas: the noise levels of
    the model's timesteps (T,), default Stable Diffusion's. The same generator gives the same draws on every device.
    """
    if not latents:
        raise MetricError("no prompts: give at least one, without the concept")
    if draws < 1:
        raise MetricError(f"draws={draws}: draw at least one for each prompt")
    sizes = {tuple(rows.shape[1:]) for rows in latents}
    if len(sizes) > 1 or any(rows.ndim != 4 or not len(rows) for rows in latents):
        raise MetricError(
            f"latents of shapes {[tuple(rows.shape) for rows in latents]}: give (m, C, H, W) of one size, m > 0"
        )
    for prompt, rows in enumerate(latents, start=1):
        check_finite(
            rows, f"prompt {prompt}: latent", "the VAE or the model that made it overflowed; run it in float32"
        )
    levels = (training_sigmas() if sigmas is None else sigmas).float().cpu()
    x, sigma = [], []
    for rows in latents:
        for _ in range(draws):  # one by one, so that more draws continue fewer
            level = levels[_drawn(len(levels), generator)]
            clean = rows[_drawn(len(rows), generator)].float()
            noise = torch.randn(clean.shape, generator=generator, device=generator.device)
            sigma.append(level)
            x.append(clean + level.item() * noise.to(clean.device))
    prompts = tuple(prompt for prompt in range(len(latents)) for _ in range(draws))
    return NoisyLatents(torch.stack(x), torch.stack(sigma).to(x[0].device), prompts)


def _drawn(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator, device=generator.device))


def unit_latents(prompts: int, size: Sequence[int], count: int, generator: torch.Generator) -> list[Tensor]:
    """Standard normal latents for each prompt, (count, C, H, W): Stable Diffusion's are scaled to that variance."""
    return [torch.randn(count, *size, generator=generator, device=generator.device) for _ in range(prompts)]


@torch.no_grad()
def predictions(
    predict: Predict, noisy: NoisyLatents, batch: int = 8, report: Callable[[int], None] | None = None
) -> Tensor:
    """A model's noise predictions at all of them, (n, C, H, W), at most `batch` at a time;
    `report(done)` after each."""
    parts = []
    for rows in noisy.batches(batch):
        parts.append(predict(noisy.x[rows], noisy.sigma[rows], noisy.prompts[rows.start]).float())
        if report is not None:
            report(rows.stop)
    return torch.cat(parts)


@dataclass(frozen=True)
class Fisher:
    """The divergence at each draw, (n,) float64, and the elements of a latent, C H W."""

    samples: Tensor
    elements: int

    @property
    def value(self) -> float:
        """F, as the paper has it: half the mean squared norm."""
        return self.samples.mean().item()

    @property
    def per_element(self) -> float:
        """F / (C H W)."""
        return self.value / self.elements


def fisher_divergence(base: Tensor, customised: Tensor) -> Fisher:
    """F from both models' predictions at the same latents, (n, C, H, W) each. Exactly 0 where they are identical.

    Raises MetricError for shapes that differ, and for predictions that are not finite.
    """
    if base.shape != customised.shape or base.ndim != 4 or not len(base):
        raise MetricError(
            f"predictions of shapes {tuple(base.shape)} and {tuple(customised.shape)}: give both models' (n, C, H, W) "
            "at the same latents"
        )
    check_finite(base, "the base model's prediction", _OVERFLOW)
    check_finite(customised, "the customised model's prediction", _OVERFLOW)
    difference = base.cpu().double() - customised.cpu().double()  # there: not every device has float64
    return Fisher(0.5 * difference.square().flatten(1).sum(dim=1), base[0].numel())
