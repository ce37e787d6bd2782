"""How Fusion Sampling's benchmarks judge a way to sample: unseen pictures times prompts, from
the same seeds for every way.

The references are drawn combinations of colours, pattern and noun that training held out. The prompts put S* on another
background or beside a second object. Judged: whether the object looks like the reference (`concept`, 0..1), is the
right noun, and whether the rest of the prompt is there (`text`: the background, or the second object and its colour).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.rates import Rate, mean_interval
from profusion.toybox import world
from profusion.toybox.colors import palette_shares, wears
from profusion.toybox.judge import Judge, halves
from profusion.toybox.pipeline import seeded
from profusion.toybox.similarity import concept_similarity

BESIDE_A_STAR = "a S* and a blue star"
BACKGROUNDS = {
    "a photo of a S* on snow": "snow",
    "a photo of a S* at night": "night",
    "a photo of a S* by a brick wall": "wall",
}
FUSION_PROMPTS = (*BACKGROUNDS, BESIDE_A_STAR)
_BLUE = world.Appearance("plain", world.PALETTE["blue"], None, "blue")

Draw = Callable[[str, Sequence[str], Sequence[Tensor], Sequence[torch.Generator], torch.Generator], Tensor]
"""(prompt with S*, nouns, references (1, SIZE, SIZE, 3), generators of the start, one of fresh noise) -> pictures."""


@dataclass(frozen=True)
class References:
    """Pictures (N, SIZE, SIZE, 3), object masks (N, SIZE, SIZE) and the scenes they are of."""

    pictures: Tensor
    masks: Tensor
    scenes: list[world.Scene]

    @property
    def nouns(self) -> list[str]:
        return [scene.objects[0].noun for scene in self.scenes]

    def only(self, index: int) -> References:
        """One of them."""
        part = slice(index, index + 1)
        return References(self.pictures[part], self.masks[part], self.scenes[part])


def references(count: int, seed: int) -> References:
    """Single objects of combinations that training never drew."""
    scenes = [scene for scene, _ in world.unseen_prompts(count, np.random.default_rng((20, seed)))]
    drawn = [world.render(scene) for scene in scenes]
    pictures = torch.stack([torch.from_numpy(item.image).float() / 255 for item in drawn])
    masks = torch.stack([torch.from_numpy(item.masks[0]).float() / 255 for item in drawn])
    return References(pictures, masks, scenes)


@dataclass(frozen=True)
class Scores:
    """Of each picture in turn: likeness to its reference, whether its noun is right, whether the
    rest of the prompt is there."""

    concept: list[float]
    noun: list[bool]
    text: list[bool]

    def as_json(self) -> dict[str, object]:
        return {
            "concept": rounded(self.concept),
            "noun": Rate.of(self.noun).as_json(),
            "text": Rate.of(self.text).as_json(),
        }

    def minus(self, other: Scores) -> dict[str, list[float]]:
        """Means and half 95 % intervals of what each picture scores more than the other's of
        the same seed and prompt."""
        return {
            name: rounded([a - b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)])
            for name in ("concept", "noun", "text")
        }


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in mean_interval(values)]


def scores(
    draw: Draw, judge: Judge, known: References, prompts: Sequence[str], batch: int, first_seed: int = 0
) -> Scores:
    """Draw every reference under every prompt, and judge. first_seed: of the first reference; the next has the next."""
    concept, nouns, texts = [], [], []
    for number, prompt in enumerate(prompts):
        for first in range(0, len(known.scenes), batch):
            some = range(first, min(first + batch, len(known.scenes)))
            base = 7000 * number + first_seed
            starts, fresh = seeded(*(base + index for index in some)), torch.Generator().manual_seed(base + first)
            pictures = draw(
                prompt, known.nouns[first : some.stop], known.pictures[first : some.stop].split(1), starts, fresh
            )
            text, pictures = _text(judge, pictures, prompt)
            seen = judge.look(pictures)
            concept += likeness(pictures, seen.object_mask, known, some)
            nouns += [said == known.nouns[index] for said, index in zip(seen.nouns, some, strict=True)]
            texts += text
    return Scores(concept, nouns, texts)


def _text(judge: Judge, pictures: Tensor, prompt: str) -> tuple[list[bool], Tensor]:
    """Whether what the prompt says besides S* is there; and the part of each picture in which S* is."""
    if prompt != BESIDE_A_STAR:
        return [said == BACKGROUNDS[prompt] for said in judge.backgrounds(pictures)], pictures
    left, right = halves(pictures).chunk(2)
    seen = judge.look(right)
    shares = palette_shares(right, seen.body_mask).tolist()
    return [noun == "star" and wears(share, _BLUE) for noun, share in zip(seen.nouns, shares, strict=True)], left


def likeness(pictures: Tensor, masks: Tensor, known: References, indices: Sequence[int]) -> list[float]:
    """Of the objects in pictures (B, SIZE, SIZE, 3), where masks (B, SIZE, SIZE) say, to those of these references."""
    return [
        concept_similarity(picture[None], mask[None], known.pictures[index, None], known.masks[index, None]).item()
        for picture, mask, index in zip(pictures, masks, indices, strict=True)
    ]
