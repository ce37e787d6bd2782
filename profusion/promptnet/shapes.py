"""The tensors of a PromptNet, by its configuration alone: what a file must hold, found out before anything is built.

Names and shapes come one by one, so that whoever reads them can stop: a configuration may ask for more than there is.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..models.configs import UNetConfig
from .network import PromptNetConfig, feature_blocks

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def promptnet_shapes(config: PromptNetConfig) -> Shapes:
    """Name and shape of every entry of a PromptNet's state dict."""
    unet, words = config.unet, config.tokens * config.text_width
    yield "start", (config.tokens, config.text_width)
    yield "spread", (config.text_width,)
    channels, skips = yield from _encoder(unet)
    yield from _res_block("middle_block.0", channels, channels, unet)
    yield from _transformer("middle_block.1", channels, unet.middle_depth, unet)
    yield from _res_block("middle_block.2", channels, channels, unet)
    if config.second_latent != "none":
        yield from _both("second_latent.0", unet.model_channels, unet.in_channels, 3, 3)
        yield from _both("second_latent.2", unet.model_channels, unet.model_channels, 3, 3)
    yield from _both("image_projection", unet.context_dim, config.image_width)
    features, strides = feature_blocks(unet)
    for index, stride in enumerate(strides):
        inside = skips[features[index]] if index < len(features) else channels
        yield from _both(f"projections.{index}", config.projection, inside, stride, stride)
    yield from _both("output", words, len(strides) * config.projection, config.grid, config.grid)


def _encoder(unet: UNetConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Those of time_embed and input_blocks; returns the last block's channels and those of every block."""
    channels = unet.model_channels
    yield from _both("time_embed.0", 4 * channels, channels)
    yield from _both("time_embed.2", 4 * channels, 4 * channels)
    yield from _both("input_blocks.0.0", channels, unet.in_channels, 3, 3)
    skips = [channels]
    for level, (mult, depth) in enumerate(zip(unet.channel_mult, unet.transformer_depth, strict=True)):
        for _ in range(unet.num_res_blocks):
            block, before, channels = f"input_blocks.{len(skips)}", channels, mult * unet.model_channels
            yield from _res_block(f"{block}.0", before, channels, unet)
            if depth:
                yield from _transformer(f"{block}.1", channels, depth, unet)
            skips.append(channels)
        if level < len(unet.channel_mult) - 1:
            yield from _both(f"input_blocks.{len(skips)}.0.op", channels, channels, 3, 3)
            skips.append(channels)
    return channels, skips


def _both(name: str, *weight: int) -> Shapes:
    """A weight and its bias."""
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]


def _res_block(name: str, before: int, after: int, unet: UNetConfig) -> Shapes:
    yield from _both(f"{name}.in_layers.0", before)
    yield from _both(f"{name}.in_layers.2", after, before, 3, 3)
    yield from _both(f"{name}.emb_layers.1", after, 4 * unet.model_channels)
    yield from _both(f"{name}.out_layers.0", after)
    yield from _both(f"{name}.out_layers.3", after, after, 3, 3)
    if before != after:
        yield from _both(f"{name}.skip_connection", after, before, 1, 1)


def _transformer(name: str, width: int, depth: int, unet: UNetConfig) -> Shapes:
    projection = (width, width) if unet.use_linear else (width, width, 1, 1)
    yield from _both(f"{name}.norm", width)
    yield from _both(f"{name}.proj_in", *projection)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        yield from _attention(f"{block}.attn1", width, width)
        yield from _both(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _both(f"{block}.ff.net.2", width, 4 * width)
        yield from _attention(f"{block}.attn2", width, unet.context_dim)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _both(f"{block}.{norm}", width)
    yield from _both(f"{name}.proj_out", *projection)


def _attention(name: str, width: int, context: int) -> Shapes:
    yield f"{name}.to_q.weight", (width, width)
    yield f"{name}.to_k.weight", (width, context)
    yield f"{name}.to_v.weight", (width, context)
    yield from _both(f"{name}.to_out.0", width, width)
