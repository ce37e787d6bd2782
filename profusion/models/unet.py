"""The denoising UNet of Stable Diffusion, with ComfyUI's `UNetModel` parameter names and patch points.

Sizes in shape comments: B rows, C channels, H x W latent cells, T = H * W tokens, L context rows, D context width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import apply_map, attention, attention_map
from .configs import UNetConfig


def timestep_embedding(timesteps: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of the timestep, cosines first: (B,) -> (B, width)."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    angles = timesteps[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two convolutions with the timestep added between them."""

    def __init__(self, channels: int, embedding: int, out_channels: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int, factor: int = 4):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, width * factor), nn.Dropout(0.0), nn.Linear(width * factor, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Attention of x over a context (over x itself where there is none)."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor, value: Tensor | None = None, probe=None) -> Tensor:
        """x (B, T, C), context and value (B, L, D) -> (B, T, C); `probe` is given the map (B, heads, T, L)."""
        query, key = self.to_q(x), self.to_k(context)
        value = self.to_v(context if value is None else value)
        if probe is None:
            return self.to_out(attention(query, key, value, self.heads))
        probabilities = attention_map(query, key, self.heads)
        probe(probabilities)
        return self.to_out(apply_map(probabilities, value, self.heads))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention (the layer that both methods patch), feed-forward."""

    def __init__(self, width: int, heads: int, context_dim: int):
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_dim, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        n = self.norm1(x)
        x = x + self.attn1(n, n)
        x = x + self._cross_attention(self.norm2(x), context, options)
        return x + self.ff(self.norm3(x))

    def _cross_attention(self, n: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        value = context
        patches = options.get("patches", {})
        for patch in patches.get("attn2_patch", ()):
            n, context, value = patch(n, context, value, options)
        probe = options.get("attention_probe")
        if probe is not None:
            layer = (*options["block"], options["block_index"])
            n = self.attn2(n, context, value, lambda probabilities: probe(layer, probabilities))
        else:
            n = self.attn2(n, context, value)
        for patch in patches.get("attn2_output_patch", ()):
            n = patch(n, options)
        return n


class SpatialTransformer(nn.Module):
    """Transformer blocks over the cells of a feature map."""

    def __init__(self, channels: int, heads: int, depth: int, context_dim: int, use_linear: bool):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.use_linear = use_linear
        self.proj_in = nn.Linear(channels, channels) if use_linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, context_dim) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if use_linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        height = x.shape[2]
        options["activations_shape"] = list(x.shape)
        h = self.norm(x)
        h = h if self.use_linear else self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.use_linear else h
        for index, block in enumerate(self.transformer_blocks):
            options["block_index"] = index
            h = block(h, context, options)
        h = self.proj_out(h) if self.use_linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=height)
        return x + (h if self.use_linear else self.proj_out(h))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """To the size of the skip connection it will meet: odd sizes do not double back."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class UNetBlock(nn.Sequential):
    """One entry of input_blocks / output_blocks: its layers take what each of them needs."""

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, options: dict[str, Any], size=None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, options)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class UNetEncoder(nn.Module):
    """The encoder half and the middle of the UNet, which PromptNet has too."""

    def __init__(self, config: UNetConfig, adm_channels: int | None):
        super().__init__()
        width = config.model_channels
        self.width, embedding = width, width * 4
        self.time_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if adm_channels:
            adm = nn.Sequential(nn.Linear(adm_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
            self.label_emb = nn.Sequential(adm)
        self.input_blocks, self.skip_channels, channels = self._encoder(config, embedding)
        self.middle_block = UNetBlock(
            ResBlock(channels, embedding, channels),
            self._transformer(config, channels, config.middle_depth),
            ResBlock(channels, embedding, channels),
        )

    @staticmethod
    def _transformer(config: UNetConfig, channels: int, depth: int) -> SpatialTransformer:
        return SpatialTransformer(channels, config.heads(channels), depth, config.context_dim, config.use_linear)

    def _encoder(self, config: UNetConfig, embedding: int) -> tuple[nn.ModuleList, tuple[int, ...], int]:
        channels = config.model_channels
        blocks, skips = [UNetBlock(nn.Conv2d(config.in_channels, channels, 3, padding=1))], [channels]
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                layers = [ResBlock(channels, embedding, mult * config.model_channels)]
                channels = mult * config.model_channels
                if config.transformer_depth[level]:
                    layers.append(self._transformer(config, channels, config.transformer_depth[level]))
                blocks.append(UNetBlock(*layers))
                skips.append(channels)
            if level != len(config.channel_mult) - 1:
                blocks.append(UNetBlock(Downsample(channels)))
                skips.append(channels)
        return nn.ModuleList(blocks), tuple(skips), channels

    def embed_timesteps(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, 4 * model_channels)."""
        return self.time_embed(timestep_embedding(timesteps, self.width).to(dtype))

    def encode(
        self, x: Tensor, embedding: Tensor, context: Tensor, options: dict[str, Any], added: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The output of every input block, and that of the middle block.

        x (B, C, H, W), embedding of the timesteps, context (B, L, D); `added` (B, model_channels, H, W) joins the
        output of the first block, which is x after one convolution.
        """
        h, outputs = x, []
        for index, block in enumerate(self.input_blocks):
            options["block"] = ("input", index)
            h = block(h, embedding, context, options)
            if added is not None and index == 0:
                h = h + added
            outputs.append(h)
        options["block"] = ("middle", 0)
        return outputs, self.middle_block(h, embedding, context, options)


class UNet(UNetEncoder):
    """eps_theta(x_t, t, c). Build under `torch.device("meta")` to have the shapes without the memory."""

    def __init__(self, config: UNetConfig):
        super().__init__(config, config.adm_channels)
        self.config = config
        width = config.model_channels
        self.output_blocks = self._decoder(config, width * 4, list(self.skip_channels))
        self.out = nn.Sequential(
            nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, config.out_channels, 3, padding=1)
        )

    def _decoder(self, config: UNetConfig, embedding: int, skips: list[int]) -> nn.ModuleList:
        blocks, channels = [], skips[-1]
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for index in range(config.num_res_blocks + 1):
                layers = [ResBlock(channels + skips.pop(), embedding, mult * config.model_channels)]
                channels = mult * config.model_channels
                if config.transformer_depth[level]:
                    layers.append(self._transformer(config, channels, config.transformer_depth[level]))
                if level and index == config.num_res_blocks:
                    layers.append(Upsample(channels))
                blocks.append(UNetBlock(*layers))
        return nn.ModuleList(blocks)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> Tensor:
        """Predict the noise in x.

        x (B, 4, H, W), timesteps (B,) in 0..999, context (B, L, D), y (B, adm) for SDXL -> (B, 4, H, W).
        `transformer_options` is the host's: `patches` holds the lists `attn2_patch` and `attn2_output_patch`;
        `attention_probe(layer, map)` sees every cross-attention map (this computes it explicitly, so it is slow).
        """
        options = dict(transformer_options or {})
        options["original_shape"] = list(x.shape)
        embedding = self.embed_timesteps(timesteps, x.dtype)
        if self.config.adm_channels:
            if y is None:
                raise ValueError(
                    f"this UNet takes a pooled vector y of {self.config.adm_channels} numbers; none was given"
                )
            embedding = embedding + self.label_emb(y)
        skips, h = self.encode(x, embedding, context, options)
        for index, block in enumerate(self.output_blocks):
            options["block"] = ("output", index)
            h = torch.cat([h, skips.pop()], dim=1)
            size = skips[-1].shape[-2:] if skips else None
            h = block(h, embedding, context, options, size)
        return self.out(h)
