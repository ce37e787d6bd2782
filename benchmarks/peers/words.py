"""A new word: Textual Inversion (arXiv 2208.01618), and with its keys locked, after Perfusion (arXiv 2305.01644)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.base import Peer, moved_values
from profusion.infusion import ExtraOptions, Patches, Placement, cross_attention_layers
from profusion.models.tokenizer import words_to_ids
from profusion.promptnet.pseudo_word import PLACEHOLDER, encode, prompt_tokens, with_noun


class TextualInversion(Peer):
    """The embedding of a new word S*, which takes the noun's place."""

    name = "Textual Inversion"
    rates = (0.01, 0.03, 0.1)
    note = "the embedding of one word, begun as the noun's"

    def __init__(self, toybox, noun):
        super().__init__(toybox, noun)
        self.phrase = PLACEHOLDER
        table = toybox.text.text_model.embeddings.token_embedding.weight
        self.word = table[words_to_ids(noun)].detach().clone().requires_grad_(True)  # (1, 128)

    def trained(self) -> dict[str, Tensor]:
        return {"word": self.word}

    def context(self, prompt: str) -> Tensor:
        return encode(self.toybox.text, prompt, self.word[None]) if PLACEHOLDER in prompt else super().context(prompt)


class KeyLock(TextualInversion):
    """S*, whose key in every cross-attention layer is the noun's, and whose value is learned in each.

    Simplified: the key is taken from the same prompt with the noun, not from a mean over prompts; the rank-1 edit of
    W_V is W_V (c + delta_i) at S*'s row; it acts on that row wholly and on no other, without Perfusion's soft gate.
    """

    name = "Perfusion-style key lock"
    rates = (0.003, 0.01, 0.03)
    note = (
        "S*'s embedding and its value in each layer; its key is the noun's. No soft gate, see benchmarks/peers/words.py"
    )

    def __init__(self, toybox, noun):
        super().__init__(toybox, noun)
        layers = cross_attention_layers(dict(toybox.unet.named_parameters()))
        self.layers = tuple(layer.name for layer in layers)
        self.delta = torch.zeros(len(layers), 1, layers[0].context_dim, requires_grad=True)

    def trained(self) -> dict[str, Tensor]:
        return {**super().trained(), "delta": self.delta}

    def patches(self, prompt: str) -> Patches:
        if PLACEHOLDER not in prompt:
            return {}
        _, rows = prompt_tokens(prompt)
        locked = self.toybox.context(with_noun(prompt, self.noun))[:, list(rows)]  # (1, 1, 128)
        places = torch.tensor(rows)

        def lock(n: Tensor, context: Tensor, value: Tensor, extra_options: ExtraOptions):
            kinds = extra_options["cond_or_uncond"]
            keys = [
                rows if kind else rows.index_copy(1, places, locked.expand(len(rows), -1, -1))
                for kind, rows in zip(kinds, context.chunk(len(kinds)), strict=True)
            ]
            return n, torch.cat(keys), value

        values = moved_values(Placement(self.delta, self.layers, rows))
        return {**values, "attn2_patch": [lock, *values["attn2_patch"]]}
