"""What a Toybox must pass, in the order of its training: `python -m training.gates GATE --weights DIR`.

vae: what the autoencoder alone makes of scenes it has not seen. Nothing after it is worth training before it holds.
base: whether captions are followed, and whether the noun's row carries its object, which Infusion stands on.
joint: the same of the joint-attention network.
word: what S* alone carries of a picture, with the PromptNet among the weights.
concept: what the demo scores, over all ten concepts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import fusion_ablation, fusion_judging, toybox_attention, toybox_captions
from profusion import demo
from profusion.models.vae import VAE
from profusion.promptnet.file import load_promptnet
from profusion.toybox import concepts, world
from profusion.toybox.configs import TOYBOX_VAE
from profusion.toybox.fused import FusedToybox
from profusion.toybox.joint import JointToybox
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import GUIDANCE, Toybox, load_network, weight_file
from profusion.toybox.similarity import background_change, concept_similarity

from .sheets import drawn_pictures, through

STEPS, FEW_STEPS = 30, 12
PAIR_BOUNDS = {"noun": 0.97, "color": 0.9}  # side by side, objects are small, and a judge of patterns is less sure


@dataclass(frozen=True)
class Figure:
    """Something measured, and the bound that it must keep: at least, or (`most`) at most."""

    name: str
    value: float
    bound: float
    most: bool = False

    @property
    def holds(self) -> bool:
        return self.value <= self.bound if self.most else self.value >= self.bound

    def __str__(self) -> str:
        sign = "<=" if self.most else ">="
        return f"{'holds ' if self.holds else 'MISSED'} {self.name:44} {self.value:8.4f}  {sign} {self.bound:g}"


# --- gate 1 ------------------------------------------------------------------------------------------------------


def load_vae(folder: Path | None) -> VAE:
    """The autoencoder of a folder of weights, which need not hold the rest."""
    vae = VAE(TOYBOX_VAE)
    vae.load_state_dict(load_network("vae", folder))
    return vae.eval().requires_grad_(False)


def vae_figures(vae: VAE, judge: Judge, count: int, seed: int = 0) -> Iterator[Figure]:
    """Gate 1, on `count` scenes of each kind; what the judge makes of them as drawn says how far it can be trusted."""
    singles, pairs = toybox_captions.unseen(count, seed), toybox_captions.pairs(count // 2, seed)
    single_bounds = {"noun": 0.99, "pattern": 0.98, "color": 0.99}
    for prompts, bounds in ((singles, single_bounds), (pairs, PAIR_BOUNDS)):
        drawn = drawn_pictures(prompts.scenes)
        for name, pictures in (("as drawn", drawn), ("decoded", through(vae, drawn))):
            rates = toybox_captions.rates(toybox_captions.outcomes(judge, pictures, prompts.scenes))
            for part, bound in bounds.items():
                yield Figure(f"{prompts.name}, {name}: {part}", rates[part].share, bound)
    yield Figure("PSNR (dB), mean of any scenes", _psnr(vae, count, seed), 29)
    for name in world.CONCEPTS:
        yield Figure(f"likeness: {name}", _likeness(vae, name, max(2, count // 16), seed), 0.97)
    yield Figure("background moved by the object's latents", _exchange(vae, count, seed), 0.003, most=True)


def _psnr(vae: VAE, count: int, seed: int) -> float:
    rng = np.random.default_rng((30, seed))
    pictures = drawn_pictures(tuple(world.sample_scene(rng, hold_out=False) for _ in range(count)))
    squared = (through(vae, pictures) - pictures).square().mean(dim=(1, 2, 3))
    return (-10 * squared.log10()).mean().item()


def _likeness(vae: VAE, name: str, count: int, seed: int) -> float:
    """Mean likeness of a concept's decoded pictures, each to itself as drawn."""
    drawn = world.concept_pictures(name, count, np.random.default_rng((31, seed)))
    pictures = torch.from_numpy(np.stack([picture.image for picture in drawn])).float() / 255
    masks = torch.from_numpy(np.stack([picture.masks[0] for picture in drawn])).float() / 255
    decoded = through(vae, pictures)
    rows = [slice(row, row + 1) for row in range(len(drawn))]
    return torch.cat([concept_similarity(decoded[r], masks[r], pictures[r], masks[r]) for r in rows]).mean().item()


def _exchange(vae: VAE, count: int, seed: int) -> float:
    """How far the decoded background moves if the object's cells are those of the same scene with another
    appearance."""
    rng, changes = np.random.default_rng((32, seed)), []
    while len(changes) < count:
        scene = world.sample_scene(rng)
        item = scene.objects[0]
        if len(scene.objects) > 1 or item.appearance is None:
            continue
        other = replace(scene, objects=(replace(item, appearance=world.sample_appearance(rng)),))
        latents = vae.latents(drawn_pictures((scene, other)))
        mask = torch.from_numpy(world.render(scene).masks).float() / 255
        cells = F.max_pool2d(mask[None], 8) > 0.5  # (1, 1, CELLS, CELLS)
        plain, moved = vae.pictures(torch.cat([latents[:1], torch.where(cells, latents[1:], latents[:1])])).split(1)
        changes.append(background_change(moved, plain, mask).item())
    return float(np.mean(changes))


# --- gate 2 ------------------------------------------------------------------------------------------------------


def base_figures(toybox: Toybox, judge: Judge, count: int, seed: int = 0) -> Iterator[Figure]:
    """Gate 2, on `count` captions of single objects and an eighth of it of pairs, at 30 steps and at 12."""
    singles = toybox_captions.unseen(count, seed)
    pairs = toybox_captions.pairs(max(1, count // 8), seed)
    bounds = ((singles, {"noun": 0.98, "background": 0.99, "color": 0.95, "pattern": 0.9}), (pairs, PAIR_BOUNDS))
    for prompts, wanted in bounds:
        rates = {steps: _rates(toybox, judge, prompts, steps, seed) for steps in (STEPS, FEW_STEPS)}
        for part, bound in wanted.items():
            yield Figure(f"{prompts.name}, {STEPS} steps: {part}", rates[STEPS][part], bound)
            lost = rates[STEPS][part] - rates[FEW_STEPS][part]
            yield Figure(f"{prompts.name}, lost at {FEW_STEPS} steps: {part}", lost, 0.03, most=True)
    yield from _share_figures(toybox, seed, 0.5)
    yield from _swap_figures(toybox, judge, seed)


def joint_figures(toybox: JointToybox, judge: Judge, count: int, seed: int = 0) -> Iterator[Figure]:
    """The joint-attention network's gate, on `count` captions of single objects at 30 steps."""
    singles = toybox_captions.unseen(count, seed)
    rates = _rates(toybox, judge, singles, STEPS, seed)
    for part, bound in {"noun": 0.95, "background": 0.95, "color": 0.85}.items():
        yield Figure(f"{singles.name}, {STEPS} steps: {part}", rates[part], bound)
    yield from _share_figures(toybox, seed, 0.25)


def _rates(toybox: Toybox | JointToybox, judge: Judge, prompts, steps: int, seed: int) -> dict[str, float]:
    pictures = toybox_captions.generate(toybox, prompts, steps, GUIDANCE, 32, seed)
    found = toybox_captions.rates(toybox_captions.outcomes(judge, pictures, prompts.scenes))
    return {part: rate.share for part, rate in found.items()}


def _share_figures(toybox: Toybox | JointToybox, seed: int, bound: float) -> Iterator[Figure]:
    """The noun's row: its share of the attention inside the object."""
    shares = toybox_attention.look_at_attention(toybox, 64, seed)
    for name, by_layer in shares.items():
        yield Figure(f"noun's share inside, {name} captions", toybox_attention.noun_share(by_layer), bound)


def _swap_figures(toybox: Toybox, judge: Judge, seed: int) -> Iterator[Figure]:
    """The noun's row: what moving its value alone does."""
    pairs = toybox_attention.sample_pairs(12, seed)
    verdicts, _ = toybox_attention.swap_pairs(toybox, judge, pairs, 4, seed, STEPS, GUIDANCE)
    swap = verdicts["full", "own queries"]
    yield Figure("value swapped: donor's colours follow", swap.followed.share, 11 / 12)
    yield Figure("value swapped: background, of another seed's", swap.background_share, 1 / 3, most=True)


# --- gates 3 and 4 -----------------------------------------------------------------------------------------------


def word_figures(fused: FusedToybox, judge: Judge, count: int, seed: int = 0) -> Iterator[Figure]:
    """Gate 3: "a photo of S*", of `count` pictures that training has not seen."""
    known = fusion_judging.references(count, seed)
    measured = fusion_ablation.words(fused, judge, known, STEPS, GUIDANCE)
    word, caption = measured["S* alone"], measured["full caption"]
    for part, bound in (("noun", 0.95), ("color", 0.85)):
        yield Figure(f"S* alone: {part}", word[part]["share"], bound)
        yield Figure(f"full caption: {part}", caption[part]["share"], bound)
    yield Figure("S* alone: likeness, of the full caption's", word["concept"][0] / caption["concept"][0], 0.9)


def concept_figures(fused: FusedToybox, judge: Judge) -> Iterator[Figure]:
    """Gate 4: the demo on each concept, with its own settings; the means of all of them."""
    ways, backgrounds, words = [], [], []
    for name in world.CONCEPTS:
        concept = concepts.drawn_concept(name)
        residual = demo.train(fused.toybox, concept, demo.OPTIONS, lambda _: None).residual
        drawings = [
            demo.draw(fused, residual, concept.pictures[:1], prompt, demo.SEEDS, demo.SAMPLING_STEPS)
            for prompt in concepts.DEMO_PROMPTS
        ]
        found = demo.score(fused.toybox, concept, drawings, judge)
        ways.append(found["way_to_the_references"])
        backgrounds.append(found["background_change_of_another_seed"])
        words.append(found["profusion"]["way_to_the_references"])
        print(f"{name}: Infusion {ways[-1]}, background {backgrounds[-1]}, ProFusion {words[-1]}", flush=True)
    yield Figure("Infusion: way to the references, mean", float(np.mean(ways)), 0.85)
    yield Figure("Infusion: background, of another seed's", float(np.mean(backgrounds)), 0.33, most=True)
    yield Figure("ProFusion: way to the references, mean", float(np.mean(words)), 0.65)


# --- the command -------------------------------------------------------------------------------------------------


def report(figures: Sequence[Figure], path: Path | None) -> bool:
    """Whether all hold; the figures as JSON, if a path is given."""
    missed = [figure.name for figure in figures if not figure.holds]
    print(f"GATE {'NOT PASSED: ' + ', '.join(missed) if missed else 'PASSED'}")
    if path:
        path.write_text(json.dumps([asdict(figure) | {"holds": figure.holds} for figure in figures], indent=1) + "\n")
    return not missed


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gate", choices=("vae", "base", "joint", "word", "concept"))
    parser.add_argument("--weights", type=Path, default=None, help="folder with the weights (default: the shipped)")
    parser.add_argument("--count", type=int, default=None, help="scenes, captions or pictures (default: 256, 512, 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    return parser.parse_args(given)


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    judge = Judge.load(arguments.weights)
    if arguments.gate == "vae":
        return vae_figures(load_vae(arguments.weights), judge, arguments.count or 256, arguments.seed)
    if arguments.gate in ("word", "concept"):
        promptnet = load_promptnet(weight_file("promptnet", arguments.weights))
        fused = FusedToybox(Toybox.load(arguments.weights), promptnet)
        if arguments.gate == "concept":
            return concept_figures(fused, judge)
        return word_figures(fused, judge, arguments.count or 64, arguments.seed)
    if arguments.gate == "joint":
        return joint_figures(JointToybox.load(arguments.weights), judge, arguments.count or 512, arguments.seed)
    return base_figures(Toybox.load(arguments.weights), judge, arguments.count or 512, arguments.seed)


def main(given: list[str] | None = None) -> None:
    arguments, figures = parse_arguments(given), []
    for figure in measure(arguments):
        print(figure, flush=True)
        figures.append(figure)
    sys.exit(0 if report(figures, arguments.json) else 1)


if __name__ == "__main__":
    main()
