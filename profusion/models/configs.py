"""Sizes of the networks, and those of the checkpoints people have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UNetConfig:
    """A cross-attention UNet; the tuples have one entry per resolution level."""

    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    transformer_depth: tuple[int, ...]
    middle_depth: int
    context_dim: int
    num_heads: int | None = None
    head_channels: int | None = None
    use_linear: bool = False
    adm_channels: int | None = None
    in_channels: int = 4
    out_channels: int = 4

    def __post_init__(self) -> None:
        if len(self.channel_mult) != len(self.transformer_depth):
            raise ValueError(
                f"channel_mult has {len(self.channel_mult)} levels and transformer_depth {len(self.transformer_depth)}; "
                "give one entry per level in both"
            )
        if (self.num_heads is None) == (self.head_channels is None):
            raise ValueError("set exactly one of num_heads and head_channels")
        if self.model_channels % 32:
            raise ValueError(f"model_channels={self.model_channels} must be a multiple of 32 (GroupNorm has 32 groups)")

    def heads(self, channels: int) -> int:
        """Attention heads of a layer of this width."""
        return self.num_heads or channels // self.head_channels

    @property
    def cross_attentions(self) -> int:
        """How many cross-attention layers the UNet has."""
        return self.middle_depth + (2 * self.num_res_blocks + 1) * sum(self.transformer_depth)


@dataclass(frozen=True)
class VAEConfig:
    """AutoencoderKL, downscaling by 2 ** (levels - 1)."""

    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    latent_channels: int = 4
    scale_factor: float = 0.18215


@dataclass(frozen=True)
class TextConfig:
    """CLIP's causal text tower."""

    width: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int = 49408
    positions: int = 77


@dataclass(frozen=True)
class VisionConfig:
    """CLIP's image tower."""

    width: int
    layers: int
    heads: int
    intermediate: int
    image_size: int
    patch_size: int
    projection: int


SD15 = UNetConfig(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 1, 768, num_heads=8)
SD21 = UNetConfig(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 1, 1024, head_channels=64, use_linear=True)
SDXL = UNetConfig(320, (1, 2, 4), 2, (0, 2, 10), 10, 2048, head_channels=64, use_linear=True, adm_channels=2816)
