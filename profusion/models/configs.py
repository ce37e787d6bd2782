"""Sizes of the networks, and those of the checkpoints people have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_LEVELS = 8
MAX_WIDTH = 65536

# The least and the most of each field. The largest checkpoints that people have stay far below.
_UNET_BOUNDS = {
    "model_channels": (32, 8192),
    "channel_mult": (1, 64),
    "num_res_blocks": (1, 64),
    "transformer_depth": (0, 64),
    "middle_depth": (0, 64),
    "context_dim": (1, MAX_WIDTH),
    "num_heads": (1, 1024),
    "head_channels": (1, 1024),
    "adm_channels": (1, MAX_WIDTH),
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
}


def check_bounds(config: Any, bounds: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError, which names the field, unless each is a whole number, or a tuple of them, within its bounds.

    A field that is None is not looked at.
    """
    for field, (least, most) in bounds.items():
        value = getattr(config, field)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and (type(number) is not int or not least <= number <= most):
                raise ValueError(f"{field}={value!r:.80} must be whole numbers from {least} to {most}")


@dataclass(frozen=True)
class UNetConfig:
    """A cross-attention UNet; the tuples have one entry per resolution level.

    Raises ValueError, which names the field, where a size makes no sense or is beyond every model's.
    """

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
                f"channel_mult has {len(self.channel_mult)} levels and transformer_depth "
                f"{len(self.transformer_depth)}; give one entry per level in both"
            )
        if not 1 <= len(self.channel_mult) <= MAX_LEVELS:
            raise ValueError(f"channel_mult has {len(self.channel_mult)} levels: give 1 to {MAX_LEVELS} levels")
        check_bounds(self, _UNET_BOUNDS)
        if (self.num_heads is None) == (self.head_channels is None):
            raise ValueError("set exactly one of num_heads and head_channels")
        if self.model_channels % 32:
            raise ValueError(f"model_channels={self.model_channels} must be a multiple of 32 (GroupNorm has 32 groups)")
        attending = [mult for mult, depth in zip(self.channel_mult, self.transformer_depth, strict=True) if depth]
        for mult in {*attending, self.channel_mult[-1]}:
            field = "head_channels" if self.num_heads is None else "num_heads"
            if (mult * self.model_channels) % (self.num_heads or self.head_channels):
                raise ValueError(
                    f"{field}={getattr(self, field)} does not divide the {mult * self.model_channels} channels of a "
                    "layer"
                )

    def heads(self, channels: int) -> int:
        """Attention heads of a layer of this width."""
        return self.num_heads or channels // self.head_channels

    @property
    def cross_attentions(self) -> int:
        """How many cross-attention layers the UNet has."""
        return self.middle_depth + (2 * self.num_res_blocks + 1) * sum(self.transformer_depth)


@dataclass(frozen=True)
class MMDiTConfig:
    """A joint-attention transformer over patches of a latent and rows of a context, in SD3's layout.

    heads are 64 wide there, and the network as wide as all of them together. Raises ValueError, which names the field.
    """

    heads: int
    blocks: int
    context_dim: int
    mlp_ratio: float = 4.0
    patch_size: int = 2
    in_channels: int = 4

    def __post_init__(self) -> None:
        bounds = {"heads": (1, 1024), "blocks": (1, 1024), "context_dim": (1, MAX_WIDTH)}
        check_bounds(self, bounds | {"patch_size": (1, 64), "in_channels": (1, 1024)})
        if not 0 < self.mlp_ratio <= 64:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} must lie above 0 and be at most 64")

    @property
    def width(self) -> int:
        return 64 * self.heads


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
    """CLIP's causal text tower, and what a model takes of it.

    skip: layers at the end whose work is left out of the context; final_norm: whether the context is normalised after
    them; pad: the token after a prompt's end, None for the end token itself; projected: whether it has a projection.
    """

    width: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int = 49408
    positions: int = 77
    activation: str = "quick_gelu"
    skip: int = 0
    final_norm: bool = True
    pad: int | None = None
    projected: bool = True


@dataclass(frozen=True)
class VisionConfig:
    """CLIP's image tower."""

    width: int
    layers: int
    heads: int
    intermediate: int
    image_size: int
    patch_size: int
    projection: int | None  # None where its file has none, so that it gives no embeddings
    activation: str = "quick_gelu"

    @property
    def tokens(self) -> int:
        """Image tokens of a picture: the class token and one for each patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


SD15 = UNetConfig(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 1, 768, num_heads=8)
SD21 = UNetConfig(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 1, 1024, head_channels=64, use_linear=True)
SDXL = UNetConfig(320, (1, 2, 4), 2, (0, 2, 10), 10, 2048, head_channels=64, use_linear=True, adm_channels=2816)
