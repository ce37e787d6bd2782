"""The main job, start to end, without a host: learn a concept from a few pictures, draw it in new places, measure both."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .pictures import grid, loss_plot, read_pictures, to_image
from .residual import Residual, save_residual
from .toybox import world
from .toybox.judge import Judge
from .toybox.pipeline import SIZE, Toybox, seeded
from .toybox.similarity import background_change, concept_similarity
from .training import TrainingOptions

CONCEPT = "slate and apricot mushroom"
GUIDANCE = 2.0  # a residual is amplified with the rest of the condition: what is right at 1 is garish at 4
PICTURES = 4
PROMPTS = (
    "a photo of a {} on grass",
    "a photo of a {} on snow",
    "a photo of a {} at night",
    "a photo of a {} by a brick wall",
    "a picture of a {} on the sea",
    "a photo of a {} on sand",
)

Report = dict[str, object]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Concept:
    """What is to be learned: pictures (M, 96, 96, 3), masks (M, 96, 96), the class noun, and words for people."""

    name: str
    noun: str
    pictures: Tensor
    masks: Tensor


def drawn_concept(name: str = CONCEPT, count: int = PICTURES, seed: int = 0) -> Concept:
    """Pictures of a concept that no training picture came near."""
    noun, _ = world.concept(name)
    drawn = world.concept_pictures(name, count, np.random.default_rng(seed))
    pictures = torch.stack([torch.from_numpy(item.image).float() / 255 for item in drawn])
    masks = torch.stack([torch.from_numpy(item.masks[0]).float() / 255 for item in drawn])
    return Concept(name, noun, pictures, masks)


def own_concept(folder: Path, noun: str) -> Concept:
    """The user's pictures; an alpha channel is the object's mask."""
    pictures, masks = read_pictures(folder, SIZE)
    return Concept(f"your {noun}", noun, pictures, masks)


def train(toybox: Toybox, concept: Concept, options: TrainingOptions, say: Say) -> tuple[Residual, list[float], float]:
    """The residual, its losses and the seconds it took."""
    started = time.monotonic()
    training = toybox.training(concept.pictures, concept.masks, concept.noun, options)
    for loss in training.steps():
        if training.step % 25 == 0 or training.step == options.steps:
            recent = training.losses[-25:]
            say(f"train {training.step}/{options.steps}  loss {sum(recent) / len(recent):.4f}  (last {loss:.4f})")
    return training.residual(), training.losses, time.monotonic() - started


@dataclass(frozen=True)
class Drawing:
    """One prompt's pictures, (B, 96, 96, 3) each: plain and customised from the same seeds, plain from others."""

    prompt: str
    plain: Tensor
    customised: Tensor
    other_seeds: Tensor


def draw(toybox: Toybox, residual: Residual, prompt: str, seeds: Sequence[int], steps: int) -> Drawing:
    plain, customised = toybox.generate_customised(prompt, [residual], seeded(*seeds), steps, GUIDANCE)
    others = seeded(*(seed + 1000 for seed in seeds))
    other = toybox.generate([prompt] * len(seeds), others, steps, GUIDANCE)
    return Drawing(prompt, *(toybox.vae.pictures(latents) for latents in (plain, customised, other)))


def score(toybox: Toybox, concept: Concept, drawings: Sequence[Drawing], judge: Judge) -> Report:
    """Means over all drawings, per stream.

    concept_similarity: the appearance inside the object, against the references, 0..1. The references themselves
    reach `references`, and what the autoencoder makes of them `autoencoder`: no latent can do better. background_change: mean absolute difference (0..1) outside the objects, against the plain
    picture. caption_noun_accuracy: how often the judge sees the prompt's noun.
    """
    streams = {
        "plain": torch.cat([drawing.plain for drawing in drawings]),
        "customised": torch.cat([drawing.customised for drawing in drawings]),
        "other_seeds": torch.cat([drawing.other_seeds for drawing in drawings]),
    }
    masks = {name: judge.object_mask(pictures) for name, pictures in streams.items()}
    scores: Report = {}
    for name, pictures in streams.items():
        union = torch.maximum(masks[name], masks["plain"])
        similarity = concept_similarity(pictures, masks[name], concept.pictures, concept.masks)
        nouns = [noun == concept.noun for noun in judge.nouns(pictures)]
        scores[name] = {
            "concept_similarity": round(similarity.mean().item(), 4),
            "background_change": round(background_change(pictures, streams["plain"], union).mean().item(), 5),
            "caption_noun_accuracy": round(sum(nouns) / len(nouns), 4),
        }
    ceiling = _reference_similarity(concept)
    plain, customised = (scores[name]["concept_similarity"] for name in ("plain", "customised"))
    other = scores["other_seeds"]["background_change"]
    scores["references"] = {"concept_similarity": round(ceiling, 4)}
    decoded = toybox.vae.pictures(toybox.vae.latents(concept.pictures))
    kept = concept_similarity(decoded, concept.masks, concept.pictures, concept.masks).mean().item()
    scores["autoencoder"] = {"concept_similarity": round(kept, 4)}
    scores["way_to_the_references"] = round((customised - plain) / max(ceiling - plain, 1e-6), 4)
    scores["background_change_of_another_seed"] = round(scores["customised"]["background_change"] / max(other, 1e-6), 4)
    return scores


def _reference_similarity(concept: Concept) -> float:
    """How alike the references are among themselves: what a perfect copy would score."""
    if len(concept.pictures) == 1:
        return 1.0
    kept = []
    for index in range(len(concept.pictures)):
        rest = [other for other in range(len(concept.pictures)) if other != index]
        one = slice(index, index + 1)
        kept.append(
            concept_similarity(concept.pictures[one], concept.masks[one], concept.pictures[rest], concept.masks[rest])
        )
    return torch.cat(kept).mean().item()


def run(
    out: Path,
    concept: Concept,
    options: TrainingOptions,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (2, 1, 3, 4),
    sampling_steps: int = 25,
    say: Say = print,
) -> Report:
    """Train, draw, measure; write grid.png, residual.safetensors, loss.png and report.json into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    toybox, judge = Toybox.load(), Judge.load()
    say(f"learning {concept.name!r} (noun {concept.noun!r}) from {len(concept.pictures)} pictures")
    residual, losses, seconds = train(toybox, concept, options, say)
    drawings = []
    for prompt in prompts:
        drawings.append(draw(toybox, residual, prompt.format(concept.noun), seeds, sampling_steps))
        say(f"drawn: {drawings[-1].prompt}")
    preview = to_image(drawings[0].customised[0])
    saved = save_residual(residual, out / "residual.safetensors", preview=preview)
    loss_plot(losses, options.steps).save(out / "loss.png")
    _grid(concept, drawings).save(out / "grid.png")
    report: Report = {
        "concept": concept.name,
        "noun": concept.noun,
        "pictures": len(concept.pictures),
        "training_steps": options.steps,
        "train_seconds": round(seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
        "residual_bytes": saved.path.stat().st_size,
        "prompts": [drawing.prompt for drawing in drawings],
        "samples": len(prompts) * len(seeds),
        **score(toybox, concept, drawings, judge),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _grid(concept: Concept, drawings: Sequence[Drawing]):
    """References on top, then the plain and the customised picture of each prompt under the same seed."""
    first = [*concept.pictures[: len(drawings)]]
    rows = [("pictures to learn from", first)]
    for column in range(min(2, len(drawings[0].plain))):
        rows.append(("plain", [drawing.plain[column] for drawing in drawings]))
        rows.append(("Infusion, same seed", [drawing.customised[column] for drawing in drawings]))
    return grid(rows, [drawing.prompt for drawing in drawings])


