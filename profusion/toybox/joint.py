"""Toybox MMDiT, the embedded model of today's shape: joint attention over text and picture, and flow matching.

It draws in the latents of Toybox's autoencoder and reads Toybox's text tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..diffusion import Denoiser, euler
from ..flow import flow_sigmas, velocity_denoiser
from ..models.conditioning import encode_prompts
from ..models.mmdit import MMDiT
from ..models.vae import VAE
from ..pipeline import Callback
from .configs import TOYBOX_MMDIT, TOYBOX_TEXT, TOYBOX_VAE
from .pipeline import GUIDANCE, STEPS, initial_noise, load_network

if TYPE_CHECKING:
    from ..models.clip import TextModel


@dataclass
class JointToybox:
    """Its three networks, in evaluation mode and frozen."""

    mmdit: MMDiT
    vae: VAE
    text: TextModel

    @classmethod
    def load(cls, folder: Path | None = None) -> JointToybox:
        """Load the shipped weights, or those of another folder; RuntimeError if a file does not fit its network."""
        from ..models.clip import TextModel  # with transformers, which the pack does not wait for

        networks = {"mmdit": MMDiT(TOYBOX_MMDIT), "vae": VAE(TOYBOX_VAE), "text": TextModel(TOYBOX_TEXT)}
        for name, network in networks.items():
            network.load_state_dict(load_network(name, folder), strict=True)
            network.eval().requires_grad_(False)
        return cls(**networks)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.mmdit.parameters()).device

    def context(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts -> (B, 77, 128)."""
        return encode_prompts([self.text], prompts)[0]

    def denoiser(self, context: Tensor, guidance: float = GUIDANCE) -> Denoiser:
        """The network under classifier-free guidance as `model(x, sigma) -> denoised`; context (B, 77, 128)."""
        both_contexts = torch.cat([context, self.context("").expand_as(context)])

        def predict_velocity(x: Tensor, t: Tensor) -> Tensor:
            conditional, empty = self.mmdit(torch.cat([x, x]), torch.cat([t, t]), both_contexts).chunk(2)
            return empty + guidance * (conditional - empty)

        return velocity_denoiser(predict_velocity)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        callback: Callback | None = None,
    ) -> Tensor:
        """One picture a prompt, each from its own CPU generator -> latents (B, 4, CELLS, CELLS)."""
        noise = initial_noise(generators).to(self.device)
        denoise = self.denoiser(self.context(prompts), guidance)
        return euler(denoise, noise, flow_sigmas(steps).to(self.device), callback)
