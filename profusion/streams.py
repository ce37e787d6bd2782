"""Infusion's two streams as one denoiser, for samplers without a host."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from .holding import NO_PICTURE, Holding, of_noun
from .infusion import (
    ExtraOptions,
    Patches,
    Placement,
    PlacementsFor,
    QueryStore,
    customised_patches,
    foundation_patches,
)

Evaluate = Callable[[Tensor, Tensor, Patches], Tensor]
"""`evaluate(x, sigma, patches) -> denoised` of the frozen model with these attention patches."""


def two_stream_denoiser(
    evaluate: Evaluate, placements_for: PlacementsFor, shared_latent: bool = False, holding: Holding | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser of the stacked streams, (2N, ...): N rows of F, then N of C (arXiv 2404.14007, section 4).

    F follows its own trajectory, so that C keeps the plain picture's layout; or, with `shared_latent`, looks at C's.
    holding: what keeps C's background F's, and several concepts apart where it does; it needs F's own trajectory, and
    `Holding.finished` at the end of the run.
    """
    if holding is not None and shared_latent:
        raise ValueError(NO_PICTURE)

    def customised_of(queries: QueryStore, noun: Hashable | None = None) -> Patches:
        def placed(extra_options: ExtraOptions, owner: Hashable) -> Sequence[Placement]:
            return of_noun(placements_for(extra_options, owner), owner, noun)

        return customised_patches(queries, placed)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        foundation, customised = x.chunk(2)
        sigma_f, sigma_c = sigma.chunk(2)
        queries: QueryStore = {}
        seen = customised if shared_latent else foundation
        look = foundation_patches(queries)
        if holding is None:
            return torch.cat([evaluate(seen, sigma_f, look), evaluate(customised, sigma_c, customised_of(queries))])
        plain = evaluate(seen, sigma_f, holding.watching_foundation(look, placements_for))
        drawn = {}
        for noun in holding.nouns():
            patches = holding.watching_customised(customised_of(queries, noun), placements_for, noun=noun)
            drawn[noun] = evaluate(holding.seen_by(noun, customised, foundation), sigma_c, patches)
        return torch.cat([plain, holding.denoised(holding.joined(drawn), plain)])

    return denoise
