"""How many training steps does a start from S* save? `python -m benchmarks.residual_seed
[--promptnet FILE]`, on Toybox.

For concepts that neither Toybox nor its PromptNet ever saw, a residual is trained from zero and from what PromptNet
makes of the same pictures, with the same options, noise and pictures in every step. At some steps both are judged: how
alike the drawn things are to the concept (`similarity`, 0..1, as the demo measures it), and the training's own loss on
noise that is always the same. Without training, the seed is also judged at other strengths.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rates import mean_interval
from benchmarks.results import table, write
from profusion.diffusion import per_row, training_sigmas
from profusion.infusion import Placement, customised_patches, foundation_patches
from profusion.learning import Concept
from profusion.pictures import latent_masks
from profusion.promptnet.file import load_promptnet
from profusion.residual import Residual
from profusion.residual.training import NOUN_PROMPTS, TrainingOptions, residual_loss
from profusion.toybox import world
from profusion.toybox.concepts import DEMO_PROMPTS, drawn_concept
from profusion.toybox.fused import FusedToybox
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import CUSTOMISED_GUIDANCE, WEIGHTS, Toybox, noun_rows, seeded
from profusion.toybox.similarity import concept_similarity

AT = (0, 25, 50, 100, 200, 400)
STRENGTHS = (0.5, 1.5, 2.0)
SEEDS = (1, 2)  # of the drawn pictures, for each of the demo's prompts
BATCHES, BATCH = 4, 16  # of the loss: noised pictures

Curve = dict[int, tuple[float, float]]
"""(similarity, loss) by step."""


class Yardstick:
    """Judges residuals of one concept, always by the same pictures and noise."""

    def __init__(self, toybox: Toybox, judge: Judge, concept: Concept, preserve: float, sampling_steps: int):
        self._toybox, self._judge, self._concept = toybox, judge, concept
        self._preserve, self._sampling_steps = preserve, sampling_steps
        prompts = [prompt.format(concept.noun) for prompt in NOUN_PROMPTS]
        self._predict = toybox.noise_predictor(prompts)
        self._rows = [noun_rows(prompt, concept.noun) for prompt in prompts]
        self._latents = toybox.vae.latents(concept.pictures)
        self._masks = latent_masks(concept.masks, self._latents.shape[-2:])

    def __call__(self, residual: Residual) -> tuple[float, float]:
        return self.similarity(residual), self.loss(residual)

    def similarity(self, residual: Residual) -> float:
        """Mean over the demo's prompts and SEEDS."""
        scores = []
        for prompt in DEMO_PROMPTS:
            text = prompt.format(residual.noun)
            drawn = self._toybox.generate_customised(
                text, [residual], seeded(*SEEDS), self._sampling_steps, CUSTOMISED_GUIDANCE
            )
            pictures = self._toybox.vae.pictures(drawn[1])
            masks = self._judge.object_mask(pictures)
            scores.append(concept_similarity(pictures, masks, self._concept.pictures, self._concept.masks))
        return torch.cat(scores).mean().item()

    @torch.no_grad()
    def loss(self, residual: Residual) -> float:
        """The training's loss, on noise of levels spread over all."""
        generator, losses = torch.Generator().manual_seed(20), []
        for batch in range(BATCHES):
            picture = torch.randint(len(self._latents), (BATCH,), generator=generator)
            spread = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
            sigma = training_sigmas()[(1000 * spread).long().clamp(max=999)]
            noise = torch.randn(BATCH, *self._latents.shape[1:], generator=generator)
            losses.append(self._error(picture, noise, sigma, batch % len(NOUN_PROMPTS), residual))
        return sum(losses) / len(losses)

    def _error(self, picture: Tensor, noise: Tensor, sigma: Tensor, prompt: int, residual: Residual) -> float:
        noisy, queries = self._latents[picture] + per_row(sigma, noise) * noise, {}
        plain = self._predict(noisy, sigma, prompt, foundation_patches(queries))
        placement = Placement(residual.delta, residual.layers, self._rows[prompt])
        predicted = self._predict(
            noisy, sigma, prompt, customised_patches(queries, lambda options, chunk: (placement,))
        )
        return residual_loss(predicted, noise, plain, self._masks[picture], self._preserve).item()


def curve(
    toybox: Toybox,
    concept: Concept,
    options: TrainingOptions,
    start: Residual,
    judged: Callable[[Residual], tuple[float, float]],
    at: Sequence[int],
) -> Iterator[tuple[int, tuple[float, float]]]:
    """Train from `start` to options.steps, judging at each of `at`."""
    training = toybox.training(concept.pictures, concept.masks, concept.noun, options, start)
    steps = training.steps()
    for stop in at:
        while training.step < stop:
            next(steps)
        yield stop, judged(training.residual())


def scaled(residual: Residual, strength: float) -> Residual:
    """A residual of no steps, times a number."""
    return Residual(strength * residual.delta, residual.noun, residual.layers, residual.architecture)


def steps_needed(steps: Sequence[int], values: Sequence[float], target: float, rising: bool) -> float | None:
    """When a curve first is as good as a target, linearly between the measured steps; None: not within them.

    rising: whether more is better.
    """
    sign = 1 if rising else -1
    gaps = [sign * (value - target) for value in values]
    if gaps[0] >= 0:
        return float(steps[0])
    for index in range(1, len(gaps)):
        if gaps[index] >= 0:
            share = gaps[index - 1] / (gaps[index - 1] - gaps[index])
            return steps[index - 1] + share * (steps[index] - steps[index - 1])
    return None


@dataclass(frozen=True)
class Measured:
    """One concept: both curves, and (similarity, loss) of the seed at other strengths."""

    name: str
    zero: Curve
    seed: Curve
    strengths: dict[float, tuple[float, float]]


def measure(fused: FusedToybox, judge: Judge, concept: Concept, given: argparse.Namespace) -> Measured:
    """Train one concept from both starts, saying how it goes."""
    began, toybox = time.monotonic(), fused.toybox
    options = TrainingOptions(max(given.at), given.learning_rate, seed=given.seed)
    judged = Yardstick(toybox, judge, concept, options.preserve, given.sampling_steps)
    seed, found = fused.seed(concept.pictures, concept.masks, concept.noun), {}
    for name, start in (("zero", scaled(seed, 0.0)), ("seed", seed)):
        found[name] = {}
        for step, point in curve(toybox, concept, options, start, judged, given.at):
            found[name][step] = point
            seconds = time.monotonic() - began
            print(
                f"{concept.name}, from {name}, step {step}: similarity {point[0]:.3f}, loss {point[1]:.4f}  "
                f"({seconds:.0f} s)",
                flush=True,
            )
    return Measured(concept.name, found["zero"], found["seed"], {s: judged(scaled(seed, s)) for s in STRENGTHS})


def markdown(measured: Sequence[Measured], at: Sequence[int]) -> str:
    """Means over concepts, with the 95 % interval of the difference, and the steps from zero that come to the same."""
    means = {
        (name, part): [sum(getattr(one, name)[step][part] for one in measured) / len(measured) for step in at]
        for name in ("zero", "seed")
        for part in (0, 1)
    }
    rows = []
    for index, step in enumerate(at):
        cells = [step]
        for part, digits in ((0, 3), (1, 4)):
            mean, half = mean_interval([one.seed[step][part] - one.zero[step][part] for one in measured])
            needed = steps_needed(at, means["zero", part], means["seed", part][index], rising=part == 0)
            cells += [f"{means[name, part][index]:.{digits}f}" for name in ("zero", "seed")]
            cells += [
                f"{mean:+.{digits}f} ± {half:.{digits}f}",
                f"over {at[-1]}" if needed is None else f"{needed:.0f}",
            ]
        rows.append(cells)
    heads = [
        "step",
        *(
            f"{what}{column}"
            for what in ("likeness, ", "loss, ")
            for column in ("from zero", "from S*", "difference", "steps from zero")
        ),
    ]
    strengths = []
    for strength in STRENGTHS:
        points = [one.strengths[strength] for one in measured]
        similarity, loss = (sum(point[part] for point in points) / len(points) for part in (0, 1))
        strengths.append((strength, f"{similarity:.3f}", f"{loss:.4f}"))
    untrained = table(("strength of the residual from S*, untrained", "likeness", "loss"), strengths)
    return f"{len(measured)} unseen concepts.\n\n{table(heads, rows)}\n\n{untrained}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--promptnet", type=Path, default=WEIGHTS / "toybox_promptnet.safetensors", help="the PromptNet's file"
    )
    parser.add_argument("--concepts", type=int, default=4, choices=range(2, len(world.CONCEPTS) + 1), help="how many")
    parser.add_argument("--at", type=int, nargs="+", default=list(AT), help="training steps at which both are judged")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the trainings")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    given = parser.parse_args()
    given.at = sorted({*given.at, 0})
    fused, judge = FusedToybox(Toybox.load(), load_promptnet(given.promptnet)), Judge.load()
    names = list(world.CONCEPTS)[: given.concepts]
    measured = [measure(fused, judge, drawn_concept(name), given) for name in names]
    figures = {one.name: {"zero": one.zero, "seed": one.seed, "strengths": one.strengths} for one in measured}
    write(given.json, vars(given), figures, markdown(measured, given.at))


if __name__ == "__main__":
    main()
