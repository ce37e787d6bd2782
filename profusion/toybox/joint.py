"""Toybox MMDiT, the embedded model of today's shape: joint attention over text and picture, and flow matching.

It draws in the latents of Toybox's autoencoder and reads Toybox's text tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attending import JointAttention
from ..diffusion import Denoiser, euler
from ..flow import TIMESTEPS, flow_sigmas, velocity_denoiser
from ..holding import FREE, Holding
from ..infusion import VALUE, Layer, Patches, Placement, on_conditional, with_patches
from ..joint_attention import COLUMN
from ..models.conditioning import encode_prompts
from ..models.mmdit import MMDiT
from ..models.vae import VAE
from ..pictures import latent_masks
from ..pipeline import Callback, noun_rows, places
from ..residual import Residual, check_architecture
from ..residual.noising import FLOW
from ..residual.training import NOUN_PROMPTS, Reference, ResidualTraining, TrainingOptions
from ..streams import Evaluate, two_stream_denoiser
from ..text_attention import TEXT, Layout, TextCall
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

    @property
    def layers(self) -> list[Layer]:
        """What a residual has a vector for."""
        config = self.mmdit.config
        return [Layer(f"joint.{index}", config.width, network="sd3", adds_to=VALUE) for index in range(config.blocks)]

    def attending(self, lock: str = COLUMN) -> JointAttention:
        """How the streams of Infusion meet in its attention; lock: see `joint_attention`."""
        config = self.mmdit.config
        layout = Layout(True, config.blocks, config.patch_size, name="Toybox's MMDiT")
        return JointAttention(layout, lock, config.heads, config.width)

    def velocity(self, x: Tensor, t: Tensor, context: Tensor, patches: Patches, rows: list[int]) -> Tensor:
        """The network with attention patches; rows: the host's `cond_or_uncond`, 0 for each part of the batch that is
        conditioned on the prompt."""
        options = {"cond_or_uncond": rows, TEXT: TextCall(context.shape[1], tuple(x.shape[2:]))}
        patched = with_patches({"transformer_options": options}, patches)["transformer_options"]
        return self.mmdit(x, t, context, transformer_options=patched)

    def denoiser(self, context: Tensor, guidance: float = GUIDANCE) -> Denoiser:
        """The network under classifier-free guidance as `model(x, sigma) -> denoised`; context (B, 77, 128)."""
        evaluate = self.evaluator(context, guidance)
        return lambda x, sigma: evaluate(x, sigma, {})

    def evaluator(self, context: Tensor, guidance: float = GUIDANCE) -> Evaluate:
        """The same as `evaluate(x, sigma, patches) -> denoised`."""
        both_contexts = torch.cat([context, self.context("").expand_as(context)])

        def evaluate(x: Tensor, sigma: Tensor, patches: Patches) -> Tensor:
            def predict_velocity(x: Tensor, t: Tensor) -> Tensor:
                both = self.velocity(torch.cat([x, x]), torch.cat([t, t]), both_contexts, patches, [0, 1])
                conditional, empty = both.chunk(2)
                return empty + guidance * (conditional - empty)

            return velocity_denoiser(predict_velocity)(x, sigma)

        return evaluate

    @torch.no_grad()
    def generate_customised(
        self,
        prompt: str,
        residuals: Sequence[Residual],
        generators: Sequence[torch.Generator],
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        lock: str = COLUMN,
        background: str = FREE,
    ) -> tuple[Tensor, Tensor]:
        """Both streams of a prompt, a picture a generator -> plain and customised latents, (B, 4, CELLS, CELLS) each;
        the rest as in `Pipeline.generate_customised`."""
        rows = places(prompt, [residual.noun for residual in residuals])
        for residual in residuals:
            check_architecture(residual, self.layers)
        placed = [Placement(one.delta, one.layers, where) for one, where in zip(residuals, rows, strict=True)]
        attending, noise = self.attending(lock), initial_noise(generators).to(self.device)
        holding = None
        if background != FREE:
            holding = Holding(background, partial(attending.looking, self.mmdit), len(noise), noise.shape[-2:])
        evaluate = self.evaluator(self.context([prompt] * len(noise)), guidance)
        denoise = two_stream_denoiser(evaluate, on_conditional(placed), holding=holding, attending=attending)
        sigmas = flow_sigmas(steps).to(self.device)
        plain, customised = euler(denoise, torch.cat([noise, noise]), sigmas).chunk(2)
        return plain, customised if holding is None else holding.finished(customised, plain)

    def training(
        self, pictures: Tensor, masks: Tensor, noun: str, options: TrainingOptions, lock: str = COLUMN
    ) -> ResidualTraining:
        """A residual's training on pictures (M, SIZE, SIZE, 3) in [0, 1] and masks (M, SIZE, SIZE)."""
        prompts = [prompt.format(noun) for prompt in NOUN_PROMPTS]
        with torch.no_grad():
            contexts = self.context(prompts)

        def predict(x: Tensor, sigma: Tensor, prompt: int, patches: Patches) -> Tensor:
            context = contexts[prompt : prompt + 1].expand(len(x), -1, -1)
            return self.velocity(x, TIMESTEPS * sigma, context, patches, [0])

        sides = [self.references(pictures, masks)]
        if options.flip:
            sides.append(self.references(pictures.flip(2), masks.flip(2)))
        return ResidualTraining(
            predict,
            sides[0],
            [noun_rows(prompt, noun) for prompt in prompts],
            self.layers,
            noun,
            options,
            sides[-1] if options.flip else (),
            sigmas=(torch.arange(TIMESTEPS) + 1) / TIMESTEPS,
            attending=self.attending(lock),
            noising=FLOW,
        )

    @torch.no_grad()
    def references(self, pictures: Tensor, masks: Tensor) -> list[Reference]:
        """Pictures and masks as a training takes them: the network's tokens are learned from as wholes."""
        latents = torch.cat([self.vae.latents(one) for one in pictures.split(1)])
        weights = latent_masks(masks, latents.shape[-2:], self.mmdit.config.patch_size)
        return [Reference(latent, weight) for latent, weight in zip(latents, weights, strict=True)]

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
