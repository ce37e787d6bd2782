"""Infusion's two streams as one denoiser, for samplers without a host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .holding import NO_PICTURE, Holding
from .infusion import Patches, PlacementsFor, QueryStore, customised_patches, foundation_patches

Evaluate = Callable[[Tensor, Tensor, Patches], Tensor]
"""`evaluate(x, sigma, patches) -> denoised` of the frozen model with these attention patches."""


def two_stream_denoiser(
    evaluate: Evaluate, placements_for: PlacementsFor, shared_latent: bool = False, holding: Holding | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser of the stacked streams, (2N, ...): N rows of F, then N of C (arXiv 2404.14007, section 4).

    F follows its own trajectory, so that C keeps the plain picture's layout; or, with `shared_latent`, looks at C's.
    holding: what keeps C's background F's; it needs F's own trajectory, and `Holding.finished` at the end of the run.
    """
    if holding is not None and shared_latent:
        raise ValueError(NO_PICTURE)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        foundation, customised = x.chunk(2)
        sigma_f, sigma_c = sigma.chunk(2)
        queries: QueryStore = {}
        seen = customised if shared_latent else foundation
        look, draw = foundation_patches(queries), customised_patches(queries, placements_for)
        if holding is None:
            return torch.cat([evaluate(seen, sigma_f, look), evaluate(customised, sigma_c, draw)])
        plain = evaluate(seen, sigma_f, holding.watching_foundation(look, placements_for))
        drawn = evaluate(customised, sigma_c, holding.watching_customised(draw, placements_for))
        return torch.cat([plain, holding.denoised(drawn, plain)])

    return denoise
