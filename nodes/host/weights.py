"""A model's own weights, as they are without patches, wherever the host keeps them; and the sizes that they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...profusion.checkpoints.sizes import UnlikeSD, unet_config
from ...profusion.infusion import UnsupportedModelError
from ...profusion.models.configs import UNetConfig
from ...profusion.promptnet.network import ENCODER, PromptNetError

UNET = "diffusion_model."
_OTHER = "Take a model of SD 1.x, SD 2.x or SDXL"
_ADVICE = "Load it unquantised: a checkpoint in float32, float16, bfloat16 or float8"


def own_weights(
    patcher: ModelPatcher, prefix: str, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """The weights below a prefix, by the rest of their names: the model's own, whatever patches are on it.

    They lie where the host keeps them, and are its own objects: copy them. Raises PromptNetError, which names the
    first, where one cannot be read as numbers.
    """
    found = {}
    for name, entries in patcher.get_key_patches(prefix).items():
        short = name.removeprefix(prefix)
        if wanted(short):
            found[short] = _readable(name, entries[0], type(patcher.model).__name__)
    return found


def _readable(name: str, entry: Any, model: str) -> Tensor:
    """A weight of an entry of the host's, brought out of the form that it is stored in where the host says how."""
    weight, convert = entry if isinstance(entry, tuple) else (entry, None)
    value = weight if convert is None else convert(weight, inplace=False)
    # What quantises has tensors of its own kind, whose numbers are no weights.
    if type(value) not in (Tensor, nn.Parameter) or not value.is_floating_point():
        kind = type(value).__name__ if type(value) not in (Tensor, nn.Parameter) else str(value.dtype)
        raise PromptNetError(
            f"a PromptNet starts from the weights of {model}, and {name} is stored in a form that cannot be read "
            f"({kind}). {_ADVICE}"
        )
    if value.is_meta:
        raise PromptNetError(f"a PromptNet starts from the weights of {model}, and {name} is not in memory. {_ADVICE}")
    return value


def own_unet(model: ModelPatcher) -> tuple[UNetConfig, dict[str, Tensor]]:
    """The sizes of a MODEL's UNet, and the weights of its encoder and middle by a PromptNet's names.

    Raises PromptNetError for weights that cannot be read, UnsupportedModelError for a UNet that no PromptNet serves.
    """
    weights = own_weights(model, UNET, lambda name: name.startswith(ENCODER))
    entries, name = model.get_key_patches(UNET), type(model.model).__name__
    shapes = {key.removeprefix(UNET): tuple(entry[0][0].shape) for key, entry in entries.items()}
    try:
        config = unet_config(shapes, **_heads(model.model.diffusion_model))
    except (ValueError, LookupError, AttributeError, ZeroDivisionError) as problem:
        said = str(problem) if isinstance(problem, UnlikeSD) else f"has other parts than SD's ({problem!s:.100})"
        raise UnsupportedModelError(
            f"no PromptNet can be made for {name}: its UNet is one that {said}. {_OTHER}"
        ) from problem
    if config.in_channels != config.out_channels:
        raise UnsupportedModelError(
            f"no PromptNet can be made for {name}: its UNet takes {config.in_channels} channels and gives "
            f"{config.out_channels}, as those for inpainting and editing do. {_OTHER}"
        )
    return config, weights


def _heads(network: nn.Module) -> dict[str, int]:
    """`num_heads` or `head_channels` of a host's UNet, which shapes do not say: what all its layers have in common."""
    layers = [part for name, part in network.named_modules() if name.endswith(".attn2")]
    counts, widths = {part.heads for part in layers}, {part.dim_head for part in layers}
    if len(counts) == 1:
        return {"num_heads": counts.pop()}
    if len(widths) == 1:
        return {"head_channels": widths.pop()}
    raise UnlikeSD("has layers with other numbers of heads, and heads of other widths")


def copied(value: Tensor) -> Tensor:
    """A float32 copy of a weight on the CPU, which autograd takes."""
    with torch.inference_mode(False), torch.no_grad():
        return value.detach().to("cpu", torch.float32, copy=True)
