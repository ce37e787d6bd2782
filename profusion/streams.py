"""Infusion's two streams as one denoiser, for samplers without a host."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from .attending import UNET, Attending
from .holding import NO_PICTURE, Holding, of_noun
from .infusion import (
    ExtraOptions,
    Patches,
    Placement,
    PlacementsFor,
    QueryStore,
    chunks_in_order,
)
from .stride import Stride

Evaluate = Callable[[Tensor, Tensor, Patches], Tensor]
"""`evaluate(x, sigma, patches) -> denoised` of the frozen model with these attention patches."""


def two_stream_denoiser(
    evaluate: Evaluate,
    placements_for: PlacementsFor,
    shared_latent: bool = False,
    holding: Holding | None = None,
    stride: Stride | None = None,
    attending: Attending = UNET,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser of the stacked streams, (2N, ...): N rows of F, then N of C (arXiv 2404.14007, section 4).

    F follows its own trajectory, so that C keeps the plain picture's layout; or, with `shared_latent`, looks at C's.
    holding: what keeps C's background F's, and several concepts apart where it does; it needs F's own trajectory, and
    `Holding.finished` at the end of the run. stride: at which noise levels C is evaluated, and the nouns are looked for
    in F; None: at all. attending: how the streams meet in the network's attention.
    """
    if holding is not None and shared_latent:
        raise ValueError(NO_PICTURE)
    stride = stride or Stride(1)

    def look(x: Tensor, sigma: Tensor, queries: QueryStore, due: bool) -> Tensor:
        patches = attending.foundation(queries, placements_for, chunks_in_order)
        if holding is not None and due:
            patches = holding.watching_foundation(patches, placements_for)
        return evaluate(x, sigma, patches)

    def nouns() -> list[Hashable | None]:
        return [None] if holding is None else holding.nouns()

    def draw(
        noun: Hashable | None, customised: Tensor, foundation: Tensor, sigma: Tensor, queries: QueryStore
    ) -> Tensor:
        def placed(extra_options: ExtraOptions, owner: Hashable) -> Sequence[Placement]:
            return of_noun(placements_for(extra_options, owner), owner, noun)

        patches, seen = attending.customised(queries, placed, chunks_in_order), customised
        if holding is not None:
            patches = holding.watching_customised(patches, placements_for, noun=noun)
            seen = holding.seen_by(noun, customised, foundation)
        return evaluate(seen, sigma, patches)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        foundation, customised = x.chunk(2)
        sigma_f, sigma_c = sigma.chunk(2)
        level, queries = float(sigma_c[0]), {}
        due = any(stride.due(level, noun) for noun in nouns())
        plain = look(customised if shared_latent else foundation, sigma_f, queries, due)
        drawn = {}
        for noun in nouns():
            if due:
                drawn[noun] = draw(noun, customised, foundation, sigma_c, queries)
                stride.keep(level, [drawn[noun]], [plain], noun)
            else:
                (drawn[noun],) = stride.between(level, [plain], noun)
        return torch.cat([plain, drawn[None] if holding is None else holding.denoised(holding.joined(drawn), plain)])

    return denoise
