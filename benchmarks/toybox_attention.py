"""Can Infusion work on this Toybox? `python -m benchmarks.toybox_attention`: the gate before the method is judged.

Infusion (arXiv 2404.14007) moves the value of the noun's row in every cross-attention. It can change what an object
looks like only as far as the object's cells attend to that row, so two things are measured:

- the attention's shares, on noised latents of drawn pictures: of the noun's row inside and outside the object, and of
  the end and padding rows, layer by layer;
- a swap: a prompt is drawn with its noun's value, and nothing else, taken from another prompt ("a red striped ball on
  grass" with the ball of "a blue dotted ball on grass"). The other's colours should follow and the background stay.
  Asked with all attributes, whose own rows still say "red", and with the bare noun, which is Infusion's case; with the
  stream's own queries, and with the plain run's, as in the paper.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rates import Rate
from profusion.diffusion import noised, sample_euler, sampling_sigmas
from profusion.flow import TIMESTEPS as TIMESTEPS_IN_ALL
from profusion.flow import interpolated
from profusion.infusion import Placement, cross_attention_layers, on_conditional
from profusion.models.tokenizer import words_to_ids
from profusion.pictures import grid
from profusion.streams import two_stream_denoiser
from profusion.toybox import world
from profusion.toybox.colors import palette_shares, wears
from profusion.toybox.joint import JointToybox
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import GUIDANCE, STEPS, Toybox, initial_noise, noun_rows, seeded
from profusion.toybox.similarity import background_change

TIMESTEPS = (200, 400, 600, 800)
LEAST_SHARE, LEAST_FOLLOWED, MOST_BACKGROUND = 0.3, 0.6, 1 / 3


# --- attention shares --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Mean attention in one layer: the noun's row in cells of the object and outside it, and
    the end and padding rows'."""

    noun_inside: float
    noun_outside: float
    padding_inside: float
    padding_outside: float


def attention_shares(
    toybox: Toybox | JointToybox, pictures: Sequence[world.Picture], bare: bool, seed: int
) -> dict[str, Shares]:
    """Shares by layer, over TIMESTEPS, of pictures that are noised and captioned in full or with the bare noun.

    In a joint attention they are shares of all that a cell looks at, other cells included.
    """
    describe = world.bare_caption if bare else world.full_caption
    texts = [describe(picture.scene).text for picture in pictures]
    nouns = torch.tensor([noun_rows(text, p.scene.objects[0].noun)[0] for text, p in zip(texts, pictures, strict=True)])
    ends = torch.tensor([1 + len(words_to_ids(text)) for text in texts])
    images = torch.from_numpy(np.stack([picture.image for picture in pictures])).float() / 255
    masks = torch.from_numpy(np.stack([picture.masks[0] for picture in pictures])).float() / 255
    clean, context = toybox.vae.latents(images), toybox.context(texts)
    generator, found = torch.Generator().manual_seed(seed), defaultdict(list)

    def probe(layer: tuple[str, int, int] | int, attention: Tensor) -> None:
        name = f"block.{layer}" if isinstance(layer, int) else ".".join(map(str, layer))
        seen = attention.mean(dim=1)[..., : context.shape[1]]
        found[name].append(_shares(seen, masks, nouns, ends))

    for t in TIMESTEPS:
        timesteps = torch.full((len(clean),), t)
        noise = torch.randn(clean.shape, generator=generator)
        with torch.no_grad():
            if isinstance(toybox, JointToybox):
                toybox.mmdit(interpolated(clean, noise, timesteps / TIMESTEPS_IN_ALL), timesteps, context, probe)
            else:
                options = {"attention_probe": probe}
                toybox.unet(noised(clean, noise, timesteps), timesteps, context, transformer_options=options)
    return {layer: Shares(*np.mean(values, axis=0).tolist()) for layer, values in found.items()}


def _shares(attention: Tensor, masks: Tensor, nouns: Tensor, ends: Tensor) -> list[float]:
    """One map (B, T, 77), of a cell's attention to the text -> the four numbers of `Shares`."""
    inside = F.adaptive_avg_pool2d(masks[:, None], math.isqrt(attention.shape[1])).flatten(1)  # (B, T)
    noun = attention[torch.arange(len(nouns)), :, nouns]  # (B, T)
    padding = (attention * (torch.arange(attention.shape[2]) >= ends[:, None])[:, None]).sum(dim=2)
    return [((share * cells).sum() / cells.sum()).item() for share in (noun, padding) for cells in (inside, 1 - inside)]


# --- the swap ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two scenes that differ in the object's appearance alone, without a common colour."""

    scene: world.Scene
    donor: world.Scene

    @property
    def looks(self) -> tuple[world.Appearance, world.Appearance]:
        return self.scene.objects[0].appearance, self.donor.objects[0].appearance


def sample_pairs(count: int, seed: int) -> list[Pair]:
    """Pairs of single, nameable objects of generic nouns, on all backgrounds."""
    rng, pairs = np.random.default_rng((20, seed)), []
    while len(pairs) < count:
        scene = world.sample_scene(rng)
        item, other = scene.objects[0], world.sample_appearance(rng)
        if len(scene.objects) == 1 and item.appearance is not None and item.appearance.named and other.named:
            mine, others = ({look.name1, look.name2} - {None} for look in (item.appearance, other))
            if not mine & others:
                pairs.append(Pair(scene, replace(scene, objects=(replace(item, appearance=other),))))
    return pairs


@dataclass(frozen=True)
class Swap:
    """Pictures (B, SIZE, SIZE, 3) of one prompt and the same seeds: as it is, with the donor's
    noun value, and from others."""

    plain: Tensor
    swapped: Tensor
    other_seeds: Tensor


def draw_swaps(
    toybox: Toybox, pair: Pair, bare: bool, seeds: Sequence[int], steps: int, guidance: float
) -> dict[str, Swap]:
    """A `Swap` with "own queries" and one with "plain queries".

    The value swap is a residual, donor's row minus own row, the same in every layer.
    """
    describe = world.bare_caption if bare else world.full_caption
    prompt, donor, noun = describe(pair.scene).text, world.full_caption(pair.donor).text, pair.scene.objects[0].noun
    own, taken = noun_rows(prompt, noun), noun_rows(donor, noun)
    difference = toybox.context(donor)[0, list(taken)] - toybox.context(prompt)[0, list(own)]  # (1, 128)
    layers = tuple(layer.name for layer in cross_attention_layers(dict(toybox.unet.named_parameters())))
    placement = Placement(difference.expand(len(layers), 1, -1), layers, own)
    evaluate = toybox.evaluator(toybox.context(prompt).expand(len(seeds), -1, -1), guidance)
    noise, sigmas = initial_noise(seeded(*seeds)), sampling_sigmas(steps)

    def swap_value(n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        conditional, *rest = value.chunk(len(options["cond_or_uncond"]))
        return n, context, torch.cat([placement.add_to(conditional, layers[0]), *rest])

    with torch.no_grad():
        locked = sample_euler(
            two_stream_denoiser(evaluate, on_conditional([placement])), torch.cat([noise, noise]), sigmas
        )
        patches = {"attn2_patch": [swap_value]}
        free = sample_euler(lambda x, sigma: evaluate(x, sigma, patches), noise, sigmas)
        others = initial_noise(seeded(*(seed + 500_000 for seed in seeds)))
        other = sample_euler(lambda x, sigma: evaluate(x, sigma, {}), others, sigmas)
    plain, locked, free, other = (toybox.vae.pictures(x) for x in (*locked.chunk(2), free, other))
    return {"own queries": Swap(plain, free, other), "plain queries": Swap(plain, locked, other)}


@dataclass(frozen=True)
class Swapped:
    """What became of one picture: the donor's colours' share of the object before and after; whether it now
    has more of them than of the prompt's; whether it passes for the donor's caption; whether its noun is kept;
    the overlap of the objects before and after; and how much the background changed (mean absolute
    difference), and does from another seed."""

    share_before: float
    share_after: float
    followed: bool
    wears_donor: bool
    noun_kept: bool
    overlap: float
    background: float
    background_other_seed: float


def measure(judge: Judge, pair: Pair, swap: Swap, bare: bool) -> list[Swapped]:
    """Judge each picture of a swap. Of a bare prompt, whose own colours are open, more than
    half must be the donor's."""
    looks = {name: judge.look(getattr(swap, name)) for name in ("plain", "swapped", "other_seeds")}
    before, after = (palette_shares(getattr(swap, name), looks[name].body_mask) for name in ("plain", "swapped"))
    mine, others = (_indices(look) for look in pair.looks)
    masks = {name: look.object_mask for name, look in looks.items()}
    moved, other = (
        background_change(getattr(swap, name), swap.plain, torch.maximum(masks[name], masks["plain"]))
        for name in ("swapped", "other_seeds")
    )
    inside = [masks[name] > 0.5 for name in ("plain", "swapped")]
    union = (inside[0] | inside[1]).sum(dim=(1, 2)).clamp(min=1)
    overlap = (inside[0] & inside[1]).sum(dim=(1, 2)) / union
    results = []
    for row in range(len(after)):
        had, has = before[row, others].sum().item(), after[row, others].sum().item()
        rival = 0.5 if bare else after[row, mine].sum().item()
        kept = looks["swapped"].nouns[row] == pair.scene.objects[0].noun
        passes = wears(after[row].tolist(), pair.looks[1])
        results.append(
            Swapped(had, has, has > rival, passes, kept, overlap[row].item(), moved[row].item(), other[row].item())
        )
    return results


def _indices(look: world.Appearance) -> list[int]:
    return [list(world.PALETTE).index(name) for name in (look.name1, look.name2) if name is not None]


@dataclass(frozen=True)
class Verdict:
    """A swap's figures over all pairs and seeds."""

    followed: Rate
    wears_donor: Rate
    noun_kept: Rate
    share_before: float
    share_after: float
    overlap: float
    background_share: float

    @classmethod
    def of(cls, results: Sequence[Swapped]) -> Verdict:
        mean = {
            name: float(np.mean([getattr(r, name) for r in results]))
            for name in ("share_before", "share_after", "overlap", "background", "background_other_seed")
        }
        counted = (Rate.of([getattr(r, name) for r in results]) for name in ("followed", "wears_donor", "noun_kept"))
        moved = mean["background"] / max(mean["background_other_seed"], 1e-6)
        return cls(*counted, mean["share_before"], mean["share_after"], mean["overlap"], moved)

    @property
    def passes(self) -> bool:
        return self.followed.share >= LEAST_FOLLOWED and self.background_share <= MOST_BACKGROUND

    def __str__(self) -> str:
        return (
            f"  donor's colours follow  {self.followed}\n"
            f"  passes for the donor    {self.wears_donor}\n"
            f"  noun kept               {self.noun_kept}\n"
            f"  donor's colours' share of the object {self.share_before:.2f} -> {self.share_after:.2f}, "
            f"the objects overlap by {self.overlap:.2f}\n"
            f"  background change {self.background_share:.2f} of another seed's"
            f"   -> {'passes' if self.passes else 'FAILS'}"
        )


# --- the command -------------------------------------------------------------------------------------------------


def drawn_objects(count: int, seed: int) -> list[world.Picture]:
    """Drawn pictures of one nameable object."""
    rng, pictures = np.random.default_rng((21, seed)), []
    while len(pictures) < count:
        scene = world.sample_scene(rng)
        look = scene.objects[0].appearance
        if len(scene.objects) == 1 and look is not None and look.named:
            pictures.append(world.render(scene))
    return pictures


def shares_table(shares: dict[str, Shares]) -> str:
    """A line a layer, and the mean."""
    rows = [(layer, asdict(share)) for layer, share in shares.items()]
    mean = {name: float(np.mean([row[name] for _, row in rows])) for name in rows[0][1]}
    head = "  layer          noun: in object  outside   end + padding: in object  outside"
    return "\n".join(
        [head]
        + [
            f"  {layer:14} {row['noun_inside']:15.2f} {row['noun_outside']:8.2f} {row['padding_inside']:26.2f} "
            f"{row['padding_outside']:8.2f}"
            for layer, row in [*rows, ("mean", mean)]
        ]
    )


def noun_share(shares: dict[str, Shares]) -> float:
    """The noun's mean share inside the object, over layers."""
    return float(np.mean([share.noun_inside for share in shares.values()]))


def look_at_attention(toybox: Toybox | JointToybox, count: int, seed: int) -> dict[str, dict[str, Shares]]:
    """Shares by layer, of "full" and of "bare" captions."""
    objects, shares = drawn_objects(count, seed), {}
    for name in ("full", "bare"):
        shares[name] = attention_shares(toybox, objects, name == "bare", seed)
        print(f"attention, {name} captions\n{shares_table(shares[name])}", flush=True)
    return shares


def swap_pairs(
    toybox: Toybox, judge: Judge, pairs: Sequence[Pair], pictures: int, seed: int, steps: int, guidance: float
) -> tuple[dict[tuple[str, str], Verdict], Image.Image]:
    """Verdicts by (prompt, queries), and a sheet of each pair's first picture."""
    results, rows = defaultdict(list), []
    for index, pair in enumerate(pairs):
        seeds, shown = [1000 * (seed + 1) + pictures * index + k for k in range(pictures)], []
        for name in ("full", "bare"):
            swaps = draw_swaps(toybox, pair, name == "bare", seeds, steps, guidance)
            for queries, swap in swaps.items():
                results[name, queries] += measure(judge, pair, swap, name == "bare")
            shown += [swaps["own queries"].plain[0], *(swap.swapped[0] for swap in swaps.values())]
        rows.append((_label(pair), shown))
        print(f"swap {index + 1}/{len(pairs)}: {_label(pair)}", flush=True)
    titles = [f"{name}: {what}" for name in ("full", "bare") for what in ("plain", "own queries", "plain queries")]
    return {key: Verdict.of(values) for key, values in results.items()}, grid(rows, titles)


def gate(shares: dict[str, dict[str, Shares]], verdicts: dict[tuple[str, str], Verdict]) -> tuple[bool, str]:
    """Whether Infusion can work here, and why."""
    full, bare, swap = noun_share(shares["full"]), noun_share(shares["bare"]), verdicts["full", "own queries"]
    passed = min(full, bare) >= LEAST_SHARE and swap.passes
    return passed, (
        f"GATE {'PASSED' if passed else 'NOT PASSED'}: noun's share inside the object {full:.2f} in full, {bare:.2f} "
        f"bare (at least {LEAST_SHARE}); full prompt, own queries: colours follow in {100 * swap.followed.share:.0f} "
        f"% (at least {100 * LEAST_FOLLOWED:.0f}), background change {swap.background_share:.2f} of another seed's "
        f"(at most {MOST_BACKGROUND:.2f})"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", type=Path, default=None, help="folder with Toybox's weights (default: the shipped)"
    )
    parser.add_argument(
        "--judge-weights", type=Path, default=None, help="folder with the judge's (default: the shipped)"
    )
    parser.add_argument("--pictures", type=int, default=64, help="drawn pictures whose attention is looked at")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=4, help="pictures a pair")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--sheet", type=Path, default=None, help="write each pair's first picture here, as one PNG")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    toybox, judge = Toybox.load(options.weights), Judge.load(options.judge_weights)
    shares = look_at_attention(toybox, options.pictures, options.seed)
    pairs = sample_pairs(options.pairs, options.seed)
    verdicts, sheet = swap_pairs(toybox, judge, pairs, options.seeds, options.seed, options.steps, options.guidance)
    for (name, queries), verdict in verdicts.items():
        print(f"noun's value swapped, {name} prompt, {queries}\n{verdict}")
    passed, line = gate(shares, verdicts)
    print(line)
    if options.json:
        figures = {
            "gate_passed": passed,
            "attention": {name: {layer: asdict(share) for layer, share in by.items()} for name, by in shares.items()},
            "swap": {", ".join(key): asdict(verdict) | {"passes": verdict.passes} for key, verdict in verdicts.items()},
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.sheet:
        sheet.save(options.sheet)


def _label(pair: Pair) -> str:
    words = [world.full_caption(scene, "").text for scene in (pair.scene, pair.donor)]
    return f"{words[0]}, swapped to {words[1]}"


if __name__ == "__main__":
    main()
