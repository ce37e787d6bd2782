"""The main job on the user's own checkpoint, without a host: a concept from a few pictures, drawn in new places."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image
from torch import Tensor

from .learning import Concept, Report, Say, Trained, train
from .pictures import grid, loss_plot, masked, to_image
from .pipeline import noun_rows, seeded
from .residual import Residual, save_residual
from .residual.training import TrainingOptions
from .stable_diffusion import StableDiffusion

PROMPTS = ("a photo of a {} on grass", "a photo of a {} in the snow", "a photo of a {} on a beach at night")


@dataclass(frozen=True)
class Drawing:
    """One prompt's pictures, (B, H, W, 3) each: plain and Infusion's from the same seeds."""

    prompt: str
    plain: Tensor
    customised: Tensor


def run(
    out: Path,
    model: StableDiffusion,
    concept: Concept,
    options: TrainingOptions,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (1, 2),
    sampling_steps: int = 25,
    say: Say = print,
) -> Report:
    """Train a residual and draw it; write grid.png, residual.safetensors, loss.png and report.json into `out`.

    Until then what has been learned is in training_<digits>.safetensors, from which the same command goes on.
    """
    for prompt in prompts:  # a noun that no prompt can have is said before the training
        noun_rows(prompt.format(concept.noun), concept.noun)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    kind = f"{model.family}, {model.prediction}-prediction, {model.size} pixels"
    say(f"learning {concept.name!r} from {concept.about or f'{len(concept.pictures)} pictures'} on {kind}")
    trained = train(model, concept, options, say, out)
    drawings = []
    for prompt in prompts:
        drawings.append(draw(model, trained.residual, prompt, seeds, sampling_steps))
        say(f"drawn: {drawings[-1].prompt}")
    saved = save_residual(trained.residual, out / "residual.safetensors", preview=to_image(drawings[0].customised[0]))
    report: Report = {
        "model": kind,
        "noun": concept.noun,
        "pictures": len(concept.pictures),
        "training_steps": options.steps,
        **trained.found(),
        "train_seconds": round(trained.seconds, 1),
        "total_seconds": round(time.monotonic() - started, 1),
        "residual_bytes": saved.path.stat().st_size,
        "prompts": [drawing.prompt for drawing in drawings],
        "samples": len(prompts) * len(seeds),
    }
    _write(out, concept, trained, options, drawings, report)
    return report


def draw(model: StableDiffusion, residual: Residual, prompt: str, seeds: Sequence[int], steps: int) -> Drawing:
    """prompt: with {} for the noun."""
    text = prompt.format(residual.noun)
    both = model.generate_customised(text, [residual], seeded(*seeds), steps)
    return Drawing(text, *(model.pictures(latents) for latents in both))


def _write(
    out: Path,
    concept: Concept,
    trained: Trained,
    options: TrainingOptions,
    drawings: Sequence[Drawing],
    report: Report,
) -> None:
    plot = loss_plot(trained.losses, options.steps, start=trained.first, title=options.loss_title)
    plot.save(out / "loss.png")
    _grid(concept, drawings, trained.masks).save(out / "grid.png")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    trained.partial.discard()


def _grid(concept: Concept, drawings: Sequence[Drawing], masks: Tensor | None) -> Image:
    """References on top, then each prompt's plain picture and Infusion's of the same seed.

    masks: weights of the references' cells, where they were found.
    """
    rows = [("pictures to learn from", [*concept.pictures[: len(drawings)]])]
    if masks is not None:
        rows.append(("what is learned of them", [*masked(concept.pictures, masks)[: len(drawings)]]))
    for index in range(len(drawings[0].plain)):
        rows.append(("plain", [drawing.plain[index] for drawing in drawings]))
        rows.append(("Infusion, same seed", [drawing.customised[index] for drawing in drawings]))
    return grid(rows, [drawing.prompt for drawing in drawings])
