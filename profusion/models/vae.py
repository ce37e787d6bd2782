"""Stable Diffusion's AutoencoderKL, with ComfyUI's parameter names. Pictures are in [-1, 1], channels first."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import attention
from .configs import VAEConfig


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the cells."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        query, key, value = (rearrange(layer(n), "b c h w -> b (h w) c") for layer in (self.q, self.k, self.v))
        h = rearrange(attention(query, key, value, heads=1), "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # SD pads right and bottom only


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution and the step to the next."""

    def __init__(self, widths: list[tuple[int, int]], resample: str | None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in widths)
        if resample == "down":
            self.downsample = Downsample(widths[-1][1])
        elif resample == "up":
            self.upsample = Upsample(widths[-1][1])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.channels * mult for mult in config.channel_mult]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        previous = config.channels
        for level, width in enumerate(widths):
            pairs = [(previous, width)] + [(width, width)] * (config.num_res_blocks - 1)
            self.down.append(Level(pairs, "down" if level < len(widths) - 1 else None))
            previous = width
        self.mid = Middle(previous)
        self.norm_out = _norm(previous)
        self.conv_out = nn.Conv2d(previous, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.channels * mult for mult in config.channel_mult]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        levels, previous = [], widths[-1]
        for level in reversed(range(len(widths))):
            pairs = [(previous, widths[level])] + [(widths[level], widths[level])] * config.num_res_blocks
            levels.insert(0, Level(pairs, "up" if level else None))
            previous = widths[level]
        self.up = nn.ModuleList(levels)  # index 0 is the finest, as in the host's files
        self.norm_out = _norm(previous)
        self.conv_out = nn.Conv2d(previous, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """Pictures to latents and back. `encode` gives the posterior mean, unscaled, as the host's VAE does."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 8H, 8W) in [-1, 1] -> mean and log variance, (B, 4, H, W) each."""
        mean, log_variance = self.quant_conv(self.encoder(pictures)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, 8H, 8W) in [-1, 1] -> (B, 4, H, W)."""
        return self.posterior(pictures)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, H, W) -> (B, 3, 8H, 8W), about [-1, 1]; not clamped."""
        return self.decoder(self.post_quant_conv(latents))

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Scaled latents of the UNet, (B, 4, H, W) -> pictures (B, 8H, 8W, 3) in [0, 1], the host's IMAGE layout."""
        decoded = self.decode(latents / self.config.scale_factor)
        return ((decoded + 1) / 2).clamp(0, 1).movedim(1, -1).contiguous()

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 8H, 8W, 3) in [0, 1] -> scaled latents of the UNet, (B, 4, H, W)."""
        return self.encode(pictures.movedim(-1, 1) * 2 - 1) * self.config.scale_factor
