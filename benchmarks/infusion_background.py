"""What holding the background keeps and costs: `python -m benchmarks.infusion_background RESIDUAL ...`, on Toybox.

Each residual (of a concept of Toybox's, by its name in the file) is drawn in a few prompts from a few seeds, with the
background free, held and held softly, all beside one run of the plain stream. Likeness: inside the object, to the
drawn references. Moved: outside the objects, in the decoded picture and in the latent, 1 being another seed's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.results import plus_minus, table
from profusion.attending import UNET
from profusion.diffusion import per_row, sampling_sigmas, variance_exploding
from profusion.holding import BACKGROUNDS, FREE, Holding
from profusion.infusion import customised_patches, foundation_patches, on_conditional
from profusion.residual import Residual, load_residual
from profusion.toybox.concepts import DEMO_PROMPTS, drawn_concept
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import CUSTOMISED_GUIDANCE, Toybox, initial_noise, seeded
from profusion.toybox.similarity import background_change, concept_similarity

Scores = dict[str, Tensor]


@torch.no_grad()
def draw(toybox: Toybox, residual: Residual, prompt: str, seeds: Sequence[int], steps: int) -> dict[str, Tensor]:
    """Latents (B, 4, h, w): plain, another seed's, and C's with each background, beside one F."""
    noise, sigmas = initial_noise(seeded(*seeds)), sampling_sigmas(steps)
    placements = on_conditional(toybox.placements(prompt, [residual]))
    evaluate = toybox.evaluator(toybox.context(prompt).expand(len(seeds), -1, -1), CUSTOMISED_GUIDANCE)
    holdings = {
        kind: Holding(kind, partial(UNET.looking, toybox.unet), len(seeds), noise.shape[-2:])
        for kind in BACKGROUNDS
        if kind != FREE
    }
    latents = dict.fromkeys(("plain", *BACKGROUNDS), variance_exploding(noise, sigmas[0]))
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        levels, queries = sigma.expand(len(seeds)), {}
        look = foundation_patches(queries)
        for holding in holdings.values():
            look = holding.watching_foundation(look, placements)
        denoised = {"plain": evaluate(latents["plain"], levels, look)}
        for kind in BACKGROUNDS:
            patches, holding = customised_patches(queries, placements), holdings.get(kind)
            if holding is None:
                denoised[kind] = evaluate(latents[kind], levels, patches)
                continue
            drawn = evaluate(latents[kind], levels, holding.watching_customised(patches, placements))
            denoised[kind] = holding.denoised(drawn, denoised["plain"])
        latents = {
            name: denoised[name] + (x - denoised[name]) * per_row(after / sigma, x) for name, x in latents.items()
        }
    for kind, holding in holdings.items():
        latents[kind] = holding.finished(latents[kind], latents["plain"])
    others = seeded(*(seed + 1000 for seed in seeds))
    latents["another seed"] = toybox.generate([prompt] * len(seeds), others, steps, CUSTOMISED_GUIDANCE)
    return latents


def scores(toybox: Toybox, judge: Judge, name: str, latents: dict[str, Tensor]) -> dict[str, Scores]:
    """Of each picture: likeness, and how far pixels (mean absolute difference) and latent moved from the plain one."""
    concept, found = drawn_concept(name), {}
    pictures = {kind: toybox.vae.pictures(x) for kind, x in latents.items()}
    masks = {kind: judge.object_mask(shown) for kind, shown in pictures.items()}
    for kind, x in latents.items():
        objects = torch.maximum(masks[kind], masks["plain"])
        around = 1 - F.adaptive_max_pool2d(objects[:, None], x.shape[-2:])
        change = ((x - latents["plain"]).abs().mean(dim=1, keepdim=True) * around).sum(dim=(1, 2, 3))
        found[kind] = {
            "likeness": concept_similarity(pictures[kind], masks[kind], concept.pictures, concept.masks),
            "pixels": background_change(pictures[kind], pictures["plain"], objects),
            "latent": change / around.sum(dim=(1, 2, 3)).clamp(min=1),
            "cells equal": (x == latents["plain"]).all(dim=1).float().mean(dim=(1, 2)),
        }
    return found


def summary(found: dict[str, Scores]) -> dict[str, dict[str, list[float]]]:
    """Means and half their 95 % intervals, over pictures; moved as a share of the mean that another seed moves."""

    def interval(values: Tensor, unit: float = 1.0) -> list[float]:
        return [values.mean().item() / unit, 1.96 * values.std().item() / len(values) ** 0.5 / unit]

    other = {name: found["another seed"][name].mean().item() for name in ("pixels", "latent")}
    return {
        kind: {name: interval(values, other.get(name, 1.0)) for name, values in of_kind.items()}
        for kind, of_kind in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("residuals", nargs="+", type=Path, help="files named as their concept, _ for spaces")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    toybox, judge = Toybox.load(), Judge.load()
    gathered: dict[str, dict[str, list[Tensor]]] = {}
    for path in given.residuals:
        residual, name = load_residual(path), path.stem.replace("_", " ")
        for prompt in DEMO_PROMPTS[: given.prompts]:
            latents = draw(toybox, residual, prompt.format(residual.noun), range(1, given.seeds + 1), given.steps)
            for kind, of_kind in scores(toybox, judge, name, latents).items():
                for score, values in of_kind.items():
                    gathered.setdefault(kind, {}).setdefault(score, []).append(values)
        print(f"drawn: {name}", flush=True)
        so_far = {kind: {s: torch.cat(v) for s, v in of_kind.items()} for kind, of_kind in gathered.items()}
        found = summary(so_far)
        if given.out:
            given.out.write_text(json.dumps(found, indent=2) + "\n")
    rows = [[kind, *(plus_minus(values) for values in of_kind.values())] for kind, of_kind in found.items()]
    print(table(["background", *next(iter(found.values()))], rows))


if __name__ == "__main__":
    main()
