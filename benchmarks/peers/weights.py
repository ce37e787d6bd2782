"""Tuning the UNet's own weights: DreamBooth (arXiv 2208.12242) and Custom Diffusion (arXiv 2212.04488)."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.peers.base import RARE_WORD, Peer
from profusion.promptnet.pseudo_word import PLACEHOLDER, encode


class DreamBooth(Peer):
    """Every weight of the UNet, with the paper's class-prior loss on pictures that the model
    itself drew of the class."""

    name = "DreamBooth"
    rates = (3e-4, 1e-3, 3e-3)
    note = f"the whole UNet, '{RARE_WORD}' before the noun, class-prior loss of weight 1; the text tower stays"
    prior = 1.0

    def __init__(self, toybox, noun):
        super().__init__(replace(toybox, unet=copy.deepcopy(toybox.unet)), noun)
        self.phrase = f"{RARE_WORD} {noun}"
        for parameter in self.trained().values():
            parameter.requires_grad_(True)

    def trained(self) -> dict[str, Tensor]:
        return dict(self.unet.named_parameters())


class CustomDiffusion(DreamBooth):
    """The keys and values of every cross-attention layer, and a new word S* before the noun."""

    name = "Custom Diffusion-style K, V"
    rates = (1e-3, 3e-3, 1e-2)
    note = "W_K, W_V of the cross-attention layers and a word before the noun, class-prior loss of weight 1"

    def __init__(self, toybox, noun):
        self.word = torch.zeros(
            1, toybox.text.text_model.embeddings.token_embedding.weight.shape[1]
        )  # as a rare word's
        super().__init__(toybox, noun)
        self.phrase = f"{PLACEHOLDER} {noun}"

    def trained(self) -> dict[str, Tensor]:
        chosen = (".attn2.to_k.weight", ".attn2.to_v.weight")
        weights = {name: weight for name, weight in self.unet.named_parameters() if name.endswith(chosen)}
        return {**weights, "word": self.word}

    def context(self, prompt: str) -> Tensor:
        return encode(self.toybox.text, prompt, self.word[None]) if PLACEHOLDER in prompt else super().context(prompt)
