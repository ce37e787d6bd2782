"""Does Toybox follow captions? `python -m benchmarks.toybox_captions`: unseen ones, scored by the judge.

Three sets: `unseen`, the held-out combinations of colours, pattern, noun and background, in full; `own appearance`, the
nouns that have one (a lemon); `pairs`, two objects side by side. What the autoencoder alone costs is told by `through
the VAE`: the `unseen` scenes as drawn, encoded and decoded. The judge has learnt from drawn pictures only. A picture
has the right colours if the object that it finds wears the one colour of a plain look, or the two of any other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.rates import Rate
from benchmarks.results import percent, table, write
from profusion.pictures import to_image
from profusion.toybox import world
from profusion.toybox.colors import palette_shares, wears
from profusion.toybox.judge import Judge, halves
from profusion.toybox.pipeline import GUIDANCE, STEPS, Toybox, seeded

GOALS = {"noun": 0.90, "background": 0.95, "color": 0.85}  # on `unseen`

CEILING_SCENES = 128

Outcome = dict[str, list[bool]]
"""For each of "noun", "background", "color" and "pattern" that a scene asks for: whether the picture has it."""


@dataclass(frozen=True)
class Prompts:
    """A named set of scenes and the captions to ask with."""

    name: str
    scenes: tuple[world.Scene, ...]
    captions: tuple[str, ...]


def unseen(count: int, seed: int) -> Prompts:
    """Combinations that training held out."""
    prompts = world.unseen_prompts(count, np.random.default_rng((10, seed)))
    return Prompts("unseen", tuple(scene for scene, _ in prompts), tuple(caption.text for _, caption in prompts))


def _sampled(name: str, count: int, rng: np.random.Generator, wanted) -> Prompts:
    scenes: list[world.Scene] = []
    while len(scenes) < count:
        scene = world.sample_scene(rng)
        if wanted(scene.objects):
            scenes.append(scene)
    return Prompts(name, tuple(scenes), tuple(world.full_caption(scene).text for scene in scenes))


def own_appearance(count: int, seed: int) -> Prompts:
    """Single objects of nouns that imply their looks."""
    rng = np.random.default_rng((11, seed))
    return _sampled("own appearance", count, rng, lambda items: len(items) == 1 and items[0].appearance is None)


def pairs(count: int, seed: int) -> Prompts:
    """Two objects, every look nameable."""

    def wanted(items: Sequence[world.SceneObject]) -> bool:
        return len(items) == 2 and all(item.appearance is None or item.appearance.named for item in items)

    return _sampled("pairs", count, np.random.default_rng((12, seed)), wanted)


def outcomes(judge: Judge, pictures: Tensor, scenes: Sequence[world.Scene]) -> list[Outcome]:
    """Judge pictures (B, SIZE, SIZE, 3) against the scenes asked for, all of the same number of objects."""
    backgrounds = judge.backgrounds(pictures)
    found: list[Outcome] = [
        {"noun": [], "background": [said == scene.background], "color": [], "pattern": []}
        for said, scene in zip(backgrounds, scenes, strict=True)
    ]
    sides = len(scenes[0].objects)
    parts = (pictures,) if sides == 1 else halves(pictures).chunk(2)
    for side, part in enumerate(parts):
        verdict = judge.look(part)
        shares = palette_shares(part, verdict.body_mask).tolist()
        for row, scene in enumerate(scenes):
            item = scene.objects[side]
            found[row]["noun"].append(verdict.nouns[row] == item.noun)
            if item.appearance is not None and item.appearance.named:
                found[row]["color"].append(wears(shares[row], item.appearance))
                found[row]["pattern"].append(verdict.patterns[row] == item.appearance.pattern)
    return found


def generate(toybox: Toybox, prompts: Prompts, steps: int, guidance: float, batch: int, seed: int) -> Tensor:
    """A picture a caption, (n, SIZE, SIZE, 3), each from its own seed."""
    pictures, started = [], time.monotonic()
    for first in range(0, len(prompts.captions), batch):
        captions = prompts.captions[first : first + batch]
        generators = seeded(*(1_000_000 * seed + first + row for row in range(len(captions))))
        pictures.append(toybox.vae.pictures(toybox.generate(captions, generators, steps, guidance)))
        done = first + len(captions)
        pace = (time.monotonic() - started) / done
        left = pace * (len(prompts.captions) - done)
        print(
            f"{prompts.name} {done}/{len(prompts.captions)}  {pace:.2f} s a picture, {left / 60:.1f} min left",
            flush=True,
        )
    return torch.cat(pictures)


def through_the_vae(toybox: Toybox, scenes: Sequence[world.Scene]) -> Tensor:
    """Drawn pictures of scenes, encoded and decoded: the best that the UNet could do."""
    drawn = torch.from_numpy(np.stack([world.render(scene).image for scene in scenes])).float() / 255
    return torch.cat([toybox.vae.pictures(toybox.vae.latents(some)) for some in drawn.split(16)])


def rates(found: Sequence[Outcome]) -> dict[str, Rate]:
    """How often each part of the captions was followed."""
    every = {
        key: [right for outcome in found for right in outcome[key]]
        for key in ("noun", "background", "color", "pattern")
    }
    return {key: Rate.of(values) for key, values in every.items() if values}


def contact_sheet(
    pictures: Sequence[Tensor], captions: Sequence[str], found: Sequence[Outcome], columns: int = 8
) -> Image.Image:
    """Pictures over their captions; under those, in red, what the judge missed."""
    side, cell = world.SIZE, (168, 150)
    sheet = Image.new("RGB", (columns * cell[0], -(-len(pictures) // columns) * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, text, outcome) in enumerate(zip(pictures, captions, found, strict=True)):
        x, y = index % columns * cell[0], index // columns * cell[1]
        sheet.paste(to_image(picture), (x + (cell[0] - side) // 2, y + 4))
        words = text.removeprefix("a photo of ").split()
        lines = [" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])]
        draw.multiline_text((x + cell[0] / 2, y + side + 8), "\n".join(lines), "black", anchor="ma", align="center")
        missed = " ".join(key for key, values in outcome.items() if not all(values))
        draw.text((x + cell[0] / 2, y + side + 36), missed, "red", anchor="ma")
    return sheet


def report(measured: dict[str, dict[str, Rate]]) -> str:
    """The figures as text, with the goals that `unseen` has."""
    lines = []
    for name, by_part in measured.items():
        lines.append(name)
        for part, rate in by_part.items():
            goal = GOALS.get(part) if name == "unseen" else None
            verdict = (
                "" if goal is None else f"  goal {100 * goal:.0f} %: {'reached' if rate.share >= goal else 'MISSED'}"
            )
            lines.append(f"  {part:10} {rate}{verdict}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", type=Path, default=None, help="folder with Toybox's weights (default: the shipped)"
    )
    parser.add_argument(
        "--judge-weights", type=Path, default=None, help="folder with the judge's (default: the shipped)"
    )
    parser.add_argument("--count", type=int, default=512, help="unseen captions; the other sets are an eighth of it")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument(
        "--sheet", type=Path, default=None, help="write the first pictures of each set here, as one PNG"
    )
    parser.add_argument("--shown", type=int, default=48, help="unseen pictures on the sheet")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    toybox, judge = Toybox.load(options.weights), Judge.load(options.judge_weights)
    few = max(1, options.count // 8)
    measured, shown = {}, []
    for prompts in (unseen(options.count, options.seed), own_appearance(few, options.seed), pairs(few, options.seed)):
        pictures = generate(toybox, prompts, options.steps, options.guidance, options.batch, options.seed)
        found = outcomes(judge, pictures, prompts.scenes)
        measured[prompts.name] = rates(found)
        kept = options.shown if prompts.name == "unseen" else options.shown // 3
        if prompts.name == "unseen":
            scenes = prompts.scenes[:CEILING_SCENES]
            measured["through the VAE"] = rates(outcomes(judge, through_the_vae(toybox, scenes), scenes))
        shown += zip(pictures[:kept], prompts.captions, found, strict=False)
    print(report(measured))
    figures = {name: {part: rate.as_json() for part, rate in by_part.items()} for name, by_part in measured.items()}
    rows = [
        (name, part, rate["count"], percent(rate))
        for name, by_part in figures.items()
        for part, rate in by_part.items()
    ]
    recipe = {"count": options.count, "steps": options.steps, "guidance": options.guidance, "seed": options.seed}
    shares = {part: f"{rate['share']:.1%}" for part, rate in figures["unseen"].items()}
    short = (
        f"On {options.count} captions that it has never seen it draws the right noun in {shares['noun']}, the right "
        f"place in {shares['background']} and the right colours in {shares['color']} of its pictures."
    )
    write(options.json, recipe, figures, table(("captions", "part", "pictures", "right"), rows), short=short)
    if options.sheet:
        pictures, captions, found = zip(*shown, strict=True)
        contact_sheet(pictures, captions, found).save(options.sheet)


if __name__ == "__main__":
    main()
