"""Toybox in the host's own classes: its UNet as a MODEL, its text tower as a CLIP, its VAE, its image tower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import folder_paths
import torch

from ...profusion.models.configs import UNetConfig
from ...profusion.toybox.configs import TOYBOX, TOYBOX_MMDIT, TOYBOX_TEXT, TOYBOX_VAE
from ...profusion.toybox.drawing import SIZE
from ...profusion.toybox.pipeline import WEIGHTS, load_network

VISION_CONFIG = "clip_vision_config.json"  # beside the weights: the host reads the tower's sizes from such a file


class Toybox(comfy.supported_models.SD15):
    """SD 1.5 in every respect but its sizes."""

    unet_config = {}
    unet_extra_config = {"num_heads": TOYBOX.num_heads, "num_head_channels": -1}


class ToyboxMMDiT(comfy.supported_models.SD3):
    """SD 3 in every respect but its sizes, the latents that it draws in, and an unshifted schedule."""

    unet_config = {}
    unet_extra_config = {}
    latent_format = comfy.latent_formats.SD15
    sampling_settings = {"shift": 1.0}


def unet_config(config: UNetConfig = TOYBOX) -> dict[str, Any]:
    """A UNet of the kernel's as the host's classes are told of it."""
    blocks = [depth for depth in config.transformer_depth for _ in range(config.num_res_blocks)]
    outputs = [depth for depth in config.transformer_depth for _ in range(config.num_res_blocks + 1)]
    return {
        "image_size": 32,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": config.model_channels,
        "channel_mult": list(config.channel_mult),
        "num_res_blocks": [config.num_res_blocks] * len(config.channel_mult),
        "transformer_depth": blocks,
        "transformer_depth_output": outputs,
        "transformer_depth_middle": config.middle_depth,
        "context_dim": config.context_dim,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config.use_linear,
        "adm_in_channels": None,
        "legacy": False,
        "dtype": torch.float32,
    }


def _mmdit_config() -> dict[str, Any]:
    width = TOYBOX_MMDIT.width
    embedder = {"in_features": TOYBOX_MMDIT.context_dim, "out_features": width}
    return {
        "in_channels": TOYBOX_MMDIT.in_channels,
        "out_channels": TOYBOX_MMDIT.in_channels,
        "patch_size": TOYBOX_MMDIT.patch_size,
        "depth": TOYBOX_MMDIT.heads,
        "num_blocks": TOYBOX_MMDIT.blocks,
        "mlp_ratio": TOYBOX_MMDIT.mlp_ratio,
        "input_size": None,
        "adm_in_channels": None,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": embedder},
        "qk_norm": "rms",
        "pos_embed_scaling_factor": None,
        "x_block_self_attn_layers": [],
    }


def load_model(folder: Path | None = None, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The UNet as a MODEL. Its weights never come and go: disable_dynamic, which newer hosts pass, is ignored."""
    return _patcher(Toybox(unet_config()), "unet", load_model, folder)


def load_mmdit(folder: Path | None = None, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The joint-attention transformer as a MODEL; disable_dynamic as in `load_model`."""
    return _patcher(ToyboxMMDiT(_mmdit_config()), "mmdit", load_mmdit, folder)


def _patcher(config, network: str, loader: Callable, folder: Path | None) -> comfy.model_patcher.ModelPatcher:
    device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=offload_device)
    model.diffusion_model.load_state_dict(load_network(network, folder), strict=True)
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload_device)
    patcher.cached_patcher_init = (loader, (folder,))  # how newer hosts load it once more, to train on or for a GPU
    return patcher


def load_clip(embedding_directory: list[str] | None = None, folder: Path | None = None) -> comfy.sd.CLIP:
    """The text tower as a CLIP, with the host's own tokenizer."""
    sizes = {
        "hidden_size": TOYBOX_TEXT.width,
        "num_hidden_layers": TOYBOX_TEXT.layers,
        "num_attention_heads": TOYBOX_TEXT.heads,
        "intermediate_size": TOYBOX_TEXT.intermediate,
    }
    target = comfy.supported_models_base.ClipTarget(_tokenizer, comfy.sd1_clip.SD1ClipModel)
    clip = comfy.sd.CLIP(target, embedding_directory=embedding_directory, model_options={"clip_l_model_config": sizes})
    clip.cond_stage_model.clip_l.transformer.load_state_dict(load_network("text", folder), strict=True)
    return clip


def _tokenizer(embedding_directory=None, tokenizer_data=None) -> comfy.sd1_clip.SD1Tokenizer:
    tokenizer = comfy.sd1_clip.SD1Tokenizer(embedding_directory, tokenizer_data or {})
    tokenizer.clip_l.embedding_size = TOYBOX_TEXT.width  # of the textual inversions that `embedding:` may name
    return tokenizer


def embedding_folders() -> list[str]:
    """Where the host looks for textual inversions."""
    return folder_paths.get_folder_paths("embeddings")


def load_vae(folder: Path | None = None) -> comfy.sd.VAE:
    """The autoencoder as a VAE."""
    sizes = {
        "double_z": True,
        "z_channels": TOYBOX_VAE.latent_channels,
        "resolution": SIZE,
        "in_channels": 3,
        "out_ch": 3,
        "ch": TOYBOX_VAE.channels,
        "ch_mult": list(TOYBOX_VAE.channel_mult),
        "num_res_blocks": TOYBOX_VAE.num_res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    state = load_network("vae", folder)
    vae = comfy.sd.VAE(
        sd=dict(state),
        dtype=torch.float32,
        config={"params": {"ddconfig": sizes, "embed_dim": TOYBOX_VAE.latent_channels}},
    )
    vae.first_stage_model.load_state_dict(state, strict=True)
    return vae


def load_clip_vision(folder: Path | None = None) -> comfy.clip_vision.ClipVisionModel:
    """The image tower as a CLIP_VISION."""
    vision = comfy.clip_vision.ClipVisionModel((folder or WEIGHTS) / VISION_CONFIG)
    vision.model.load_state_dict(load_network("vision", folder), strict=True)
    return vision
