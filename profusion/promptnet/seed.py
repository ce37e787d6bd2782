"""From S* (ProFusion, arXiv 2305.13579) to an Infusion residual (arXiv 2404.14007) that a training can start from.

Infusion adds delta_i to the context row of the class noun, where cross-attention layer i takes its value:
V_bar_i = W_V_i (c + onehot(noun) * delta_i). With

    delta_i = c(S*)[row of S*] - c(noun)[row of the noun]

the value at the noun is the one that S* has in the same prompt, in every layer and whatever W_V_i is. The map stays the
noun's, and what other rows take from S* inside the text encoder is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..infusion import Layer, architecture_name
from ..residual import Residual

EncodedWord = tuple[Tensor, Sequence[int]]
"""A prompt's context (B, L, D), and a word's rows in it, counted from 0. B may be timesteps: their mean counts."""


def seed_residual(
    with_word: Sequence[EncodedWord], with_noun: Sequence[EncodedWord], layers: Sequence[Layer], noun: str
) -> Residual:
    """The residual of no steps at which the noun's value is that of S*.

    with_word, with_noun: the same prompts, with S* and with the noun in one and the same place; the mean over prompts
    counts. A residual has one vector for all rows of its noun, so several rows, of S* or of the noun, count as their
    mean. Raises ValueError for no prompts, unequal numbers of them, or a context of another width than the layers'.
    """
    if len(with_word) != len(with_noun) or not with_word:
        count = f"{len(with_word)} prompts with S* and {len(with_noun)} with the noun" if with_word else "no prompts"
        raise ValueError(f"{count}: give the same ones with both, at least one")
    pairs = zip(with_word, with_noun, strict=True)
    differences = [_vector(*spoken) - _vector(*plain) for spoken, plain in pairs]
    delta, width = torch.stack(differences).mean(dim=0), layers[0].context_dim
    if len(delta) != width:
        raise ValueError(f"contexts of width {len(delta)} and layers that take {width}: use the text encoder of the model")
    names = tuple(layer.name for layer in layers)
    return Residual(delta.expand(len(layers), 1, -1), noun, names, architecture_name(layers))


def _vector(context: Tensor, rows: Sequence[int]) -> Tensor:
    """What a word is in a context (B, L, D): (D,), float32."""
    return context[:, list(rows)].float().mean(dim=(0, 1))
