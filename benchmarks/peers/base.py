"""What every peer shares: the base model, the draws of pictures, noise and timesteps, the loss, the sampler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from safetensors.torch import save
from torch import Tensor, nn

from profusion.diffusion import noise_predictor, per_row, sample_euler, sampling_sigmas
from profusion.infusion import Patches, Placement, customised_patches, on_conditional
from profusion.learning import Concept
from profusion.losses import masked_noise_error
from profusion.residual.training import NOUN_PROMPTS, TrainingOptions
from profusion.toybox.pipeline import Toybox, initial_noise, seeded

RARE_WORD = "sks"  # a word that Toybox was never taught, as DreamBooth's is one that nobody uses
CLASS_PICTURES = 16


class Peer:
    """Toybox and a way to teach it a concept; this one teaches nothing, and is the plain model.

    A peer says what it trains (`trained`) and how that enters: through the `context` of a prompt, attention `patches`,
    or another `unet`. Everything else is the same for all. phrase: what calls the concept in a prompt. rates: the
    learning rates that are tried. prior: the weight of DreamBooth's class-prior loss.
    """

    name = "plain Toybox"
    rates: tuple[float, ...] = ()
    note = "nothing is learned"
    prior = 0.0

    def __init__(self, toybox: Toybox, noun: str):
        self.toybox = toybox
        self.noun = self.phrase = noun

    @classmethod
    def why_unavailable(cls) -> str:
        """Why this peer cannot run here; empty if it can."""
        return ""

    @property
    def unet(self) -> nn.Module:
        """The UNet that is evaluated."""
        return self.toybox.unet

    def trained(self) -> dict[str, Tensor]:
        """What is learned and has to be kept, by name."""
        return {}

    def size(self) -> int:
        """Bytes of what has to be kept: a safetensors file in fp16."""
        return len(save({name: value.detach().half().contiguous() for name, value in self.trained().items()}))

    def context(self, prompt: str) -> Tensor:
        """(1, 77, 128), differentiable in what is trained."""
        return self.toybox.context(prompt)

    def patches(self, prompt: str) -> Patches:
        """Attention patches for the rows of a prompt, as `profusion.infusion` has them."""
        return {}

    def predict_noise(self, x: Tensor, sigma: Tensor, prompt: str) -> Tensor:
        """eps of x = x0 + sigma * eps, (B, 4, H, W) and (B,), under a prompt."""
        options = {"patches": self.patches(prompt), "cond_or_uncond": [0]}
        context = self.context(prompt).expand(len(x), -1, -1)
        return noise_predictor(lambda x, t: self.unet(x, t, context, transformer_options=options))(x, sigma)

    @torch.no_grad()
    def generate(self, prompt: str, seeds: list[int], steps: int, guidance: float) -> Tensor:
        """A picture of a prompt for each seed -> latents (B, 4, CELLS, CELLS)."""
        model = replace(self.toybox, unet=self.unet)
        evaluate = model.evaluator(self.context(prompt).expand(len(seeds), -1, -1), guidance)
        patches = self.patches(prompt)
        noise = initial_noise(seeded(*seeds))
        return sample_euler(lambda x, sigma: evaluate(x, sigma, patches), noise, sampling_sigmas(steps))

    def steps(self, concept: Concept, recipe: TrainingOptions) -> Iterator[float]:
        """Train, yielding each step's loss; what has been learned is in use at once.

        The draws are those of Infusion's own training from the same seed, and so are the masks: the loss is that of the
        noise inside them. No weight decay.
        """
        draws = self.toybox.training(concept.pictures, concept.masks, self.noun, recipe)
        optimizer = torch.optim.AdamW(self.trained().values(), lr=recipe.learning_rate, weight_decay=0.0)
        kept = self._class_pictures(recipe.seed) if self.prior else None
        while draws.step < recipe.steps:
            batch = draws.batch()
            prompt = NOUN_PROMPTS[batch.prompt]
            predicted = self.predict_noise(batch.noisy, batch.sigma, prompt.format(self.phrase))
            loss = masked_noise_error(predicted, batch.noise, batch.mask)
            if kept is not None:
                chosen = torch.randint(
                    len(kept), (len(batch.noise),), generator=torch.Generator().manual_seed(draws.step)
                )
                noisy = kept[chosen] + per_row(batch.sigma, batch.noise) * batch.noise
                error = self.predict_noise(noisy, batch.sigma, prompt.format(self.noun)) - batch.noise
                loss = loss + self.prior * error.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            draws.step += 1
            yield loss.item()

    def _class_pictures(self, seed: int) -> Tensor:
        """What the model draws of the class before it is trained, for the class-prior loss (arXiv
        2208.12242, section 3.3)."""
        seeds = [10_000 + 100 * seed + index for index in range(CLASS_PICTURES)]
        return Peer(self.toybox, self.noun).generate(f"a photo of a {self.noun}", seeds, 15, 2.0)


def moved_values(placement: Placement) -> Patches:
    """Infusion's patches without their lock: the noun's values move, the queries stay the customised model's own."""
    patches = customised_patches({}, on_conditional([placement]))
    return {**patches, "attn2_patch": patches["attn2_patch"][1:]}
