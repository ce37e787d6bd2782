"""A noun's share of a host's model's attention, measured while a plain picture is drawn."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from comfy.conds import CONDRegular
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...profusion.infusion import PlacedConcept, Placement
from ...profusion.probing import NounShares
from ...profusion.prompt import Wanted, rows_of
from ...profusion.rows import Evaluation, identity, owners
from .drawing import Sampling, draw
from .families import Acting, acting_on
from .placing import encode_prompt, noun_spans
from .streams import KEY, placements_in, uncompiled

if TYPE_CHECKING:
    from comfy.sd import CLIP

_PROBE = "profusion_probe"


def probe(
    model: ModelPatcher,
    clip: CLIP,
    text: str,
    noun: str,
    negative: list | None,
    latent: Tensor,
    seed: int,
    sampling: Sampling,
) -> tuple[NounShares, Tensor]:
    """What the model's attention has of a noun, and the latent (B, C, ...) that it drew meanwhile: the plain one.

    latent: unscaled, as the host keeps it. negative: default, an empty prompt.
    """
    acting = acting_on(model)
    encoded = cache(partial(encode_prompt, clip, text, ()))
    rows = rows_of([Wanted("noun", noun)], 0, text, partial(noun_spans, clip, text, encoded=encoded))
    names = tuple(layer.name for layer in acting.layers)
    # Nothing is added anywhere; it only says which rows are looked at.
    looked_at = PlacedConcept(Placement(torch.ones(len(names), 1, 1), names, rows), 0.0, 1.0)
    positive = encode_prompt(clip, text, [looked_at], encoded)
    negative = encode_prompt(clip, "", ()) if negative is None else negative
    shares = NounShares(names)
    return shares, draw(_watched(model, acting, names, shares), positive, negative, latent, seed, sampling)


def _watched(model: ModelPatcher, acting: Acting, names: tuple[str, ...], shares: NounShares) -> ModelPatcher:
    """A clone of MODEL, without Infusion's streams, whose evaluations add to `shares` what they see of the noun."""
    watched = model.clone()
    for kind in (WrappersMP.PREPARE_SAMPLING, WrappersMP.SAMPLER_SAMPLE, WrappersMP.CALC_COND_BATCH):
        watched.remove_wrappers_with_key(kind, KEY)
    network = watched.get_model_object("diffusion_model")

    def watch(executor, inner: Any, conds: list, x: Tensor, sigma: Tensor, options: dict, *args, **kwargs):
        known = {identity(index, cond): cond for index, group in enumerate(conds) for cond in group or ()}
        placed = {key: placements_in(cond, inner, x, names) for key, cond in known.items()}
        patches = acting.attending.looking(
            network, shares, lambda _, owner: placed[owner[0]], owners, lambda _, owner: (owner[0], None, None)
        )
        evaluation = Evaluation(conds, len(x), CONDRegular)
        with uncompiled():
            return executor(inner, evaluation.conds, x, sigma, evaluation.options(options, patches), *args, **kwargs)

    watched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, _PROBE, watch)
    return watched
