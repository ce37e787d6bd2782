"""Does Fusion Sampling help? `python -m benchmarks.fusion_ablation`: ProFusion's ablation (arXiv 2305.13579) on Toybox.

The variants differ in sampling alone, and are judged as `benchmarks.fusion_judging` says. `--figures words` tells
instead what S* alone carries: "a photo of S*" against plain text and a mean embedding.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fusion_judging import FUSION_PROMPTS, Draw, References, likeness, references, rounded, scores
from benchmarks.rates import Rate
from benchmarks.results import percent, plus_minus, table, write
from profusion.fusion import FusionOptions, Guidance
from profusion.promptnet.file import load_promptnet
from profusion.toybox import world
from profusion.toybox.colors import palette_shares, wears
from profusion.toybox.fused import FUSED_SHARE, GUIDED, FusedToybox, first_levels
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import WEIGHTS, Toybox, seeded

SHIPPED = WEIGHTS / "toybox_promptnet.safetensors"
NO_FUSION = FusionOptions(0)


@dataclass(frozen=True)
class Variant:
    """One way to sample."""

    name: str
    guidance: Guidance
    options: FusionOptions


def variants(cfg: float, text_weight: float, options: FusionOptions) -> list[Variant]:
    """The paper's rows. With fusion_cfg in both stages, nothing is refined."""
    both = Guidance((1.0, text_weight), cfg, fusion_weights=(1.0, 0.0))
    return [
        Variant("plain guidance by S*, C", Guidance((1.0,), cfg), NO_FUSION),
        Variant("no fusion stage", both, NO_FUSION),
        Variant("no refinement stage", replace(both, cfg=both.fusion_cfg), options),
        Variant("full", both, options),
        Variant("full, the plain text in the fusion stage too", replace(both, fusion_weights=None), options),
    ]


def reasons(cfg: float, options: FusionOptions) -> list[Variant]:
    """What the fusion stage does by itself: both stages without the plain text, and that
    without less of S* in the first."""
    alone = Guidance((1.0,), cfg)
    return [
        Variant("both stages, no plain text", alone, options),
        Variant("both stages, no plain text, gamma 1", replace(alone, gamma=1.0), options),
    ]


def drawn_by(fused: FusedToybox, variant: Variant, steps: int) -> Draw:
    """How pictures are drawn by a variant."""

    def draw(prompt, nouns, pictures, generators, fresh) -> Tensor:
        return fused.toybox.vae.pictures(
            fused.generate(prompt, nouns, pictures, generators, variant.guidance, variant.options, steps, fresh)
        )

    return draw


def words(fused: FusedToybox, judge: Judge, known: References, steps: int, cfg: float) -> dict[str, dict]:
    """What S* alone reproduces, against the noun in plain text, the full caption, and the mean of all S*."""
    indices = range(len(known.scenes))
    pictures, seeds = known.pictures.split(1), [9000 + index for index in indices]
    mean = FusedToybox(fused.toybox, MeanWord(fused, known.pictures))

    def with_word(source: FusedToybox) -> Tensor:
        return source.generate(
            "a photo of S*", known.nouns, pictures, seeded(*seeds), Guidance((1.0,), cfg), NO_FUSION, steps
        )

    def in_words(prompts: list[str]) -> Tensor:
        return fused.toybox.generate(prompts, seeded(*seeds), steps, cfg)

    drawn = {
        "S* alone": with_word(fused),
        "noun in plain text": in_words([f"a photo of a {noun}" for noun in known.nouns]),
        "full caption": in_words([world.full_caption(scene).text for scene in known.scenes]),
        "mean S*": with_word(mean),
    }
    found = {}
    for name, latents in drawn.items():
        shown = fused.toybox.vae.pictures(latents)
        seen = judge.look(shown)
        shares = palette_shares(shown, seen.body_mask).tolist()
        looks = [scene.objects[0].appearance for scene in known.scenes]
        found[name] = {
            "noun": Rate.of([said == noun for said, noun in zip(seen.nouns, known.nouns, strict=True)]).as_json(),
            "color": Rate.of([wears(share, look) for share, look in zip(shares, looks, strict=True)]).as_json(),
            "concept": rounded(likeness(shown, seen.object_mask, known, indices)),
        }
    return found


class MeanWord:
    """Stands in for a PromptNet: the mean of its S* over all pictures and timesteps, whatever the picture."""

    def __init__(self, fused: FusedToybox, pictures: Tensor):
        self.config = fused.promptnet.config
        timesteps = torch.linspace(0, 999, 8)
        self._mean = torch.stack([fused.words(one, timesteps).mean(dim=0) for one in pictures.split(1)]).mean(dim=0)

    def embed_all(self, latent: Tensor, image_tokens: Tensor, timesteps: Tensor) -> Tensor:
        return self._mean.expand(len(timesteps), -1, -1)


def words_table(measured: dict[str, dict], count: int) -> str:
    rows = [
        (name, percent(one["noun"]), percent(one["color"]), plus_minus(one["concept"]))
        for name, one in measured.items()
    ]
    return f"{count} unseen pictures.\n\n" + table(
        ("drawn by", "right noun", "right colours", "likeness to the picture"), rows
    )


def ablation_table(measured: dict[str, dict], count: int) -> str:
    rows = [
        (name, plus_minus(one["concept"]), percent(one["noun"]), percent(one["text"]), f"{one['rows_a_step']:.2f}")
        for name, one in measured.items()
    ]
    heads = ("sampling", "likeness to the picture", "right noun", "rest of the prompt followed", "UNet rows a step")
    return f"{count} unseen pictures x {len(FUSION_PROMPTS)} prompts, with 95 % intervals.\n\n" + table(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", choices=("ablation", "words"), default="ablation")
    parser.add_argument("--promptnet", type=Path, default=SHIPPED, help="the PromptNet's file")
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
        options = FusionOptions(given.repeats, given.eta)
        default = Variant(
            "as Fusion KSampler comes", replace(GUIDED, cfg=given.cfg), first_levels(FUSED_SHARE, given.steps)
        )
        for variant in (*variants(given.cfg, given.text_weight, options), *reasons(given.cfg, options), default):
            before = fused.rows
            drawn = scores(drawn_by(fused, variant, given.steps), judge, known, FUSION_PROMPTS, given.batch)
            measured[variant.name] = drawn.as_json()
            rows = (fused.rows - before) / given.count / len(FUSION_PROMPTS) / given.steps
            measured[variant.name]["rows_a_step"] = round(rows, 2)
            print(variant.name, json.dumps(measured[variant.name]), flush=True)
    shown = words_table if given.figures == "words" else ablation_table
    write(given.json, vars(given), measured, shown(measured, given.count))


if __name__ == "__main__":
    main()
