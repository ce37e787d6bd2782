"""Where a model sees a noun in a picture, told from its cross-attention.

`showing` says how the map is had in a host, whose attention is one fused operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..devices import smoothly_resized
from ..showing import Showing, map_patches
from .noising import ADDED, Noising

if TYPE_CHECKING:
    from .training import PredictWithPatches

LEVELS = (0.1, 0.3, 0.5)  # of the timesteps: noise under which the model still sees what is there
FAINTEST = 2.0  # times the rest's: with less the map does not stand out
_ROUNDS = 30  # of the two means, which settle within ten


@dataclass(frozen=True)
class Seen:
    """What a model sees of a noun in pictures: maps (N, H, W) of their latents' cells, each in [0, 1], soft; whether
    each stands out from what is around it; and the size (root of the mean square) of the noun's own row."""

    masks: Tensor
    found: tuple[bool, ...]
    row_size: float

    def weights(self) -> Tensor:
        """The masks, and all of a picture whose map says nothing at all.

        Also those that hardly stand out: were all of such a picture learned, nothing would hold what is around the
        noun to the plain model's, and a residual so trained turns whole pictures into noise.
        """
        empty = self.masks.flatten(1).sum(1)[:, None, None] < 1
        return torch.where(empty, torch.ones_like(self.masks), self.masks)


def soft_mask(seen: Tensor) -> tuple[Tensor, bool]:
    """A map (H, W) as a mask in [0, 1]: 0 at the mean of its lower values, 1 at that of its higher ones, between them
    in proportion; and whether the two are far enough apart to say where the object is.

    Lower and higher are those that two means part (k-means of two, in one dimension).
    """
    low, high = seen.amin(), seen.amax()
    for _ in range(_ROUNDS):
        above = seen > (low + high) / 2
        if not above.any() or above.all():
            break
        low, high = seen[~above].mean(), seen[above].mean()
    mask = ((seen - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return mask, bool(high > FAINTEST * low.clamp_min(0) and high > low)


def look(
    predict_noise: PredictWithPatches,
    latents: Tensor,
    rows: Sequence[int],
    sigmas: Tensor,
    generator: torch.Generator,
    prompt: int = 0,
    showing: Showing | None = None,
    noising: Noising = ADDED,
) -> Seen:
    """Where the model sees a noun in pictures that are noised to LEVELS: the mean over layers, levels and heads.

    latents (N, C, H, W), one after another evaluated; rows: the noun's in the context of the prompt of this index.
    sigmas: the noise levels of the model's timesteps. showing: makes the patches that show the map, `map_patches` where
    it is left out. noising: how the model is asked.
    """
    showing = showing or map_patches
    maps, sizes = [], []

    def see(layer: str, seen: Tensor, noun: Tensor) -> None:
        found.append(smoothly_resized(seen[:, None], latents.shape[-2:])[0, 0])
        sizes.append(noun.float().square().mean().sqrt().item())

    with torch.no_grad():
        for latent in latents.split(1):
            found: list[Tensor] = []
            for share in LEVELS:
                sigma = sigmas[int(share * len(sigmas))][None].to(latent.device)
                noise = torch.randn(latent.shape, generator=generator).to(latent)
                predict_noise(noising.noisy(latent, noise, sigma), sigma, prompt, showing(rows, see))
            maps.append(soft_mask(torch.stack(found).mean(0)))
    masks, stand_out = zip(*maps, strict=True)
    return Seen(torch.stack(masks), stand_out, sum(sizes) / len(sizes))
