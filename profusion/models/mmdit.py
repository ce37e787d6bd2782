"""The joint-attention transformer of Stable Diffusion 3 (MM-DiT, arXiv 2403.03206), with ComfyUI's parameter names.

Picture and text are two streams of rows with weights of their own, which attend to all rows of both together.
Sizes in shape comments: B rows, T picture tokens, L context rows, D width. In attention the text comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import apply_map, attention, attention_map
from .configs import MMDiTConfig
from .unet import timestep_embedding

MIDDLE = 7.5  # of the grid's coordinates, 0..15 along the shorter side whatever the picture's size
FREQUENCIES = 256

Probe = Callable[[int, Tensor], None]
"""Given (block, map) where picture tokens look at: (B, heads, T, L + T)."""


class MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PatchEmbedding(nn.Module):
    """Latent (B, C, H, W) -> one token a patch, (B, T, D)."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(timesteps, FREQUENCIES))


class Projections(nn.Module):
    """A stream's queries, keys and values, and what becomes of the attention's output."""

    def __init__(self, width: int, heads: int, last: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.ln_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.ln_k = nn.RMSNorm(width // heads, eps=1e-6)
        if not last:
            self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = rearrange(self.qkv(x), "b t (n h d) -> n b t h d", n=3, h=self.heads)
        return self.ln_q(query).flatten(2), self.ln_k(key).flatten(2), value.flatten(2)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) norm(x) + shift; x (B, T, D), shift and scale (B, D). The norm has no weights of its own."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Stream(nn.Module):
    """One of the two streams in a block: adaptive norms around attention and a feed-forward network.

    last: a text stream that nothing reads any more, so that only its keys and values are made.
    """

    def __init__(self, config: MMDiTConfig, last: bool = False):
        super().__init__()
        width = config.width
        self.attn = Projections(width, config.heads, last)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (2 if last else 6) * width))
        if not last:
            self.mlp = MLP(width, int(config.mlp_ratio * width))

    def before(self, x: Tensor, moment: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """Queries, keys, values, and the modulation that `after` needs."""
        shift, scale, *rest = self.adaLN_modulation(moment).split(x.shape[-1], dim=-1)
        return self.attn(modulated(x, shift, scale)), tuple(rest)

    def after(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        gate, shift, scale, gate_mlp = rest
        x = x + gate[:, None] * self.attn.proj(attended)
        return x + gate_mlp[:, None] * self.mlp(modulated(x, shift, scale))


class JointBlock(nn.Module):
    """Both streams through one attention: context (B, L, D) and x (B, T, D); the last block's context ends."""

    def __init__(self, config: MMDiTConfig, last: bool):
        super().__init__()
        self.heads, self.last = config.heads, last
        self.context_block = Stream(config, last)
        self.x_block = Stream(config)

    def forward(
        self,
        context: Tensor,
        x: Tensor,
        moment: Tensor,
        probe: Callable[[Tensor], None] | None = None,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        rows = context.shape[1]
        from_text, text_rest = self.context_block.before(context, moment)
        from_picture, picture_rest = self.x_block.before(x, moment)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(from_text, from_picture, strict=True))
        if probe is None:
            attended = _seen(query, key, value, self.heads, transformer_options or {})
        else:
            probabilities = attention_map(query, key, self.heads)
            probe(probabilities[:, :, rows:])
            attended = apply_map(probabilities, value, self.heads)
        context = None if self.last else self.context_block.after(context, attended[:, :rows], text_rest)
        return context, self.x_block.after(x, attended[:, rows:], picture_rest)


def _seen(query: Tensor, key: Tensor, value: Tensor, heads: int, options: Mapping[str, Any]) -> Tensor:
    """`attention`, through the host's override of it, where there is one."""
    override = options.get("optimized_attention_override")
    if override is None:
        return attention(query, key, value, heads)

    def function(query: Tensor, key: Tensor, value: Tensor, heads: int, **_: Any) -> Tensor:
        return attention(query, key, value, heads)

    return override(function, query, key, value, heads, transformer_options=options)


class FinalLayer(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, moment: Tensor) -> Tensor:
        return self.linear(modulated(x, *self.adaLN_modulation(moment).chunk(2, dim=-1)))


class MMDiT(nn.Module):
    """Velocity of a latent (B, C, H, W) at timesteps (B,) in 0..1000 under a context (B, L, D_context).

    H and W must be multiples of the patch size. transformer_options: as the host gives them, whose
    `optimized_attention_override` every attention goes through.
    """

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedding(config)
        self.t_embedder = TimestepEmbedding(config.width)
        self.context_embedder = nn.Linear(config.context_dim, config.width)
        self.joint_blocks = nn.ModuleList(JointBlock(config, i == config.blocks - 1) for i in range(config.blocks))
        self.final_layer = FinalLayer(config)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        probe: Probe | None = None,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Tensor:
        size = self.config.patch_size
        height, width = x.shape[-2] // size, x.shape[-1] // size
        tokens = self.x_embedder(x)
        tokens = tokens + grid_embedding(self.config.width, height, width, x.device).to(tokens)
        moment = self.t_embedder(timesteps)
        context = self.context_embedder(context)
        for index, block in enumerate(self.joint_blocks):
            seen = None if probe is None else lambda found, index=index: probe(index, found)
            context, tokens = block(context, tokens, moment, seen, transformer_options)
        patches = self.final_layer(tokens, moment)
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=size, q=size)


def grid_embedding(width: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Sinusoids of each cell's column and row, (1, rows * columns, width): the same for pictures of any size."""
    small = min(rows, columns)

    def places(count: int) -> Tensor:
        reach = count / small * MIDDLE
        return torch.linspace(MIDDLE - reach, MIDDLE + reach, count, device=device)

    y, x = torch.meshgrid(places(rows), places(columns), indexing="ij")
    quarter = width // 4
    frequencies = 1 / 10000 ** (torch.arange(quarter, device=device) / quarter)
    angles = [place.flatten()[:, None] * frequencies for place in (x, y)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)[None]
