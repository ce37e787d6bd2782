"""PromptNet on Toybox, without a host: made from its networks, and trained on them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion import noise_predictor
from ..pretraining import promptnet as pretraining
from ..promptnet.changes import attention_layers, start_changes
from ..promptnet.finetune import FinetuneOptions, FinetunePictures, FinetuneTraining
from ..promptnet.network import PromptNet, PromptNetConfig
from ..promptnet.pseudo_word import encode_tokens, prompt_tokens
from ..promptnet.training import (
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
    """Toybox's own, about to be trained; see `pretraining.promptnet.new_promptnet`."""
    return pretraining.new_promptnet(toybox, config, noun, seed)


def toybox_training(
    toybox: Toybox, network: PromptNet, pictures: PictureSet, options: PromptNetOptions
) -> PromptNetTraining:
    """A PromptNet's training on Toybox. `toybox.unet`, `toybox.text` and `network` are on the device to train on."""
    return PromptNetTraining(network, *_evaluation(toybox, network, options), pictures, options)


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
