"""The main job, start to end, without a host: a concept in new places, by Infusion from a few pictures, and by
ProFusion from one of them and no training; both are measured alike."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .holding import HELD
from .learning import Concept, Report, Say, train
from .pictures import grid, loss_plot, masked, to_image
from .promptnet.pseudo_word import PLACEHOLDER
from .residual import Residual, save_residual
from .residual.training import TrainingOptions
from .toybox.concepts import DEMO_PROMPTS
from .toybox.fused import FRESH_NOISE, FUSED_SHARE, GUIDED, FusedToybox, first_levels
from .toybox.judge import Judge
from .toybox.pipeline import CUSTOMISED_GUIDANCE, Toybox, seeded
from .toybox.scores import likeness_among, picture_scores
from .toybox.similarity import concept_similarity

OPTIONS = TrainingOptions(steps=200, learning_rate=0.0, capacity=4)  # 0.36 s a step on a CPU's core, with 1 0.3
SEEDS, SAMPLING_STEPS = (2, 1, 3, 4), 25


@dataclass(frozen=True)
class Drawing:
    """One prompt's pictures, (B, SIZE, SIZE, 3) each: plain, Infusion's and ProFusion's from the same seeds, plain from
    others."""

    prompt: str
    plain: Tensor
    customised: Tensor
    profusion: Tensor
    other_seeds: Tensor


def infused(toybox: Toybox, residual: Residual, prompt: str, seeds: Sequence[int], steps: int) -> tuple[Tensor, Tensor]:
    """Latents of the plain pictures and of Infusion's, from the same seeds. prompt: with {} for the noun."""
    text = prompt.format(residual.noun)
    return toybox.generate_customised(text, [residual], seeded(*seeds), steps, CUSTOMISED_GUIDANCE, background=HELD)


def draw(
    fused: FusedToybox, residual: Residual, picture: Tensor, prompt: str, seeds: Sequence[int], steps: int
) -> Drawing:
    """prompt: with {} for the noun. ProFusion has not been trained on anything: it sees one picture (1, SIZE, SIZE,
    3)."""
    toybox, text = fused.toybox, prompt.format(residual.noun)
    plain, customised = infused(toybox, residual, prompt, seeds, steps)
    others = seeded(*(seed + 1000 for seed in seeds))
    other = toybox.generate([text] * len(seeds), others, steps, CUSTOMISED_GUIDANCE)
    word = fused.generate(
        prompt.format(PLACEHOLDER),
        [residual.noun] * len(seeds),
        [picture] * len(seeds),
        seeded(*seeds),
        GUIDED,
        first_levels(FUSED_SHARE, steps),
        steps,
        seeded(FRESH_NOISE)[0],
    )
    return Drawing(text, *(toybox.vae.pictures(latents) for latents in (plain, customised, word, other)))


def score(toybox: Toybox, concept: Concept, drawings: Sequence[Drawing], judge: Judge) -> Report:
    """Means over all drawings, per stream: see `picture_scores`.

    The references themselves reach `references`, and what the autoencoder makes of them `autoencoder`: no latent can do
    better. way_to_the_references: 0 for the plain picture's likeness, 1 for theirs.
    """
    streams = {
        name: torch.cat([getattr(drawing, name) for drawing in drawings])
        for name in ("plain", "customised", "other_seeds", "profusion")
    }
    known = concept.pictures, concept.masks
    scores: Report = {
        name: picture_scores(pictures, streams["plain"], concept.noun, *known, judge)
        for name, pictures in streams.items()
    }
    ceiling = likeness_among(*known)
    decoded = toybox.vae.pictures(toybox.vae.latents(concept.pictures))
    kept = concept_similarity(decoded, concept.masks, *known).mean().item()

    def relative(name: str) -> dict[str, float]:
        likeness, plain = scores[name]["concept_similarity"], scores["plain"]["concept_similarity"]
        change, other = scores[name]["background_change"], scores["other_seeds"]["background_change"]
        return {
            "way_to_the_references": round((likeness - plain) / max(ceiling - plain, 1e-6), 4),
            "background_change_of_another_seed": round(change / max(other, 1e-6), 4),
        }

    scores["references"] = {"concept_similarity": round(ceiling, 4)}
    scores["autoencoder"] = {"concept_similarity": round(kept, 4)}
    scores["profusion"] |= relative("profusion")
    return scores | relative("customised")


def run(
    out: Path,
    concept: Concept,
    options: TrainingOptions,
    prompts: Sequence[str] = DEMO_PROMPTS,
    seeds: Sequence[int] = SEEDS,
    sampling_steps: int = SAMPLING_STEPS,
    say: Say = print,
) -> Report:
    """Train, draw, measure; write grid.png, residual.safetensors, loss.png and report.json into `out`.

    Until then what has been learned is in training_<digits>.safetensors, from which the same command goes on.
    """
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    judge, fused = Judge.load(), FusedToybox.load()  # the judge first: an installed pack has none
    toybox = fused.toybox
    say(
        f"learning {concept.name!r} (noun {concept.noun!r}) from {concept.about or f'{len(concept.pictures)} pictures'}"
    )
    trained = train(toybox, concept, options, say, out)
    residual = trained.residual
    drawings = []
    for prompt in prompts:
        drawings.append(draw(fused, residual, concept.pictures[:1], prompt, seeds, sampling_steps))
        say(f"drawn: {drawings[-1].prompt}")
    preview = to_image(drawings[0].customised[0])
    saved = save_residual(residual, out / "residual.safetensors", preview=preview)
    plot = loss_plot(trained.losses, options.steps, start=trained.first, title=options.loss_title)
    plot.save(out / "loss.png")
    _grid(concept, drawings, trained.masks).save(out / "grid.png")
    report: Report = {
        "concept": concept.name,
        "noun": concept.noun,
        "pictures": len(concept.pictures),
        "training_steps": options.steps,
        **trained.found(),
        "train_seconds": round(trained.seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
        "residual_bytes": saved.path.stat().st_size,
        "prompts": [drawing.prompt for drawing in drawings],
        "samples": len(prompts) * len(seeds),
        **score(toybox, concept, drawings, judge),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    trained.partial.discard()
    return report


def _grid(concept: Concept, drawings: Sequence[Drawing], masks: Tensor | None = None):
    """References on top, then each prompt's plain picture and what both methods make of the same seed.

    masks: weights of the references' cells, where they were found.
    """
    first = [*concept.pictures[: len(drawings)]]
    rows = [("pictures to learn from (ProFusion: the first)", first)]
    if masks is not None:
        rows.append(("what is learned of them", [*masked(concept.pictures, masks)[: len(drawings)]]))
    for column in range(min(2, len(drawings[0].plain))):
        rows.append(("plain", [drawing.plain[column] for drawing in drawings]))
        rows.append(("Infusion, same seed", [drawing.customised[column] for drawing in drawings]))
        rows.append(("ProFusion, one picture, same seed", [drawing.profusion[column] for drawing in drawings]))
    return grid(rows, [drawing.prompt for drawing in drawings])
