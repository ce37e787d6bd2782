"""A checkpoint of SD 1.x, SD 2.x or SDXL as a text-to-image model without a host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .checkpoints import CheckpointError, load_checkpoint
from .diffusion import Prediction
from .models.conditioning import TextTowers, size_vector
from .models.unet import UNet
from .models.vae import VAE
from .pipeline import Pipeline

if TYPE_CHECKING:
    from .models.clip import TextModel


@dataclass
class StableDiffusion(Pipeline):
    """A checkpoint's networks, in evaluation mode and frozen. family: "SD 1.x", "SD 2.x" or "SDXL"."""

    unet: UNet
    vae: VAE
    text: TextTowers
    prediction: Prediction
    size: int
    family: str
    path: Path | None = None
    guidance: ClassVar[float] = 7.0
    customised_guidance: ClassVar[float] = 7.0

    @classmethod
    def load(cls, path: str | Path, size: int | None = None, dtype: torch.dtype = torch.float32) -> StableDiffusion:
        """A checkpoint's file. size: the pictures' side in pixels, that of the family's training where left out. dtype:
        of the weights; the VAE's stay float32 where this is float16, in which SDXL's overflows.

        Raises CheckpointError, which says what the file is instead, or which sizes the VAE can give.
        """
        loaded = load_checkpoint(path, dtype)
        size, step = size or loaded.size, 2 ** (len(loaded.vae.config.channel_mult) - 1)
        if size < step or size % step:
            raise CheckpointError(f"size={size}: give a multiple of {step} pixels for this checkpoint.")
        return cls(loaded.unet, loaded.vae, loaded.text, loaded.prediction, size, loaded.family.name, Path(path))

    @property
    def base(self) -> str:
        return "" if self.path is None else self.path.name

    @property
    def towers(self) -> tuple[TextModel, ...]:
        return self.text.towers

    @torch.no_grad()
    def embedded(self, prompts: str | Sequence[str], size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        context, pooled = self.text.encode(prompts)
        return context, None if pooled is None else size_vector(pooled, size)

    def context(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts -> (B, L, D); see `encode_prompts`."""
        return self.embedded(prompts, (self.size, self.size))[0]

    def to(self, device: str | torch.device) -> StableDiffusion:
        """The same model, its networks moved to a device."""
        towers = TextTowers(tuple(tower.to(device) for tower in self.text.towers))
        return replace(self, unet=self.unet.to(device), vae=self.vae.to(device), text=towers)
