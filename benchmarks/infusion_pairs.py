"""Whether two concepts in one prompt stay apart: `python -m benchmarks.infusion_pairs FOLDER --pairs N`, on Toybox.

FOLDER has the residuals of Toybox's concepts, named as their concept. A pair's prompt names both nouns, and Toybox
draws them side by side, the first one left; pictures whose plain one does not show both are left out. Each pair is
drawn plain, with each concept alone and with both, beside one run of the plain stream. Of each concept, over pictures:

- own / alone: likeness at its own noun, as a share of what it has there without the other
- wrong, plain's: likeness of the *other* object to it, and what that is in the plain picture
- wrong - without it: the same, less what it is where the other concept is alone: what this one has brought there
- moved: how far the other object's pixels moved from those of the other concept alone, as a share of how far this one
  moves its own object

Both together are drawn in several ways, all from F's maps M_k of the nouns so far (`holding.NounMaps`): out_C =
out_F + sum_k w_k A_k V_delta_k with the weights that SCHEMES name. "each apart" is Infusion Attention Patch's choice:
an evaluation for each concept (`holding.APART`), which costs as many more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.results import plus_minus, table, write
from profusion.attending import UNET
from profusion.diffusion import per_row, sampling_sigmas, variance_exploding
from profusion.holding import APART, FREE, HELD, Holding, NounMaps, cross_attention, map_patches, of_noun
from profusion.infusion import Placement, customised_patches, foundation_patches, on_conditional
from profusion.residual import Residual, load_residual
from profusion.toybox.concepts import drawn_concept
from profusion.toybox.judge import Judge, halves
from profusion.toybox.pipeline import CUSTOMISED_GUIDANCE, Toybox, initial_noise, seeded
from profusion.toybox.similarity import concept_similarity

PROMPT = "a photo of a {} and a {} on grass"
PAIRS = (
    ("gold and navy cup", "magenta and lime fish"),
    ("slate and apricot mushroom", "indigo and peach star"),
    ("turquoise and maroon butterfly", "chocolate and cream cat"),
    ("teal and coral ball", "olive and sky house"),
    ("magenta and lime fish", "slate and apricot mushroom"),
    ("chocolate and cream cat", "teal and coral ball"),
    ("indigo and peach star", "gold and navy cup"),
    ("olive and sky house", "turquoise and maroon butterfly"),
)


def normalised(maps: Tensor, power: float = 1.0) -> Tensor:
    """w_k = m_k^p / sum_j m_j^p with m_k = M_k / max M_k: nouns' maps (K, B, H, W) -> their shares, which sum to 1."""
    relative = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    return (power * relative.clamp(min=1e-6).log()).softmax(dim=0)


def sides(maps: Tensor) -> Tensor:
    """The halves of the picture: where Toybox's objects are, whatever the maps (2, B, H, W) say."""
    left = (torch.arange(maps.shape[-1]) < maps.shape[-1] // 2).to(maps).expand_as(maps[0])
    return torch.stack([left, 1 - left])


SCHEMES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "as they are": None,
    "normalised": normalised,
    "sharpened": partial(normalised, power=4.0),
    "the larger": partial(normalised, power=64.0),
    "by halves": sides,
}
Kind = tuple[str, str]  # ("first" or "second" alone, or a scheme; a background)


@dataclass(frozen=True)
class Scores:
    """Of one concept in a kind of picture, (B,) each: likeness at both nouns, and how far both objects moved.

    moved_own: from the plain picture. moved_other: from the picture of the other concept alone.
    """

    own: Tensor
    wrong: Tensor
    moved_own: Tensor
    moved_other: Tensor


@torch.no_grad()
def draw(
    toybox: Toybox,
    pair: Sequence[Residual],
    seeds: Sequence[int],
    steps: int,
    schemes: Sequence[str],
    backgrounds: Sequence[str],
) -> dict[Kind | str, Tensor]:
    """Latents (B, 4, h, w): plain, and of every kind, beside one F."""
    prompt = PROMPT.format(*(residual.noun for residual in pair))
    both = toybox.placements(prompt, pair)
    placed: dict[str, list[Placement]] = {"first": both[:1], "second": both[1:], "both": both, APART: both}
    noise, sigmas = initial_noise(seeded(*seeds)), sampling_sigmas(steps)
    evaluate = toybox.evaluator(toybox.context(prompt).expand(len(seeds), -1, -1), CUSTOMISED_GUIDANCE)
    attention_of, size = partial(cross_attention, toybox.unet), noise.shape[-2:]
    holdings = {
        name: Holding(HELD, partial(UNET.looking, toybox.unet), len(seeds), size, name == APART) for name in placed
    }
    maps = NounMaps(len(seeds), size)
    kinds = [(name, background) for name in ("first", "second", *schemes) for background in backgrounds]
    kinds += [(APART, HELD)] if HELD in backgrounds else []
    latents = dict.fromkeys(("plain", *kinds), variance_exploding(noise, sigmas[0]))
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        levels, queries = sigma.expand(len(seeds)), {}
        look = foundation_patches(queries)
        for name, holding in holdings.items():
            look = holding.watching_foundation(look, on_conditional(placed[name]))
        watching = map_patches(maps, attention_of, on_conditional(both))
        look = {**look, "attn2_patch": [*watching["attn2_patch"], *look["attn2_patch"]]}
        denoised = {"plain": evaluate(latents["plain"], levels, look)}
        seen = torch.stack([maps.maps((0, index)) for index in range(len(both))])
        for name, background in kinds:
            of_run, told_apart = placed.get(name, both), SCHEMES.get(name)
            if told_apart is not None:
                of_run = [replace(one, region=share) for one, share in zip(both, told_apart(seen), strict=True)]
            x, holding = latents[name, background], holdings[name if name in placed else "both"]
            drawn = {}
            for noun in holding.nouns():
                placements_for = on_conditional(of_noun(of_run, 0, noun))
                x_k = holding.seen_by(noun, x, latents["plain"])
                drawn[noun] = evaluate(x_k, levels, customised_patches(queries, placements_for))
            joined = holding.joined(drawn)
            denoised[name, background] = holding.denoised(joined, denoised["plain"]) if background == HELD else joined
        latents = {
            kind: denoised[kind] + (x - denoised[kind]) * per_row(after / sigma, x) for kind, x in latents.items()
        }
    for name, background in kinds:
        if background == HELD:
            holding = holdings[name if name in placed else "both"]
            latents[name, HELD] = holding.finished(latents[name, HELD], latents["plain"])
    return latents


def scores(
    toybox: Toybox, judge: Judge, names: Sequence[str], nouns: Sequence[str], latents: dict[Kind | str, Tensor]
) -> tuple[dict[Kind | str, list[Scores]], int]:
    """Of every kind, for both concepts; only of pictures whose plain one shows both, and how many are left out."""
    pictures = {kind: toybox.vae.pictures(x) for kind, x in latents.items()}
    concepts = [drawn_concept(name) for name in names]
    seen = judge.nouns(halves(pictures["plain"]))
    left, right = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    shows = [both == tuple(nouns) for both in zip(left, right, strict=True)]
    pictures = {kind: shown[torch.tensor(shows)] for kind, shown in pictures.items()}
    if not any(shows):
        return {}, len(shows)

    def objects(shown: Tensor) -> list[Tensor]:
        """Masks of the left and of the right object."""
        masks, middle = judge.object_mask(shown), shown.shape[2] // 2
        is_left = torch.arange(shown.shape[2]) < middle
        return [masks * is_left, masks * ~is_left]

    def moved(one: Tensor, other: Tensor, mask: Tensor) -> Tensor:
        inside = (mask > 0.5).to(one)
        return ((one - other).abs().mean(dim=-1) * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp(min=1)

    plain_objects, found = objects(pictures["plain"]), {}
    (any_background, *_) = (kind[1] for kind in pictures if kind[0] == "first")
    for kind, shown in pictures.items():
        masks, of_kind, background = objects(shown), [], any_background if kind == "plain" else kind[1]
        for index, concept in enumerate(concepts):
            other = 1 - index
            without = pictures[("first", "second")[other], background]
            likeness = [concept_similarity(shown, mask, concept.pictures, concept.masks) for mask in masks]
            of_kind.append(
                Scores(
                    likeness[index],
                    likeness[other],
                    moved(shown, pictures["plain"], plain_objects[index]),
                    moved(shown, without, plain_objects[other]),
                )
            )
        found[kind] = of_kind
    return found, len(shows) - sum(shows)


def ratio(values: Tensor, of: Tensor) -> list[float]:
    """mean(values) / mean(of), in pairs, and half its 95 % interval, to first order."""
    share = values.mean() / of.mean()
    return [share.item(), 1.96 * ((values - share * of).std() / len(of) ** 0.5 / of.mean()).item()]


def mean(values: Tensor) -> list[float]:
    """A mean and half its 95 % interval."""
    return [values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5]


def summary(gathered: Sequence[dict[Kind | str, list[Scores]]]) -> dict[str, dict[str, list[float]]]:
    """Means over all concepts and pictures, by the way in which both are drawn and the background."""

    def all_of(score: str, kind_of: Callable[[int], Kind | str]) -> Tensor:
        return torch.cat([getattr(one[kind_of(i)][i], score) for one in gathered for i in range(2)])

    found = {}
    for kind in gathered[0]:
        if kind == "plain" or kind[0] in ("first", "second"):
            continue
        background = kind[1]

        def alone(index: int, background: str = background) -> Kind:
            return ("first", "second")[index], background

        def without(index: int, background: str = background) -> Kind:
            return ("second", "first")[index], background

        wrong, plain = all_of("wrong", lambda _, kind=kind: kind), all_of("wrong", lambda _: "plain")
        found[", ".join(kind)] = {
            "own / alone": ratio(all_of("own", lambda _, kind=kind: kind), all_of("own", alone)),
            "wrong": mean(wrong),
            "plain's": mean(plain),
            "wrong - plain's": mean(wrong - plain),
            "wrong - without it": mean(wrong - all_of("wrong", without)),
            "moved": ratio(all_of("moved_other", lambda _, kind=kind: kind), all_of("moved_own", alone)),
        }
    return found


def report(figures: dict[str, dict[str, list[float]]], pairs: int, pictures: int, left_out: int) -> str:
    """In Markdown."""
    rows = [[kind, *(plus_minus(values) for values in of_kind.values())] for kind, of_kind in figures.items()]
    shown = table(["both, background", *next(iter(figures.values()))], rows)
    counted = f"{pairs} {'pairs' if pairs > 1 else 'pair'}, {pictures} pictures of each kind."
    return f"{counted} Left out, since the plain one does not show both nouns: {left_out}.\n\n{shown}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the residuals, named as their concept, _ for spaces")
    parser.add_argument("--pairs", type=int, default=len(PAIRS))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--backgrounds", nargs="+", default=[FREE, HELD], choices=[FREE, HELD])
    parser.add_argument(
        "--same-noun", action="store_true", help="the second concept at another place of the first's noun"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    toybox, judge, gathered, left_out = Toybox.load(), Judge.load(), [], 0
    for names in PAIRS[: given.pairs]:
        pair = [load_residual(given.folder / f"{name.replace(' ', '_')}.safetensors") for name in names]
        if given.same_noun:
            pair[1] = replace(pair[1], noun=pair[0].noun)
        seeds = range(1, given.seeds + 1)
        latents = draw(toybox, pair, seeds, given.steps, given.schemes, given.backgrounds)
        found, missing = scores(toybox, judge, names, [one.noun for one in pair], latents)
        gathered, left_out = [*gathered, found] if found else gathered, left_out + missing
        print(f"drawn: {' and '.join(names)}", flush=True)
        if gathered:
            figures, pictures = summary(gathered), sum(len(found["plain"][0].own) for found in gathered)
            write(given.out, vars(given), figures, report(figures, len(gathered), pictures, left_out))
    if not gathered:
        raise SystemExit("no plain picture shows both nouns: nothing can be measured")


if __name__ == "__main__":
    main()
