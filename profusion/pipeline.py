"""A text-to-image model without a host: texts to latents, plain and with residuals, and the training of a residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .attending import UNET
from .diffusion import Prediction, denoiser, noise_predictor, sample_euler, sampling_sigmas
from .holding import APART, FREE, NOT_HELD, TOGETHER, Holding
from .infusion import Patches, Placement, cross_attention_layers, on_conditional
from .models.chunks import chunks
from .models.conditioning import of_one_length
from .models.tokenizer import id_to_text
from .models.unet import UNet
from .models.vae import VAE
from .pictures import latent_masks
from .probing import NounShares
from .prompt import NounError, Span, Wanted, find_noun, rows_of
from .residual import Residual, check_architecture
from .residual.training import NOUN_PROMPTS, PredictWithPatches, Reference, ResidualTraining, TrainingOptions
from .streams import Evaluate, two_stream_denoiser
from .stride import Stride

if TYPE_CHECKING:
    from .models.clip import TextModel

Callback = Callable[[int, Tensor], None]
STEPS = 30


class Pipeline:
    """What every model here does with its networks, in whichever way it encodes its prompts.

    size: the pictures' side, in pixels. prediction: what the UNet predicts. guidance: the scale of plain pictures, and
    customised_guidance that of those with residuals. base: what its file, or it, is called. path: its file, if it is of
    one.
    """

    unet: UNet
    vae: VAE
    size: int
    prediction: Prediction
    guidance: ClassVar[float]
    customised_guidance: ClassVar[float]
    base: str
    path: Path | None

    def embedded(self, prompts: str | Sequence[str], size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Prompts -> contexts (B, L, D), and SDXL's vectors y (B, adm) for pictures of this height and width.

        See `encode_prompts`: L is 77 rows for each chunk of the longest prompt, and shorter ones are repeated.
        """
        raise NotImplementedError

    @property
    def towers(self) -> tuple[TextModel, ...]:
        """The text towers, in the order in which their contexts lie side by side."""
        raise NotImplementedError

    @property
    def cell(self) -> int:
        """Pixels a side of a latent cell."""
        return 2 ** (len(self.vae.config.channel_mult) - 1)

    def picture_size(self, latents: Tensor) -> tuple[int, int]:
        """Height and width in pixels of the pictures of latents (..., H, W)."""
        return latents.shape[-2] * self.cell, latents.shape[-1] * self.cell

    def predict(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None, patches: Patches, rows: list) -> Tensor:
        """The UNet in the precision of its weights: what it predicts of x_t (B, 4, H, W), in x_t's own.

        rows: the host's `cond_or_uncond`, 0 for each part of the batch that is conditioned on the prompt.
        """
        weight = self.unet.out[2].weight
        options = {"patches": patches, "cond_or_uncond": rows}
        y = None if y is None else y.to(weight)
        return self.unet(x.to(weight), t, context.to(weight), y, transformer_options=options).to(x)

    def evaluator(
        self, context: Tensor, guidance: float | None = None, y: Tensor | None = None, negative: str = ""
    ) -> Evaluate:
        """The UNet under classifier-free guidance as `evaluate(x, sigma, patches) -> denoised`; context (B, L, D), y
        (B, adm) where the UNet takes one. negative: the prompt that guidance leads away from."""
        scale = self.guidance if guidance is None else guidance
        away, away_y = self.embedded(negative, (self.size, self.size))
        context, away = of_one_length([context, away])
        contexts = torch.cat([context, away.expand_as(context)])
        ys = None if y is None else torch.cat([y, away_y.expand_as(y)])

        def evaluate(x: Tensor, sigma: Tensor, patches: Patches) -> Tensor:
            def predict(x: Tensor, t: Tensor) -> Tensor:
                both = self.predict(torch.cat([x, x]), torch.cat([t, t]), contexts, ys, patches, [0, 1])
                conditional, unconditional = both.chunk(2)
                return unconditional + scale * (conditional - unconditional)

            return denoiser(predict, self.prediction)(x, sigma)

        return evaluate

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        steps: int = STEPS,
        guidance: float | None = None,
        callback: Callback | None = None,
        negative: str = "",
    ) -> Tensor:
        """One picture a prompt, each from its own generator -> latents (B, 4, cells, cells)."""
        evaluate = self.evaluator(*self._guided(prompts, guidance), negative)
        noise = self._noise(generators)
        return sample_euler(lambda x, sigma: evaluate(x, sigma, {}), noise, self._sigmas(steps), callback)

    @torch.no_grad()
    def generate_customised(
        self,
        prompt: str,
        residuals: Sequence[Residual],
        generators: Sequence[torch.Generator],
        steps: int = STEPS,
        guidance: float | None = None,
        strength: float | Sequence[float] = 1.0,
        shared_latent: bool = False,
        callback: Callback | None = None,
        negative: str = "",
        background: str = FREE,
        concepts: str = TOGETHER,
        every: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Both streams of a prompt, a picture a generator -> plain and customised latents, (B, 4, cells, cells)
        each. strength: of all residuals, or one for each. background: whether what is around the concepts is held to
        the plain picture, see `holding.BACKGROUNDS`. concepts: whether several have an evaluation each, see
        `holding.CONCEPTS`. every: the customised stream is evaluated at each so manyth step, see `stride`. Raises what
        `placements` raises, and ValueError for concepts apart on a free background."""
        if concepts == APART and background == FREE:
            raise ValueError(NOT_HELD)
        placements = self.placements(prompt, residuals, strength)
        evaluate = self.evaluator(*self._guided([prompt] * len(generators), guidance), negative)
        noise, holding = self._noise(generators), None
        if background != FREE:
            looking, size = partial(UNET.looking, self.unet), noise.shape[-2:]
            holding = Holding(background, looking, len(noise), size, concepts == APART)
        sigmas = self._sigmas(steps)
        stride = Stride(every, sigmas.tolist())
        denoise = two_stream_denoiser(evaluate, on_conditional(placements), shared_latent, holding, stride)
        plain, customised = sample_euler(denoise, torch.cat([noise, noise]), sigmas, callback).chunk(2)
        return plain, customised if holding is None else holding.finished(customised, plain)

    @torch.no_grad()
    def probe(
        self,
        prompt: str,
        noun: str,
        generators: Sequence[torch.Generator],
        steps: int = STEPS,
        guidance: float | None = None,
    ) -> NounShares:
        """What the model's attention has of a noun, while it draws the plain pictures of a prompt, one a generator.

        Raises NounError where the prompt does not have it.
        """
        names = tuple(layer.name for layer in cross_attention_layers(dict(self.unet.named_parameters())))
        # Nothing is added anywhere; it only says which rows are looked at.
        rows, shares = places(prompt, [noun], ["noun"])[0], NounShares(names)
        looked_at = Placement(torch.ones(len(names), 1, 1), names, rows, context_length=context_length(prompt))
        patches = UNET.looking(self.unet, shares, on_conditional([looked_at]))
        evaluate = self.evaluator(*self._guided([prompt] * len(generators), guidance))
        sample_euler(lambda x, sigma: evaluate(x, sigma, patches), self._noise(generators), self._sigmas(steps))
        return shares

    def placements(
        self,
        prompt: str,
        residuals: Sequence[Residual],
        strength: float | Sequence[float] = 1.0,
        names: Sequence[str] | None = None,
    ) -> list[Placement]:
        """The residuals at their nouns in a prompt, as the node places them: at each place of the noun, or at one each
        where several have the same noun. names: what messages call them.

        Raises NounError where the prompt has no place for one, ResidualError where one is of another architecture.
        """
        layers = cross_attention_layers(dict(self.unet.named_parameters()))
        for residual in residuals:
            check_architecture(residual, layers)
        rows = places(prompt, [residual.noun for residual in residuals], names)
        strengths = [strength] * len(residuals) if isinstance(strength, (int, float)) else strength
        return [
            Placement(one.delta, one.layers, where, much, context_length=context_length(prompt), details=one.details)
            for one, where, much in zip(residuals, rows, strengths, strict=True)
        ]

    def _guided(self, prompts: Sequence[str], guidance: float | None) -> tuple[Tensor, float | None, Tensor | None]:
        """What `evaluator` takes; a prompt that is there more than once is encoded once."""
        different = list(dict.fromkeys(prompts))
        context, y = self.embedded(different, (self.size, self.size))
        rows = [different.index(prompt) for prompt in prompts]
        return context[rows], guidance, None if y is None else y[rows]

    def _noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        return initial_noise(generators, self.size // self.cell).to(self.unet.out[2].weight.device)

    def _sigmas(self, steps: int) -> Tensor:
        return sampling_sigmas(steps).to(self.unet.out[2].weight.device)

    def noise_predictor(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> PredictWithPatches:
        """How `ResidualTraining` evaluates the model with these prompts, which are encoded once, for pictures of this
        height and width (`size` by `size` where that is left out)."""
        contexts, ys = self.embedded(prompts, size or (self.size, self.size))
        lengths = [context_length(prompt) for prompt in prompts]

        def predict(x: Tensor, sigma: Tensor, prompt: int, patches: Patches) -> Tensor:
            context = contexts[prompt, : lengths[prompt]].expand(len(x), -1, -1)
            y = None if ys is None else ys[prompt].expand(len(x), -1)
            network = noise_predictor(lambda x, t: self.predict(x, t, context, y, patches, [0]), self.prediction)
            return network(x, sigma)

        return predict

    def training(
        self,
        pictures: Tensor,
        masks: Tensor,
        noun: str,
        options: TrainingOptions,
        resume: Residual | None = None,
    ) -> ResidualTraining:
        """A residual's training on pictures (M, H, W, 3) in [0, 1] and masks (M, H, W); H and W multiples of 8."""
        prompts = [prompt.format(noun) for prompt in NOUN_PROMPTS]
        sides = [self.references(pictures, masks)]
        if options.flip:
            sides.append(self.references(pictures.flip(2), masks.flip(2)))
        layers = cross_attention_layers(dict(self.unet.named_parameters()))
        rows = [noun_rows(prompt, noun) for prompt in prompts]
        return ResidualTraining(
            self.noise_predictor(prompts, tuple(pictures.shape[1:3])),
            sides[0],
            rows,
            layers,
            noun,
            options,
            sides[-1] if options.flip else (),
            resume,
        )

    def references(self, pictures: Tensor, masks: Tensor) -> list[Reference]:
        """Pictures (M, H, W, 3) and masks (M, H, W) as a training takes them."""
        like = self.vae.quant_conv.weight
        # one after another: a VAE takes more memory than a UNet
        latents = torch.cat([self.vae.latents(one.to(like)) for one in pictures.split(1)]).to(pictures.dtype)
        weights = latent_masks(masks.to(latents.device), latents.shape[-2:])
        return [Reference(latent, weight) for latent, weight in zip(latents, weights, strict=True)]

    def pictures(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, cells, cells) -> pictures (B, size, size, 3) in [0, 1] on the CPU, one after another: a VAE
        takes more memory than a UNet."""
        weight = self.vae.quant_conv.weight
        return torch.cat([self.vae.pictures(latent.to(weight)).float().cpu() for latent in latents.split(1)])


def noun_spans(prompt: str, noun: str) -> list[Span]:
    """The context rows of each occurrence of a noun in a prompt, as the text towers take both."""
    wanted = [token.id for chunk in chunks(noun, weights=False) for token in chunk if token.part]
    parted = [[(token.id, token.part) for token in chunk] for chunk in chunks(prompt)]
    return find_noun(parted, wanted, lambda token: id_to_text(token).endswith("</w>"))


def noun_rows(prompt: str, noun: str) -> Span:
    """The context rows of a noun's last place in a prompt ("a photo of a photo"); NounError, which quotes the prompt,
    if it has none."""
    spans = noun_spans(prompt, noun)
    if not spans:
        raise NounError(f"the noun {noun!r} is not in the prompt {prompt!r}; write it there as a word of its own")
    return spans[-1]


def places(prompt: str, nouns: Sequence[str], names: Sequence[str] | None = None) -> list[Span]:
    """The context rows that concepts of these nouns take in a prompt; see `rows_of`. names: what messages call them."""
    names = names or [f"residual {number}" for number in range(1, len(nouns) + 1)]
    wanted = [Wanted(*one) for one in zip(names, nouns, strict=True)]
    return [rows_of(wanted, index, prompt, lambda noun: noun_spans(prompt, noun)) for index in range(len(wanted))]


def context_length(prompt: str) -> int:
    """How many rows a prompt's context has."""
    return sum(map(len, chunks(prompt)))


def initial_noise(generators: Sequence[torch.Generator], cells: int) -> Tensor:
    """Unit noise (B, 4, cells, cells), each row from its own generator."""
    return torch.stack([torch.randn(4, cells, cells, generator=generator) for generator in generators])


def seeded(*seeds: int) -> list[torch.Generator]:
    """A CPU generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
