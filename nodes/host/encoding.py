"""Pictures as the models take them, and every check that what is connected belongs together."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...profusion.pictures import have_frames, latent_masks
from ...profusion.residual.training import Reference

_PARTS = {"clip": "text encoder", "vae": "VAE", "clip_vision": "image encoder"}


def check_connected(**parts: Any) -> None:
    """Raise ValueError, which names it, where a part of a checkpoint (clip, vae, clip_vision) is not there."""
    for name, part in parts.items():
        if part is None:
            raise ValueError(f"{name} is None: the checkpoint that was loaded has no {_PARTS[name]}")


def encode_references(
    model: ModelPatcher, vae: VAE, pictures: Tensor, masks: Tensor, patch: int = 1
) -> list[Reference]:
    """Pictures (M, H, W, 3) and masks (M, H, W) as latents on the model's device, scaled as it takes them.

    patch: cells of the latent a side that the model takes as one. A video model's latents are those of one frame.
    """
    latent_format = model.get_model_object("latent_format")
    if have_frames(latent_format):  # each is a video of its own
        latents = torch.cat([vae.encode(picture) for picture in pictures.split(1)])
        latents = latents[:, :, 0] if latents.ndim == 5 else latents
    else:
        latents = vae.encode(pictures)
    if latents.ndim != 4 or latents.shape[1] != latent_format.latent_channels:
        raise ValueError(
            f"the VAE makes latents of shape {tuple(latents.shape[1:])} and the model takes "
            f"{latent_format.latent_channels} channels: use the vae that belongs to the model"
        )
    latents = scaled_latents(latent_format, latents.float()).to(model.load_device)
    weights = latent_masks(masks, latents.shape[-2:], patch).to(model.load_device)
    return [Reference(latent, weight) for latent, weight in zip(latents, weights, strict=True)]


def scaled_latents(latent_format: Any, latents: Tensor) -> Tensor:
    """Latents (M, C, H, W) as the model takes them; what a video model's format is given has frames."""
    if have_frames(latent_format):
        return latent_format.process_in(latents[:, :, None])[:, :, 0]
    return latent_format.process_in(latents)
