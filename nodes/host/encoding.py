"""Pictures as the models take them, and every check that what is connected belongs together."""

from __future__ import annotations

from typing import Any

from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...profusion.infusion import Layer, UnsupportedModelError, architecture_name, cross_attention_layers
from ...profusion.pictures import latent_masks
from ...profusion.references import NATIVE
from ...profusion.residual.training import Reference

_PARTS = {"clip": "text encoder", "vae": "VAE", "clip_vision": "image encoder"}


def check_connected(**parts: Any) -> None:
    """Raise ValueError, which names it, where a part of a checkpoint (clip, vae, clip_vision) is not there."""
    for name, part in parts.items():
        if part is None:
            raise ValueError(f"{name} is None: the checkpoint that was loaded has no {_PARTS[name]}")


def model_layers(model: ModelPatcher) -> list[Layer]:
    """The cross-attention layers of a MODEL. A model that has none is refused by name."""
    network = model.get_model_object("diffusion_model")
    try:
        return cross_attention_layers(dict(network.named_parameters()))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{type(model.model).__name__} ({type(network).__name__}) is not supported: {error}. Connect a model that "
            "has it, such as Toybox Loader's whose base is UNet"
        ) from error


def native_size(model: ModelPatcher) -> int | None:
    """Pixels a side of the pictures that a MODEL was trained on; None where that is not known."""
    try:
        name = architecture_name(model_layers(model))
    except UnsupportedModelError:
        return None
    wide = name == "SD 2.x" and model.model.model_type == ModelType.V_PREDICTION
    return 768 if wide else NATIVE.get(name)


def encode_references(model: ModelPatcher, vae: VAE, pictures: Tensor, masks: Tensor) -> list[Reference]:
    """Pictures (M, H, W, 3) and masks (M, H, W) as latents on the model's device, scaled as it takes them."""
    latents = vae.encode(pictures)
    latent_format = model.get_model_object("latent_format")
    if latents.ndim != 4 or latents.shape[1] != latent_format.latent_channels:
        raise ValueError(
            f"the VAE makes latents of shape {tuple(latents.shape[1:])} and the model takes "
            f"{latent_format.latent_channels} channels: use the vae that belongs to the model"
        )
    latents = latent_format.process_in(latents.float()).to(model.load_device)
    weights = latent_masks(masks, latents.shape[-2:]).to(model.load_device)
    return [Reference(latent, weight) for latent, weight in zip(latents, weights, strict=True)]
