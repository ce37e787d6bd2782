"""What customisation changed besides the concept: two models of the host at the same noisy latents and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from PIL import Image
from torch import Tensor

from ...profusion.metrics import MetricError, Score, Scores, fisher_divergence, noisy_latents, wasserstein_distance
from ...profusion.metrics.cost import measured
from ...profusion.pictures import grid
from ...profusion.prompt import NounError
from ...profusion.residual import Residual
from .display import Progress
from .drawing import BATCH, Sampling, Tell, draw_seeds
from .evaluation import noise_levels, noise_predictions
from .families import model_layers
from .placing import MORE_CONCEPTS, ConceptInput, encode_prompt, noun_spans, place_concepts
from .streams import add_streams

BASE = "base model"

FISHER, WASSERSTEIN, ROWS = "latent Fisher divergence", "2-Wasserstein", "UNet rows a picture"

NOUN = "%noun%"


@dataclass(frozen=True)
class Customised:
    """What is compared with the base model: `positive` is what it draws the concept with, `clip` encodes prompts."""

    name: str
    noun: str
    model: ModelPatcher
    clip: CLIP
    positive: list


def subjects(
    model: ModelPatcher,
    clip: CLIP,
    class_prompt: str,
    residuals: Mapping[str, Residual | None],
    customised: ModelPatcher | None = None,
    customised_clip: CLIP | None = None,
    conditioning: list | None = None,
    noun: str = "",
) -> list[Customised]:
    """All that is to be compared: residuals by the names of their inputs, and a customised model. At least one."""
    found = _of_residuals(model, clip, class_prompt, residuals)
    if customised is not None:
        found.append(_of_model(customised, customised_clip or clip, conditioning, noun, class_prompt))
    if not found:
        raise MetricError("nothing to report on: connect a residual, or a customised model")
    return found


def _of_residuals(
    model: ModelPatcher, clip: CLIP, class_prompt: str, inputs: Mapping[str, Residual | None]
) -> list[Customised]:
    found = []
    for slot in ("", *MORE_CONCEPTS):
        residual = inputs.get(f"residual{slot}")
        if residual is None:
            continue
        layers, text = model_layers(model), class_prompt.replace(NOUN, residual.noun)
        placed = place_concepts(clip, text, layers, [ConceptInput(slot, residual, 1.0, "auto")], 0.0, 1.0)
        patched = add_streams(model, layers, shared_latent=False, recall=False)  # what it costs is counted
        name = f"residual{slot} ({residual.noun})"
        found.append(Customised(name, residual.noun, patched, clip, encode_prompt(clip, text, placed)))
    return found


def _of_model(
    customised: ModelPatcher, clip: CLIP, conditioning: list | None, noun: str, class_prompt: str
) -> Customised:
    if not noun:
        raise NounError("noun is empty: give what the customised model's concept is one of, such as cat")
    positive = encode_prompt(clip, class_prompt.replace(NOUN, noun), ()) if conditioning is None else conditioning
    return Customised(f"customised ({noun})", noun, customised, clip, positive)


def _other_prompts(text: str, clip: CLIP, nouns: Sequence[str]) -> list[str]:
    """The prompts without the concept, one a line."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise MetricError("prompts is empty: write some that do not have the noun, one a line")
    for number, prompt in enumerate(prompts, start=1):
        for noun in nouns:
            if noun_spans(clip, prompt, noun):
                raise NounError(
                    f"prompt {number}, {prompt!r}, has the noun {noun!r}: what it draws is meant to change. Write "
                    "prompts without it"
                )
    return prompts


@dataclass(frozen=True)
class PicturePlan:
    """What pictures a report draws: `count` latents of size (C, H, W), from `seed` on."""

    size: tuple[int, int, int]
    count: int
    seed: int
    sampling: Sampling


class _Report:
    """One report: what is drawn and evaluated, and the scores it comes to."""

    def __init__(self, model: ModelPatcher, clip: CLIP, pictures: PicturePlan, tell: Tell):
        self._model, self._clip, self._pictures, self._count, self._tell = model, clip, pictures, pictures.count, tell
        self._negative = encode_prompt(clip, "", ())
        self._scores: list[Score] = []
        self._notes: list[str] = []
        self._plain: dict[str, Tensor] = {}
        self.drawn: dict[str, Tensor] = {}

    def scores(self) -> Scores:
        return Scores(tuple(self._scores), tuple(dict.fromkeys(self._notes)))

    def fisher(self, customised: Sequence[Customised], prompts: Sequence[str], draws: int) -> None:
        """At noisy latents of the base model's own pictures of the prompts, one of each."""
        base = [encode_prompt(self._clip, prompt, ()) for prompt in prompts]
        clean = [self._draw(self._model, positive, 1, skip=index) for index, positive in enumerate(base)]
        generator = torch.Generator().manual_seed(self._pictures.seed % 2**63)
        noisy = noisy_latents(clean, draws, generator, noise_levels(self._model))
        expected = noise_predictions(self._model, base, noisy, self._tell)
        for one in customised:
            own = base if one.clip is self._clip else [encode_prompt(one.clip, prompt, ()) for prompt in prompts]
            found = fisher_divergence(expected, noise_predictions(one.model, own, noisy, self._tell))
            self._scores.append(Score.of(FISHER, one.name, found.samples, (0.0, math.inf), better="lower"))
            if found.value:
                means = found.samples.view(len(prompts), draws).mean(dim=1)
                self._notes.append(f"{one.name}: it moved {prompts[int(means.argmax())]!r} furthest.")

    def wasserstein(self, one: Customised, class_prompt: str) -> None:
        """The class as the base model draws it, and as the customised one draws the concept, from the same seeds."""
        plain = self._of_the_class(one.noun, class_prompt)
        with measured(one.model.get_model_object("diffusion_model")) as cost:
            self.drawn[one.name] = self._draw(one.model, one.positive, self._count)
        self._add_distance(one.name, plain, self.drawn[one.name])
        self._scores.append(Score(ROWS, one.name, cost.rows / self._count, better="lower"))

    def _of_the_class(self, noun: str, class_prompt: str) -> Tensor:
        """The base model's pictures of a noun. Their distance from those of other seeds is what chance makes."""
        if noun not in self._plain:
            positive = encode_prompt(self._clip, class_prompt.replace(NOUN, noun), ())
            with measured(self._model.get_model_object("diffusion_model")) as cost:
                plain = self._draw(self._model, positive, self._count)
            others = self._draw(self._model, positive, self._count, skip=self._count)
            self._plain[noun] = self.drawn[f"{BASE} ({noun})"] = plain
            self._add_distance(f"other seeds ({noun})", plain, others)
            self._scores.append(Score(ROWS, f"{BASE} ({noun})", cost.rows / self._count, better="lower"))
        return self._plain[noun]

    def _draw(self, model: ModelPatcher, positive: list, count: int, skip: int = 0) -> Tensor:
        given = self._pictures
        return draw_seeds(
            model, positive, self._negative, given.size, given.seed + skip, count, given.sampling, self._tell
        )

    def _add_distance(self, name: str, plain: Tensor, drawn: Tensor) -> None:
        found = wasserstein_distance(plain, drawn)
        self._scores.append(Score(WASSERSTEIN, name, found.distance, better="lower"))
        if found.note:
            self._notes.append(f"{WASSERSTEIN}, {name}: {found.note}.")


def report(
    model: ModelPatcher,
    clip: CLIP,
    customised: Sequence[Customised],
    prompts: str,
    class_prompt: str,
    draws: int,
    pictures: PicturePlan,
) -> tuple[Scores, dict[str, Tensor]]:
    """The scores, and the latents that were drawn for them. prompts: those without the concept, one a line."""
    nouns = list(dict.fromkeys(one.noun for one in customised))
    others, steps = _other_prompts(prompts, clip, nouns), pictures.sampling.steps
    if pictures.count < 2:
        raise MetricError(
            "latent is one picture, which has no covariance: set the batch_size of Empty Latent Image to 16 or more"
        )
    rows = len(others) * (steps + draws * (1 + len(customised)))
    rows += pictures.count * steps * (2 * len(nouns) + len(customised))
    made = _Report(model, clip, pictures, Progress(rows).advance)
    made.fisher(customised, others, draws)
    for one in customised:
        made.wasserstein(one, class_prompt)
    return made.scores(), made.drawn


def shown_pictures(model: ModelPatcher, vae: VAE, drawn: Mapping[str, Tensor]) -> Image.Image:
    """The first pictures of each, one row under the other."""
    rows = []
    for name, latents in drawn.items():
        pictures = vae.decode(model.model.process_latent_out(latents[:BATCH])).float().cpu()
        rows.append((name, list(pictures[..., :3])))
    return grid(rows, scale=1)
