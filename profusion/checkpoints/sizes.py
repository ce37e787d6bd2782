"""The sizes of a checkpoint's networks, from the shapes of their tensors. All names are without their prefix."""

from __future__ import annotations

import re

from ..models.configs import MAX_LEVELS, TextConfig, UNetConfig, VAEConfig
from .contents import Shapes

MAX_BLOCKS = 64  # of a half of a UNet; the largest has 12


class UnlikeSD(ValueError):
    """Networks that have no configuration here. The message completes "it is one whose UNet ..."."""


def count(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow a prefix, from 0 on without a gap: blocks of a level, layers of a tower."""
    found = {match[1] for name in shapes if (match := re.match(re.escape(prefix) + r"(\d{1,4})\.", name))}
    number = 0
    while str(number) in found:
        number += 1
    return number


def _depth(shapes: Shapes, block: str) -> int:
    return count(shapes, f"{block}.1.transformer_blocks.")


def unet_config(shapes: Shapes, **heads: int) -> UNetConfig:
    """A UNet's configuration. heads: `num_heads` or `head_channels`, which shapes do not say.

    Raises ValueError where there is none: it says which size makes no sense.
    """
    channels, depths, levels = shapes["input_blocks.0.0.weight"][0], [[]], [[]]
    blocks = count(shapes, "input_blocks.")
    if blocks > MAX_BLOCKS:
        raise ValueError(f"{blocks} input blocks")
    for index in range(1, blocks):
        block = f"input_blocks.{index}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
            depths.append([])
            continue
        levels[-1].append(shapes[f"{block}.0.out_layers.3.weight"][0])
        depths[-1].append(_depth(shapes, block))
    same = all(level and len(set(level)) == 1 for level in (*levels, *depths))
    if not same or len({len(level) for level in levels}) != 1 or not channels or any(w[0] % channels for w in levels):
        raise UnlikeSD("has blocks within a level that differ, as distilled models have them (SSD-1B, Vega, KOALA)")
    middle = shapes["middle_block.1.proj_in.weight"]
    return UNetConfig(
        channels,
        tuple(level[0] // channels for level in levels),
        len(levels[0]),
        tuple(level[0] for level in depths),
        count(shapes, "middle_block.1.transformer_blocks."),
        shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        use_linear=len(middle) == 2,
        adm_channels=shapes["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in shapes else None,
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        **heads,
    )


def vae_config(shapes: Shapes, scale_factor: float) -> VAEConfig:
    """A VAE's configuration; the scale of its latents is the family's, shapes do not say it."""
    channels, levels = shapes["encoder.conv_in.weight"][0], count(shapes, "encoder.down.")
    widths = [shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)]
    if not 1 <= levels <= MAX_LEVELS or channels % 32 or any(width % channels or not width for width in widths):
        raise ValueError(f"a VAE of {channels} channels with levels of {widths!s:.60}")
    return VAEConfig(
        channels,
        tuple(width // channels for width in widths),
        count(shapes, "encoder.down.0.block."),
        shapes["post_quant_conv.weight"][0],
        scale_factor,
    )


def text_config(shapes: Shapes, **as_family_has_it) -> TextConfig:
    """A text tower's configuration, from transformers' names. CLIP's heads are 64 wide in every checkpoint."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    if width % 64 or not width:
        raise ValueError(f"a text encoder of width {width}")
    return TextConfig(
        width,
        count(shapes, "text_model.encoder.layers."),
        width // 64,
        shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        vocabulary,
        shapes["text_model.embeddings.position_embedding.weight"][0],
        projected="text_projection.weight" in shapes,
        **as_family_has_it,
    )
