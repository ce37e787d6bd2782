"""A PromptNet as its authors' class reads it: diffusers' names, a .bin of torch's and config.json beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import files
from ..promptnet.file import diffusers_name
from ..promptnet.network import PromptNetConfig, PromptNetError

_OWN = ("start", "spread")  # which theirs has not
_VERSION = "0.15.0.dev0"  # of diffusers, which their code brings along


def authors_state(weights: Mapping[str, Tensor], config: PromptNetConfig) -> dict[str, Tensor]:
    """Our state dict in their names, where S* is the output of the last convolution: it takes `start` and `spread`.

    Raises PromptNetError for a PromptNet that theirs cannot be, as it has a norm or several words.
    """
    if config.normalise or not config.holds_position or config.tokens != 1 or config.second_latent == "none":
        raise PromptNetError(
            "the authors' class has no norm, makes one word that holds its position, and takes a second latent: train "
            "with --layout authors to have such a PromptNet"
        )
    found = {
        diffusers_name(name, config.unet): value.float().clone() for name, value in weights.items() if name not in _OWN
    }
    last, spread = diffusers_name("output.weight", config.unet), weights["spread"].float()
    found[last] *= spread[:, None, None, None]
    bias = diffusers_name("output.bias", config.unet)
    found[bias] = found[bias] * spread + weights["start"].float()[0]
    return found


def authors_config(config: PromptNetConfig) -> dict[str, object]:
    """What their constructor takes, by its names."""
    unet = config.unet
    channels = [mult * unet.model_channels for mult in unet.channel_mult]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in unet.transformer_depth]
    return {
        "_class_name": "PromptNetModel",
        "_diffusers_version": _VERSION,
        "center_input_sample": False,  # their constructor has it not, and their `forward` asks for it
        "in_channels": unet.in_channels,
        "region_kernel_size": config.grid,
        "region_proj_channel": config.projection,
        "prompt_channel": config.text_width,
        "down_block_types": down,
        "block_out_channels": channels,
        "res_block_out_channels": channels,
        "layers_per_block": unet.num_res_blocks,
        "cross_attention_dim": unet.context_dim,
        "attention_head_dim": [unet.heads(width) for width in channels],
        "use_linear_projection": unet.use_linear,
        "use_clip_vision_embeds": config.image_width == 1280,
        "use_res": False,
        "with_noise": config.with_noise,
    }


def save(weights: Mapping[str, Tensor], config: PromptNetConfig, folder: Path) -> Path:
    """Write `folder`/promptnet/, which their `from_pretrained` takes; returns it. Raises PromptNetError."""
    state, where = authors_state(weights, config), folder / "promptnet"
    path = where / "diffusion_pytorch_model.bin"
    temporary = files.temporary_beside(path)
    try:
        where.mkdir(parents=True, exist_ok=True)
        torch.save(state, temporary)
        temporary.replace(path)
        text = json.dumps(authors_config(config), indent=2) + "\n"
        files.write_atomically(where / "config.json", text.encode())
    except (OSError, RuntimeError) as problem:
        temporary.unlink(missing_ok=True)
        raise PromptNetError(
            f"The PromptNet could not be saved in '{where}': {files.why_not_written(problem)}"
        ) from problem
    return where
