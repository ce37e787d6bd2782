"""PromptNet on Toybox, without a host: made from its networks, and trained on them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion import noise_predictor
from ..models.tokenizer import words_to_ids
from ..promptnet.changes import attention_layers, start_changes
from ..promptnet.finetune import FinetuneOptions, FinetunePictures, FinetuneTraining
from ..promptnet.network import PromptNet, PromptNetConfig, PromptNetError, typical_embedding
from ..promptnet.pseudo_word import encode_tokens, prompt_tokens
from ..promptnet.training import (
    WORD_PROMPTS,
    EncodeWord,
    PictureSet,
    PredictWithContext,
    PromptNetOptions,
    PromptNetTraining,
)
from .configs import TOYBOX_PROMPTNET
from .pipeline import Toybox


def new_promptnet(
    toybox: Toybox, config: PromptNetConfig = TOYBOX_PROMPTNET, noun: str | None = None, seed: int = 0
) -> PromptNet:
    """A PromptNet that is about to be trained: its encoder is Toybox's, its S* a noun's embedding or the mean word's,
    with the position of the first training prompt where it holds one."""
    start = starting_word(toybox, config, noun)
    _, spread = typical_embedding(toybox.text.text_model.embeddings.token_embedding.weight)
    return PromptNet.from_unet(toybox.unet.state_dict(), config, torch.Generator().manual_seed(seed), start, spread)


def starting_word(toybox: Toybox, config: PromptNetConfig, noun: str | None = None) -> Tensor:
    """S* as a noun's embedding or the mean word's, (width,); (tokens, width) where it holds its position."""
    embeddings = toybox.text.text_model.embeddings
    table = embeddings.token_embedding.weight
    start, _ = typical_embedding(table)
    if noun is not None:
        start = table[words_to_ids(noun)].mean(dim=0)
        if not start.any():
            raise PromptNetError(f"Toybox was never taught the word {noun!r}: start from a noun it knows, or from none")
    if config.holds_position:
        start = start + embeddings.position_embedding.weight[list(prompt_tokens(WORD_PROMPTS[0], config.tokens)[1])]
    return start


class _InBfloat16(PromptNetTraining):
    """Convolutions and matrix products in bfloat16; the loss, what learns and its moments stay in float32."""

    def loss_of(self, *given, **named) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16):
            return super().loss_of(*given, **named).float()


def toybox_training(
    toybox: Toybox, network: PromptNet, pictures: PictureSet, options: PromptNetOptions, bfloat16: bool = False
) -> PromptNetTraining:
    """A PromptNet's training on Toybox. `toybox.unet`, `toybox.text` and `network` are on the device to train on."""
    kind = _InBfloat16 if bfloat16 else PromptNetTraining
    return kind(network, *_evaluation(toybox, network, options), pictures, options)


def toybox_finetuning(
    toybox: Toybox, network: PromptNet, pictures: FinetunePictures, options: FinetuneOptions, attention: bool = True
) -> FinetuneTraining:
    """A PromptNet's fine-tuning and, if asked for, that of Toybox's attention layers, whose `changes` are to be put on
    it by `changes.changed` while it trains and while it draws. network: a `trainable_copy`."""
    layers = attention_layers(dict(toybox.unet.named_parameters())) if attention else {}
    changes = start_changes(layers, options.rank, torch.Generator().manual_seed(options.seed))
    return FinetuneTraining(network, *_evaluation(toybox, network, options), pictures, options, changes)


def _evaluation(toybox: Toybox, network: PromptNet, options: PromptNetOptions) -> tuple[PredictWithContext, EncodeWord]:
    """How a training evaluates Toybox's UNet, and its text encoder with S*."""
    prompts = [prompt_tokens(prompt, network.config.tokens) for prompt in options.prompts]

    def predict_noise(x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        return noise_predictor(lambda x, t: toybox.unet(x, t, context))(x, sigma)

    def encode_word(prompt: int, pseudo_word: Tensor) -> Tensor:
        return encode_tokens(toybox.text, *prompts[prompt], pseudo_word, holds_position=network.config.holds_position)

    return predict_noise, encode_word
