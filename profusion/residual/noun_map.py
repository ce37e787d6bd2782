"""Where a model sees a noun in a picture, told from its cross-attention.

The map itself, A_i(t, l) = softmax(q(t) k(l)^T / sqrt(d)) of layer i, is nowhere to be had in a host: its attention is
one fused operation. But what attention gives is linear in the values, and those a patch may set. With one value v at
the noun's rows and nothing elsewhere a layer gives, head by head, A(t, noun) W_V v; with v at every row, W_V v. So

    a_i(t) = <out_noun - b, out_all - b> / |out_all - b|^2      b: what it gives of no values at all, its bias

is the mean of the heads' maps at the noun, weighed by what each head makes of v. v is the noun's own row. The model
itself is evaluated as ever: the rows with other values are there within the layer only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..devices import smoothly_resized
from ..infusion import ExtraOptions, Patches, layer_name
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


def map_patches(rows: Sequence[int], see: Callable[[str, Tensor, Tensor], None]) -> Patches:
    """Patches that leave the model as it is and show the noun's map at every layer.

    rows: the noun's in the context. see: told the layer's name, a_i (B, h, w), and the noun's own row (B, D) there.
    """
    index, noun = list(rows), []

    def spread(n: Tensor, context: Tensor, value: Tensor, extra_options: ExtraOptions):
        own = value[:, index].mean(dim=1, keepdim=True)  # (B, 1, D)
        noun.append(own[:, 0])
        nothing, everywhere = torch.zeros_like(value), own.expand_as(value)
        at_noun = nothing.index_copy(1, torch.tensor(index, device=value.device), own.repeat(1, len(index), 1))
        return n.repeat(4, 1, 1), context.repeat(4, 1, 1), torch.cat([value, at_noun, everywhere, nothing])

    def gather(out: Tensor, extra_options: ExtraOptions):
        plain, at_noun, everywhere, nothing = out.chunk(4)
        whole = (everywhere - nothing).float()
        part = ((at_noun - nothing).float() * whole).sum(-1) / whole.square().sum(-1).clamp_min(1e-12)  # (B, T)
        size = extra_options["activations_shape"][-2:]
        see(layer_name(extra_options), part.view(len(part), *size), noun.pop())
        return plain

    return {"attn2_patch": [spread], "attn2_output_patch": [gather]}


Showing = Callable[[Sequence[int], Callable[[str, Tensor, Tensor], None]], Patches]
"""`showing(rows, see)`: what `map_patches` makes of a UNet."""


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
