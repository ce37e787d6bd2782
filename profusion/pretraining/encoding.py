"""From pictures to what PromptNet is trained on: latents and CLIP image tokens, by the base's frozen networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..keeping import digest
from ..models.vae import VAE

if TYPE_CHECKING:
    from ..models.clip import VisionModel

_AT_ONCE = 4 * 512 * 512  # pixels


@dataclass(frozen=True)
class Encoders:
    """The VAE and CLIP's image tower, on the device that they work on, in the precision of their weights."""

    vae: VAE
    vision: VisionModel

    @property
    def device(self) -> torch.device:
        return self.vae.quant_conv.weight.device

    def fingerprint(self) -> str:
        """16 hexadecimal digits that other weights do not have."""
        return digest(dict(self.vae.state_dict()), dict(self.vision.state_dict()))

    @torch.no_grad()
    def features(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, H, W, 3), uint8, -> scaled latents (B, C, h, w) and image tokens (B, L, width), float32.

        A few at once: a VAE takes more memory than a UNet.
        """
        found = [self._few(few) for few in pictures.split(self._at_once(pictures))]
        latents, image_tokens = (torch.cat(parts) for parts in zip(*found, strict=True))
        return latents, image_tokens

    def _few(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        unit = pictures.to(self.device).float() / 255
        latents = self.vae.latents(unit.to(self.vae.quant_conv.weight)).float()
        tower = next(self.vision.parameters())
        return latents, self.vision(self.vision.preprocess(unit).to(tower)).float()

    @torch.no_grad()
    def embeddings(self, pictures: Tensor) -> Tensor | None:
        """Pictures (B, H, W, 3) in [0, 1] -> CLIP's unit vectors (B, D); None where the tower's file has no
        projection."""
        if self.vision.visual_projection is None:
            return None
        tower = next(self.vision.parameters())
        parts = pictures.to(self.device, torch.float32).split(self._at_once(pictures))
        return torch.cat([self.vision.embed(self.vision.preprocess(few).to(tower)).float() for few in parts])

    def _at_once(self, pictures: Tensor) -> int:
        # On a CPU one by one: it is as quick, and a picture has the same bits whatever it is encoded with.
        return 1 if self.device.type == "cpu" else max(1, _AT_ONCE // (pictures.shape[1] * pictures.shape[2]))
