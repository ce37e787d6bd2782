"""Does Fusion Sampling help? `python -m benchmarks.fusion_ablation`: ProFusion's ablation (arXiv 2305.13579) on Toybox.

Unseen pictures (held-out combinations, each drawn once as the reference) times prompts that put S* on another background or
beside a second object. The variants differ in sampling alone; same seeds. Judged: whether the object looks like the reference
(`concept`, 0..1), is the right noun, and whether the rest of the prompt was followed (`text`: background, or second object and
its colour). `--figures words` tells instead what S* alone carries: "a photo of S*" against plain text and a mean embedding.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.rates import Rate
from profusion.fusion import FusionOptions, Guidance
from profusion.promptnet.file import load_promptnet
from profusion.promptnet.network import PromptNet
from profusion.toybox import world
from profusion.toybox.colors import palette_shares, wears
from profusion.toybox.fused import FusedToybox
from profusion.toybox.judge import Judge, halves
from profusion.toybox.pipeline import Toybox, seeded
from profusion.toybox.similarity import concept_similarity

SECOND = "a S* and a blue star"
PLACES = ("a photo of a S* on snow", "a photo of a S* at night", "a photo of a S* by a brick wall", SECOND)
_BACKGROUND = {"on snow": "snow", "at night": "night", "by a brick wall": "wall"}


@dataclass(frozen=True)
class Variant:
    """One way to sample. repeats_in: the window of the fusion stage as shares of sampling."""

    name: str
    guidance: Guidance
    options: FusionOptions
    window: tuple[float, float] = (0.0, 1.0)


def variants(cfg: float, text_weight: float, eta: float, repeats: int) -> list[Variant]:
    """The paper's rows, and cheaper ones. With cfg = fusion_cfg and gamma in both stages, nothing is refined."""
    both = Guidance((1.0, text_weight), cfg)
    stage = FusionOptions(repeats, eta)
    return [
        Variant("plain guidance by S*, C", Guidance((1.0, 0.0), cfg), FusionOptions(0)),
        Variant("no fusion stage", both, FusionOptions(0)),
        Variant("no refinement stage", replace(both, cfg=both.fusion_cfg), stage),
        Variant("full", both, stage),
        Variant("full, first half", both, stage, (0.0, 0.5)),
        Variant("full, S* alone in its window", Guidance((1.0, 0.0), cfg), stage, (0.0, 0.5)),
    ]


@dataclass(frozen=True)
class References:
    """Pictures (N, 96, 96, 3), object masks (N, 96, 96) and the scenes they are of."""

    pictures: Tensor
    masks: Tensor
    scenes: list[world.Scene]


def references(count: int, seed: int) -> References:
    """Single objects of combinations that training never drew."""
    scenes = [scene for scene, _ in world.unseen_prompts(count, np.random.default_rng((20, seed)))]
    drawn = [world.render(scene) for scene in scenes]
    pictures = torch.stack([torch.from_numpy(item.image).float() / 255 for item in drawn])
    masks = torch.stack([torch.from_numpy(item.masks[0]).float() / 255 for item in drawn])
    return References(pictures, masks, scenes)


def mean_interval(values: Sequence[float], z: float = 1.96) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
    return mean, z * spread / math.sqrt(len(values))


def windowed(options: FusionOptions, window: tuple[float, float]) -> FusionOptions:
    """Options whose stage acts in a window of sampling, by timestep."""
    from profusion.diffusion import training_sigmas

    sigmas = training_sigmas()
    start, end = (float(sigmas[min(999, int((1 - percent) * 999))]) for percent in window)
    return replace(options, sigma_start=start + 1e-4, sigma_end=end if window[1] < 1 else 0.0)


def measure(fused: FusedToybox, judge: Judge, known: References, variant: Variant, steps: int, batch: int) -> dict:
    """All pictures under all prompts -> figures."""
    concept, nouns, texts, started, rows = [], [], [], time.monotonic(), fused.rows
    options = windowed(variant.options, variant.window)
    for prompt_index, prompt in enumerate(PLACES):
        for first in range(0, len(known.scenes), batch):
            some = slice(first, first + batch)
            scenes, pictures = known.scenes[some], known.pictures[some]
            for noun in dict.fromkeys(scene.objects[0].noun for scene in scenes):
                index = [i for i, scene in enumerate(scenes) if scene.objects[0].noun == noun]
                generators = seeded(*(7000 * prompt_index + first + i for i in index))
                fresh = torch.Generator().manual_seed(prompt_index)
                latents = fused.generate(
                    prompt, noun, [pictures[i : i + 1] for i in index], generators, variant.guidance, options, steps, fresh
                )
                drawn = fused.toybox.vae.pictures(latents)
                for row, i in enumerate(index):
                    figures = judged(judge, drawn[row : row + 1], noun, prompt, known, first + i)
                    for kept, value in zip((concept, nouns, texts), figures, strict=True):
                        kept.append(value)
    pictures = len(known.scenes) * len(PLACES)
    mean, half = mean_interval(concept)
    return {
        "concept": [round(mean, 4), round(half, 4)],
        "noun": Rate.of(nouns).as_json(),
        "text": Rate.of(texts).as_json(),
        "rows_a_step": round((fused.rows - rows) / pictures / steps, 2),
        "seconds_a_picture": round((time.monotonic() - started) / pictures, 3),
    }


def judged(judge: Judge, picture: Tensor, noun: str, prompt: str, known: References, index: int) -> tuple[float, bool, bool]:
    """Likeness to the reference, whether the noun is right, whether the rest of the prompt is there."""
    reference = known.pictures[index : index + 1], known.masks[index : index + 1]
    if prompt == SECOND:
        left, right = halves(picture).split(1)
        seen = judge.look(right)
        blue = wears(palette_shares(right, seen.body_mask)[0].tolist(), world.Appearance("plain", world.PALETTE["blue"], None, "blue"))
        text, picture = seen.nouns[0] == "star" and blue, left
    else:
        wanted = next(place for words, place in _BACKGROUND.items() if prompt.endswith(words))
        text = judge.backgrounds(picture)[0] == wanted
    seen = judge.look(picture)
    return concept_similarity(picture, seen.object_mask, *reference).item(), seen.nouns[0] == noun, text


def words(fused: FusedToybox, judge: Judge, known: References, steps: int, cfg: float) -> dict[str, dict]:
    """What S* alone reproduces, against the noun in plain text, the full caption, and the mean of all S*."""
    count, found = len(known.scenes), {}
    generators = [9000 + index for index in range(count)]
    plain = [f"a photo of a {scene.objects[0].noun}" for scene in known.scenes]
    full = [world.full_caption(scene).text for scene in known.scenes]
    alone = Guidance((1.0, 0.0), cfg)
    pictures = [known.pictures[index : index + 1] for index in range(count)]
    mean = fused.promptnet, MeanWord(fused.promptnet, fused, known.pictures)
    drawn = {
        "S* alone": fused.generate("a photo of S*", "thing", pictures, seeded(*generators), alone, FusionOptions(0), steps),
        "noun in plain text": fused.toybox.generate(plain, seeded(*generators), steps, cfg),
        "full caption": fused.toybox.generate(full, seeded(*generators), steps, cfg),
    }
    fused.promptnet = mean[1]
    drawn["mean S*"] = fused.generate("a photo of S*", "thing", pictures, seeded(*generators), alone, FusionOptions(0), steps)
    fused.promptnet = mean[0]
    for name, latents in drawn.items():
        shown = fused.toybox.vae.pictures(latents)
        seen = judge.look(shown)
        shares = palette_shares(shown, seen.body_mask).tolist()
        looks = [scene.objects[0].appearance for scene in known.scenes]
        likeness = [
            concept_similarity(shown[i : i + 1], seen.object_mask[i : i + 1], known.pictures[i : i + 1], known.masks[i : i + 1]).item()
            for i in range(count)
        ]
        found[name] = {
            "noun": Rate.of([said == scene.objects[0].noun for said, scene in zip(seen.nouns, known.scenes, strict=True)]).as_json(),
            "color": Rate.of([wears(share, look) for share, look in zip(shares, looks, strict=True)]).as_json(),
            "concept": [round(value, 4) for value in mean_interval(likeness)],
        }
    return found


class MeanWord:
    """Stands in for a PromptNet: the mean of its S* over all pictures, whatever the picture."""

    def __init__(self, network: PromptNet, fused: FusedToybox, pictures: Tensor):
        self.config = network.config
        timesteps = torch.linspace(0, 999, 8)
        self._mean = torch.stack([fused.words(one[None], timesteps).mean(dim=0) for one in pictures]).mean(dim=0)

    def embed_all(self, latent: Tensor, image_tokens: Tensor, timesteps: Tensor) -> Tensor:
        return self._mean.expand(len(timesteps), -1, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", choices=("ablation", "words"), default="ablation")
    parser.add_argument("--promptnet", type=Path, required=True, help="the PromptNet's file")
    parser.add_argument("--count", type=int, default=32, help="unseen pictures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--text-weight", type=float, default=0.5)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    given = parser.parse_args()
    fused, judge = FusedToybox(Toybox.load(), load_promptnet(given.promptnet)), Judge.load()
    known = references(given.count, given.seed)
    if given.figures == "words":
        measured = words(fused, judge, known, given.steps, given.cfg)
    else:
        measured = {}
        for variant in variants(given.cfg, given.text_weight, given.eta, given.repeats):
            measured[variant.name] = measure(fused, judge, known, variant, given.steps, given.batch)
            print(variant.name, json.dumps(measured[variant.name]), flush=True)
    print(json.dumps(measured, indent=1))
    if given.json:
        given.json.write_text(json.dumps({**{k: str(v) for k, v in vars(given).items()}, "figures": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
