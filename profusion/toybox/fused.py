"""Fusion Sampling on Toybox without a host: a picture's S* and any text (arXiv 2305.13579)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from ..diffusion import eps_denoiser, sample_euler, sampling_sigmas, variance_exploding, variance_preserving
from ..fusion import FusionOptions, Guidance, Mode, RunGuidance, Stage, fresh_noise, sample_fusion
from ..infusion import cross_attention_layers
from ..promptnet.file import load_promptnet
from ..promptnet.network import KNOTS, PromptNet, interpolated, merged
from ..promptnet.pseudo_word import ALONE, encode_tokens, prompt_tokens, scaled, with_noun
from ..promptnet.seed import PROMPT_PAIRS, ResidualSeed, attention_modules
from ..promptnet.training import PictureSet
from ..residual import Residual
from .pipeline import GUIDANCE, STEPS, Toybox, initial_noise, noun_rows, seeded, weight_file

# As Fusion KSampler comes, with the cfg that Toybox takes: S* and the plain text, a fusion stage in the first fifth of
# a run.
GUIDED = Guidance((1.0, 0.5), cfg=4.0, refresh=2, fusion_weights=(1.0, 0.0))
FUSED_SHARE = 0.2
FRESH_NOISE = 10_000  # seeds the fusion stage's noise, which must not be the noise that the picture starts from

PredictStage = Callable[[Tensor, Tensor, Stage], Tensor]
"""The guided noise of variance-preserving latents x (B, 4, CELLS, CELLS) at timesteps (B,), in a stage."""


def first_levels(share: float, steps: int) -> FusionOptions:
    """A fusion stage at those of `steps` noise levels that lie before the share of the run; none at 0."""
    fused = math.ceil(share * steps - 1e-9)
    return FusionOptions(sigma_end=sampling_sigmas(steps)[fused - 1].item()) if fused else FusionOptions(0)


@dataclass(frozen=True)
class Conditions:
    """What a run of B pictures is conditioned on: contexts (B, 77, width) of the prompt with S*, given the timestep
    (1,) and gamma; of the prompt in plain words; and of the empty one."""

    word: Callable[[Tensor, float], Tensor]
    text: Tensor
    nothing: Tensor


@dataclass
class FusedToybox:
    """Toybox and its PromptNet (one that does not look at the noisy latent). `rows` counts UNet rows evaluated so
    far."""

    toybox: Toybox
    promptnet: PromptNet
    rows: int = 0

    @classmethod
    def load(cls) -> FusedToybox:
        """The shipped weights; FileNotFoundError says which are missing."""
        return cls(Toybox.load(), load_promptnet(weight_file("promptnet")))

    @torch.no_grad()
    def words(self, pictures: Tensor, timesteps: Tensor) -> Tensor:
        """S* of pictures (P, SIZE, SIZE, 3) of one thing, at timesteps (T,): (T, tokens, width), the mean over
        pictures."""
        latents = self.toybox.vae.latents(pictures)
        tokens = self.toybox.vision(self.toybox.vision.preprocess(pictures))
        pairs = zip(latents.split(1), tokens.split(1), strict=True)
        return merged([self.promptnet.embed_all(latent, token, timesteps) for latent, token in pairs])

    def seed(self, pictures: Tensor, masks: Tensor, noun: str) -> Residual:
        """A residual from which a training on these pictures (P, SIZE, SIZE, 3) of one thing, masks (P, SIZE, SIZE),
        may start."""
        word = self.words(pictures, torch.tensor(KNOTS)).mean(dim=0, keepdim=True)  # (1, tokens, width)
        plain = [prompt.format(noun) for prompt, _ in PROMPT_PAIRS]
        with torch.no_grad():
            spoken = [self._encoded(prompt, word)[0] for _, prompt in PROMPT_PAIRS]
        unet, predict_noise = self.toybox.unet, self.toybox.noise_predictor(plain)
        layers = cross_attention_layers(dict(unet.named_parameters()))
        rows = [noun_rows(prompt, noun) for prompt in plain]
        references = self.toybox.references(pictures, masks)
        seeding = ResidualSeed(predict_noise, references, rows, spoken, attention_modules(unet), layers, noun)
        for _ in seeding.steps():
            pass
        return seeding.residual()

    @torch.no_grad()
    def contexts(self, prompt: str, pictures: Sequence[Tensor]) -> Callable[[Tensor, float], Tensor]:
        """The prompt with S* of each of `pictures`: (timestep (1,), gamma) -> (B, 77, width).

        S* and the text encoder's context are made at `KNOTS` and interpolated.
        """
        knots = torch.tensor(KNOTS)
        return self.spoken(prompt, torch.stack([self.words(some, knots) for some in pictures], dim=1))

    @torch.no_grad()
    def spoken(self, prompt: str, words: Tensor) -> Callable[[Tensor, float], Tensor]:
        """As `contexts`, with each S* given at `KNOTS`: words (K, B, tokens, width)."""
        made, rows = self._encoded(prompt, rearrange(words, "k b tokens d -> (k b) tokens d"))
        made = rearrange(made, "(k b) l d -> k b l d", k=len(words))
        knots = torch.tensor(KNOTS, device=words.device)
        return lambda timestep, gamma: scaled(interpolated(made, knots, timestep)[0], rows, gamma)

    @torch.no_grad()
    def drawn_alone(self, pictures: PictureSet, steps: int = STEPS, guidance: float = GUIDANCE) -> Tensor:
        """What S* of each picture, and nothing else, draws: latents (N, 4, CELLS, CELLS), from seeds 0 to N - 1."""
        knots = torch.tensor(KNOTS, device=self.toybox.device)
        given = (pictures.latents.split(1), pictures.image_tokens.float().split(1))
        pairs = [(latent.to(knots.device), tokens.to(knots.device)) for latent, tokens in zip(*given, strict=True)]
        words = torch.stack([self.promptnet.embed_all(*pair, knots) for pair in pairs], dim=1)
        word, empty = self.spoken(ALONE, words), self.toybox.context("")

        def predict(x: Tensor, t: Tensor) -> Tensor:
            first, nothing = self.evaluate(x, t, [word(t[:1], 1.0), empty.expand(len(x), -1, -1)])
            return nothing + guidance * (first - nothing)

        noise = initial_noise(seeded(*range(len(pictures)))).to(knots.device)
        return sample_euler(eps_denoiser(predict), noise, sampling_sigmas(steps).to(knots.device))

    def _encoded(self, prompt: str, words: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Contexts (N, 77, width) of the prompt with each S* of words (N, tokens, width), and S*'s rows."""
        ids, rows = prompt_tokens(prompt, words.shape[1])
        holds = self.promptnet.config.holds_position
        return encode_tokens(self.toybox.text, ids, rows, words, holds_position=holds), rows

    @torch.no_grad()
    def conditions(
        self, prompt: str, nouns: Sequence[str], pictures: Sequence[Tensor], mode: Mode = "dependent"
    ) -> Conditions:
        """Of a prompt with S*, for each of `pictures` and the noun that stands for its S* in plain words."""
        word = self.contexts(ALONE if mode == "independent" else prompt, pictures)
        text = self.toybox.context([with_noun(prompt, noun) for noun in nouns])
        return Conditions(word, text, self.toybox.context("").expand_as(text))

    def evaluate(self, x: Tensor, t: Tensor, contexts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The noise that the UNet predicts under each of several contexts, in one batch."""
        count = len(contexts)
        self.rows += count * len(x)
        return self.toybox.unet(x.repeat(count, 1, 1, 1), t.repeat(count), torch.cat(list(contexts))).chunk(count)

    @torch.no_grad()
    def sample(
        self,
        predict: PredictStage,
        generators: Sequence[torch.Generator],
        options: FusionOptions,
        steps: int = STEPS,
        fresh: torch.Generator | None = None,
    ) -> Tensor:
        """One latent for each generator, (B, 4, CELLS, CELLS). fresh: of the fusion stage's noise; needed where that
        has steps."""
        sigmas = sampling_sigmas(steps)

        fuse, settle = (eps_denoiser(partial(predict, stage=stage)) for stage in ("fusion", "refinement"))

        def refine(x: Tensor, first: int, last: int) -> Tensor:
            return sample_euler(settle, variance_preserving(x, sigmas[first]), sigmas[first : last + 1])

        start = variance_exploding(initial_noise(generators), sigmas[0])
        return sample_fusion(fuse, refine, start, sigmas, options, fresh_noise([fresh or torch.Generator()]))

    def generate(
        self,
        prompt: str,
        nouns: Sequence[str],
        pictures: Sequence[Tensor],
        generators: Sequence[torch.Generator],
        guidance: Guidance,
        options: FusionOptions,
        steps: int = STEPS,
        fresh: torch.Generator | None = None,
    ) -> Tensor:
        """One latent for each of `pictures` (each (P, SIZE, SIZE, 3), of one thing), its noun and its generator: (B, 4,
        CELLS, CELLS).

        prompt: with S* once. A noun stands for S* in the plain text, which is the second of guidance.weights if there
        are two. fresh: see `sample`.
        """
        given = self.conditions(prompt, nouns, pictures, guidance.mode)
        run = RunGuidance(guidance)

        def predict(x: Tensor, t: Tensor, stage: Stage) -> Tensor:
            terms = [given.word(t[:1], guidance.word_scale(stage)), given.text]
            first, *others = [terms[index] for index in run.used(stage)]
            contexts = [first, given.nothing, *others]
            return run.step(stage, lambda everything: self.evaluate(x, t, contexts if everything else [first]))

        return self.sample(predict, generators, options, steps, fresh)
