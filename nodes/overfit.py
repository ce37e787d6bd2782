"""ProFusion_OverfitReport: did customisation change what it should have left alone?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..profusion.metrics import MetricError, Score, Scores, fisher_divergence, noisy_latents, wasserstein_distance
from ..profusion.metrics.chart import chart
from ..profusion.metrics.cost import measured
from ..profusion.pictures import from_image, grid, stacked
from ..profusion.prompt import NounError
from .host import add_streams, encode_prompt, model_layers, noun_spans
from .host_overfit import BATCH, Sampling, Tell, noise_predictions
from .host_training import Progress, noise_levels
from .infusion import MORE_CONCEPTS, ConceptInput, place_concepts
from .messages import show

BASE = "base model"
FISHER, WASSERSTEIN, ROWS = "latent Fisher divergence", "2-Wasserstein", "UNet rows a picture"
NOUN = "%noun%"
PROMPTS = "a photo of a house\na photo of a tree in a field\na street at night\na bowl of fruit on a table"


@dataclass(frozen=True)
class Customised:
    """Something that is compared with the base model: `positive` is what it draws the concept with, `clip` encodes prompts."""

    name: str
    noun: str
    model: Any
    clip: Any
    positive: list


def _of_residuals(model: Any, clip: Any, class_prompt: str, inputs: Mapping[str, Any]) -> list[Customised]:
    found = []
    for slot in ("", *MORE_CONCEPTS):
        residual = inputs.get(f"residual{slot}")
        if residual is None:
            continue
        layers, text = model_layers(model), class_prompt.replace(NOUN, residual.noun)
        placed = place_concepts(clip, text, layers, [ConceptInput(slot, residual, 1.0, "auto")], 0.0, 1.0)
        patched = add_streams(model, layers, shared_latent=False)
        name = f"residual{slot} ({residual.noun})"
        found.append(Customised(name, residual.noun, patched, clip, encode_prompt(clip, text, placed)))
    return found


def _other_prompts(text: str, clip: Any, nouns: Sequence[str]) -> list[str]:
    """The prompts without the concept, one a line."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise MetricError("prompts is empty: write some that do not have the noun, one a line")
    for number, prompt in enumerate(prompts, start=1):
        for noun in nouns:
            if noun_spans(clip, prompt, noun):
                raise NounError(
                    f"prompt {number}, {prompt!r}, has the noun {noun!r}: what it draws is meant to change. Write prompts "
                    "without it"
                )
    return prompts


class _Report:
    """One execution: what is drawn and evaluated, and the scores it comes to."""

    def __init__(self, model: Any, clip: Any, sampling: Sampling, count: int, tell: Tell):
        self._model, self._clip, self._sampling, self._count, self._tell = model, clip, sampling, count, tell
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
        generator = torch.Generator().manual_seed(self._sampling.seed % 2**63)
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
        """The base model's pictures of a noun; how far they are from those of other seeds is what chance alone makes."""
        if noun not in self._plain:
            positive = encode_prompt(self._clip, class_prompt.replace(NOUN, noun), ())
            with measured(self._model.get_model_object("diffusion_model")) as cost:
                plain = self._draw(self._model, positive, self._count)
            others = self._draw(self._model, positive, self._count, skip=self._count)
            self._plain[noun] = self.drawn[f"{BASE} ({noun})"] = plain
            self._add_distance(f"other seeds ({noun})", plain, others)
            self._scores.append(Score(ROWS, f"{BASE} ({noun})", cost.rows / self._count, better="lower"))
        return self._plain[noun]

    def _draw(self, model: Any, positive: list, count: int, skip: int = 0) -> Tensor:
        return self._sampling.draw(model, positive, self._negative, count, self._tell, skip)

    def _add_distance(self, name: str, plain: Tensor, drawn: Tensor) -> None:
        found = wasserstein_distance(plain, drawn)
        self._scores.append(Score(WASSERSTEIN, name, found.distance, better="lower"))
        if found.note:
            self._notes.append(f"{WASSERSTEIN}, {name}: {found.note}.")


class OverfitReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_OverfitReport",
            display_name="Overfit Report",
            category="ProFusion",
            description=(
                "Measures what customisation changed besides the concept (Infusion, arXiv 2404.14007): how far predictions for "
                "other prompts moved (latent Fisher divergence, 0 is not at all), and how far the pictures of the whole class "
                "did (2-Wasserstein). For residuals, and for any customised model, such as one with a LoRA."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The base model, as it was before customisation."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Latent.Input(
                    "latent",
                    tooltip="Empty Latent Image: its size is that of the pictures, its batch_size how many are drawn for the "
                    "2-Wasserstein distance. At least 2; 16 or more say something.",
                ),
                io.String.Input(
                    "noun",
                    default="",
                    tooltip="What the customised model's concept is one of, such as cat. Residuals know their own noun.",
                ),
                io.String.Input(
                    "class_prompt",
                    default=f"a photo of a {NOUN}",
                    tooltip=f"What the pictures of the class show. {NOUN} becomes the noun.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=False,
                    default=PROMPTS,
                    tooltip="Prompts without the concept, one a line, for the latent Fisher divergence.",
                ),
                io.Int.Input(
                    "draws",
                    default=16,
                    min=1,
                    max=1000,
                    tooltip="Noisy latents at which predictions are compared, for each prompt. More narrow the interval.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the first picture; the second has the next seed, and so on. The same seed gives the same report.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps of each picture."),
                io.Float.Input(
                    "cfg",
                    default=6.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance of the pictures: 4 for Toybox, 6 to 8 for Stable Diffusion.",
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler", tooltip="As in KSampler."
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple", tooltip="As in KSampler."
                ),
                io.Model.Input(
                    "customised", optional=True, tooltip="A customised model: with a LoRA, fine-tuned, or patched."
                ),
                io.Clip.Input(
                    "customised_clip", optional=True, tooltip="Its text encoder, where customisation changed that too."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="What the customised model draws its concept with, such as the one that Infusion Attention Patch or "
                    "PromptNet Encode gives. Default: class_prompt.",
                ),
                *[
                    io.Custom("RESIDUAL").Input(f"residual{slot}", optional=True, tooltip="A residual to report on.")
                    for slot in ("", *MORE_CONCEPTS)
                ],
                io.Vae.Input("vae", optional=True, tooltip="To show some of the pictures under the chart."),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The report as a Markdown table."),
                io.Image.Output(display_name="chart", tooltip="The report as a picture."),
                io.String.Output(display_name="json", tooltip="The report for programs."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        latent,
        noun,
        class_prompt,
        prompts,
        draws,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        customised=None,
        customised_clip=None,
        conditioning=None,
        vae=None,
        **residuals,
    ) -> io.NodeOutput:
        if clip is None:
            raise ValueError("clip is None: the checkpoint that was loaded has no text encoder")
        subjects = _of_residuals(model, clip, class_prompt, residuals)
        if customised is not None:
            subjects.append(_of_model(customised, customised_clip or clip, conditioning, noun.strip(), class_prompt))
        if not subjects:
            raise MetricError("nothing to report on: connect a residual, or a customised model")
        nouns = list(dict.fromkeys(subject.noun for subject in subjects))
        others = _other_prompts(prompts, clip, nouns)
        empty = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        count = len(empty)
        if count < 2:
            raise MetricError(
                "latent is one picture, which has no covariance: set the batch_size of Empty Latent Image to 16 or more"
            )
        rows = len(others) * (steps + draws * (1 + len(subjects))) + count * steps * (2 * len(nouns) + len(subjects))
        sampling = Sampling(tuple(empty.shape[1:]), seed, steps, cfg, sampler_name, scheduler)
        report = _Report(model, clip, sampling, count, Progress(rows).advance)
        report.fisher(subjects, others, draws)
        for subject in subjects:
            report.wasserstein(subject, class_prompt)
        scores = report.scores()
        image = chart(scores)
        if vae is not None:
            image = stacked([_shown(model, vae, report.drawn), image])
        text = json.dumps(scores.as_json(), indent=2)
        return io.NodeOutput(scores.markdown(), from_image(image)[None], text, ui=show(cls, scores.text()))


def _of_model(customised: Any, clip: Any, conditioning: list | None, noun: str, class_prompt: str) -> Customised:
    if not noun:
        raise NounError("noun is empty: give what the customised model's concept is one of, such as cat")
    positive = encode_prompt(clip, class_prompt.replace(NOUN, noun), ()) if conditioning is None else conditioning
    return Customised(f"customised ({noun})", noun, customised, clip, positive)


def _shown(model: Any, vae: Any, drawn: Mapping[str, Tensor]):
    """The first pictures of each, one row under the other."""
    rows = []
    for name, latents in drawn.items():
        pictures = vae.decode(model.model.process_latent_out(latents[:BATCH])).float().cpu()
        rows.append((name, list(pictures[..., :3])))
    return grid(rows, scale=1)


NODES = [OverfitReport]
