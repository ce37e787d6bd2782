"""Fusion Sampling on Toybox without a host: a picture's S* and any text (arXiv 2305.13579)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion import eps_denoiser, sample_euler, sampling_sigmas, timestep_of
from ..fusion import FusionOptions, Guidance, Stage, guide, mean_prediction, sample_fusion
from ..infusion import cross_attention_layers
from ..promptnet.network import KNOTS, PromptNet, interpolated, merged
from ..promptnet.pseudo_word import PLACEHOLDER, encode_tokens, prompt_tokens, scaled, with_noun
from ..promptnet.seed import seed_residual
from ..residual import Residual
from ..training import PROMPTS
from .pipeline import STEPS, Toybox, initial_noise, noun_rows

ALONE = f"a photo of {PLACEHOLDER}"


@dataclass
class FusedToybox:
    """Toybox and its PromptNet (one that does not look at the noisy latent). `rows` counts UNet rows evaluated so far."""

    toybox: Toybox
    promptnet: PromptNet
    rows: int = 0

    @torch.no_grad()
    def words(self, pictures: Tensor, timesteps: Tensor) -> Tensor:
        """S* of pictures (P, 96, 96, 3) of one thing, at timesteps (T,): (T, tokens, width), the mean over pictures."""
        latents = self.toybox.vae.latents(pictures)
        tokens = self.toybox.vision(self.toybox.vision.preprocess(pictures))
        pairs = zip(latents.split(1), tokens.split(1), strict=True)
        return merged([self.promptnet.embed_all(latent, token, timesteps) for latent, token in pairs])

    @torch.no_grad()
    def seed(self, pictures: Tensor, noun: str) -> Residual:
        """A residual from which a training on these pictures (P, 96, 96, 3) of one thing may start."""
        words = self.words(pictures, torch.tensor(KNOTS))
        spoken = [self._encoded(prompt.format(PLACEHOLDER), words) for prompt in PROMPTS]
        prompts = [prompt.format(noun) for prompt in PROMPTS]
        plain = [(self.toybox.context(prompt), noun_rows(prompt, noun)) for prompt in prompts]
        layers = cross_attention_layers(dict(self.toybox.unet.named_parameters()))
        return seed_residual(spoken, plain, layers, noun)

    @torch.no_grad()
    def contexts(self, prompt: str, pictures: Sequence[Tensor]) -> Callable[[Tensor, float], Tensor]:
        """The prompt with S* of each of `pictures`: (timestep (1,), gamma) -> (B, 77, width).

        S* and the text encoder's context are made at `KNOTS` and interpolated.
        """
        knots = torch.tensor(KNOTS)
        words = torch.stack([self.words(some, knots) for some in pictures], dim=1)  # (K, B, tokens, width)
        made, rows = self._encoded(prompt, words.flatten(0, 1))
        made = made.unflatten(0, words.shape[:2])
        return lambda timestep, gamma: scaled(interpolated(made, knots, timestep)[0], rows, gamma)

    def _encoded(self, prompt: str, words: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Contexts (N, 77, width) of the prompt with each S* of words (N, tokens, width), and S*'s rows."""
        ids, rows = prompt_tokens(prompt, words.shape[1])
        holds = self.promptnet.config.holds_position
        return encode_tokens(self.toybox.text, ids, rows, words, holds_position=holds), rows

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        noun: str,
        pictures: Sequence[Tensor],
        generators: Sequence[torch.Generator],
        guidance: Guidance,
        options: FusionOptions,
        steps: int = STEPS,
        fresh: torch.Generator | None = None,
    ) -> Tensor:
        """One latent for each of `pictures` (each (P, 96, 96, 3), of one thing) and its generator: (B, 4, 12, 12).

        prompt: with S* once. noun: stands for S* in the plain text, which is the second of guidance.weights if there are two.
        fresh: of the fusion stage's noise; needed where that has steps.
        """
        sigmas = sampling_sigmas(steps)
        with_word = self.contexts(ALONE if guidance.mode == "independent" else prompt, pictures)
        count = len(pictures)
        text = self.toybox.context(with_noun(prompt, noun)).expand(count, -1, -1)
        nothing = self.toybox.context("").expand(count, -1, -1)

        def denoise(x: Tensor, sigma: Tensor, stage: Stage) -> Tensor:
            fusing = stage == "fusion"
            conditions = [with_word(timestep_of(sigma[:1]), guidance.gamma if fusing else 1.0), text]
            used = [(one, weight) for one, weight in zip(conditions, guidance.weights, strict=False) if weight]
            contexts = torch.cat([*(one for one, _ in used), nothing])
            repeat = len(used) + 1
            self.rows += repeat * count

            def predict(x: Tensor, t: Tensor) -> Tensor:
                eps = self.toybox.unet(x.repeat(repeat, 1, 1, 1), t.repeat(repeat), contexts).chunk(repeat)
                mean = mean_prediction(eps[:-1], [weight for _, weight in used])
                return guide(eps[-1], mean, guidance.fusion_cfg if fusing else guidance.cfg)

            return eps_denoiser(predict)(x, sigma)

        def refine(model, x: Tensor, part: Tensor) -> Tensor:
            return sample_euler(model, x / (part[0] ** 2 + 1).sqrt(), part)

        start = initial_noise(generators) * (sigmas[0] ** 2 + 1).sqrt()
        fresh = fresh or torch.Generator()
        return sample_fusion(denoise, refine, start, sigmas, options, fresh)
