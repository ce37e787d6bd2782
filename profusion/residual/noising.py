"""How noise is put into a training's pictures, and what a model's answer is compared with.

Models of Stable Diffusion's kind are asked for the noise in x0 + sigma eps, flow models (arXiv 2209.03003) for
the velocity eps - x0 of (1 - sigma) x0 + sigma eps, whose noise levels they have shifted as they sample with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..diffusion import per_row
from ..flow import interpolated


class Noising(Protocol):
    """See `AddedNoise`, which is one."""

    def noisy(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor: ...

    def target(self, clean: Tensor, noise: Tensor) -> Tensor: ...

    def levels(self, sigmas: Tensor, count: int, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class AddedNoise:
    """x0 + sigma eps, of which eps is asked."""

    def noisy(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """clean and noise (B, C, H, W), sigma (B,)."""
        return clean + per_row(sigma, clean) * noise

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What the model should say."""
        return noise

    def levels(self, sigmas: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """So many noise levels (count,), of those of the model's timesteps, rising: each is as likely."""
        return sigmas[torch.randint(len(sigmas), (count,), generator=generator)]


@dataclass(frozen=True)
class Flow:
    """(1 - sigma) x0 + sigma eps, of which eps - x0 is asked.

    Timesteps are drawn logit-normally (arXiv 2403.03206, section 3.1, of mean 0 and deviation 1): in the middle, where
    there is most to say. The model's own shift is in its sigmas.
    """

    def noisy(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return interpolated(clean, noise, sigma)

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise - clean

    def levels(self, sigmas: Tensor, count: int, generator: torch.Generator) -> Tensor:
        share = torch.sigmoid(torch.randn(count, generator=generator))
        return sigmas[(share * len(sigmas)).long().clamp(max=len(sigmas) - 1)]


ADDED, FLOW = AddedNoise(), Flow()
