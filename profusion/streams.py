"""Infusion's two streams as one denoiser, for samplers without a host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .infusion import Patches, PlacementsFor, QueryStore, customised_patches, foundation_patches

Evaluate = Callable[[Tensor, Tensor, Patches], Tensor]
"""`evaluate(x, sigma, patches) -> denoised` of the frozen model with these attention patches."""


def two_stream_denoiser(
    evaluate: Evaluate, placements_for: PlacementsFor, shared_latent: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser of the stacked streams, (2N, ...): N rows of F, then N of C (arXiv 2404.14007, section 4).

    F follows its own trajectory, so that C keeps the plain picture's layout; or, with `shared_latent`, looks at C's.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        foundation, customised = x.chunk(2)
        sigma_f, sigma_c = sigma.chunk(2)
        queries: QueryStore = {}
        seen = customised if shared_latent else foundation
        plain = evaluate(seen, sigma_f, foundation_patches(queries))
        return torch.cat([plain, evaluate(customised, sigma_c, customised_patches(queries, placements_for))])

    return denoise
