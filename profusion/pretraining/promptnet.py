"""A PromptNet that is about to be trained for a base model: its sizes, and what it starts as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..models.configs import UNetConfig
from ..models.tokenizer import words_to_ids
from ..pipeline import Pipeline
from ..promptnet.network import PromptNet, PromptNetConfig, PromptNetError, typical_embedding
from ..promptnet.pseudo_word import prompt_tokens
from ..promptnet.training import WORD_PROMPTS

Layout = Literal["profusion", "authors"]


def config_for(
    unet: UNetConfig,
    text_widths: Sequence[int],
    image_width: int,
    tokens: int = 1,
    with_noise: bool = False,
    layout: Layout = "profusion",
) -> PromptNetConfig:
    """The sizes of a PromptNet for a base's UNet, its text towers of these widths and an image tower of this width.

    layout: see `in_layout`. Raises PromptNetError where theirs has no such thing.
    """
    second = "noisy" if with_noise else "none"
    config = PromptNetConfig(unet, image_width, tuple(text_widths), tokens=tokens, second_latent=second)
    return in_layout(config, layout)


def in_layout(config: PromptNetConfig, layout: Layout) -> PromptNetConfig:
    """The same sizes in a layout: "authors" is one that their released class reads, with one word that holds its
    position, no norm, and the latent being denoised as its second one. Raises PromptNetError where theirs has no such
    thing."""
    if layout == "profusion":
        return config
    if len(config.text_widths) > 1 or config.tokens > 1:
        raise PromptNetError(
            "the authors' PromptNet makes one word for one text encoder: leave --tokens at 1, and train in our own "
            "layout for a model with two"
        )
    return replace(config, second_latent="noisy", holds_position=True, normalise=False)


def new_promptnet(base: Pipeline, config: PromptNetConfig, noun: str | None = None, seed: int = 0) -> PromptNet:
    """A PromptNet whose encoder is the base's, and whose S* is a noun's embedding or the mean word's, with the position
    of the first training prompt where it holds one. Raises PromptNetError for a noun that the base was never taught."""
    spreads = [typical_embedding(table)[1] for table in _tables(base)]
    start, generator = starting_word(base, config, noun), torch.Generator().manual_seed(seed)
    return PromptNet.from_unet(base.unet.state_dict(), config, generator, start, torch.cat(spreads))


def starting_word(base: Pipeline, config: PromptNetConfig, noun: str | None = None) -> Tensor:
    """S* as a noun's embedding or the mean word's, (width,); (tokens, width) where it holds its position."""
    parts = []
    for tower, table in zip(base.towers, _tables(base), strict=True):
        start, _ = typical_embedding(table)
        if noun is not None:
            start = table[words_to_ids(noun)].mean(dim=0)
            if not start.any():
                raise PromptNetError(
                    f"this model was never taught the word {noun!r}: start from a noun it knows, or from none"
                )
        if config.holds_position:
            rows = list(prompt_tokens(WORD_PROMPTS[0], config.tokens)[1])
            start = start + tower.text_model.embeddings.position_embedding.weight[rows].float().cpu()
        parts.append(start)
    return torch.cat(parts, dim=-1)


def _tables(base: Pipeline) -> list[Tensor]:
    return [tower.text_model.embeddings.token_embedding.weight.float().cpu() for tower in base.towers]
