"""What is asked of a customised Toybox, and how the answers are judged: the same for every peer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from profusion.learning import Concept
from profusion.metrics.similarity import image_similarity, prompt_similarity
from profusion.toybox.encoder import ToyboxEncoder
from profusion.toybox.judge import Judge, halves, whole
from profusion.toybox.pipeline import Toybox
from profusion.toybox.similarity import background_change, concept_similarity


@dataclass(frozen=True)
class Prompt:
    """A text with {} for the concept; the place that it names, and the second object, right
    of the concept, if it does."""

    text: str
    place: str
    second: str | None = None


PEER_PROMPTS = (
    Prompt("a photo of a {} on grass", "grass"),
    Prompt("a photo of a {} and a lemon on snow", "snow", "lemon"),
    Prompt("a photo of a {} at night", "night"),
    Prompt("a photo of a {} by a brick wall", "wall"),
    Prompt("a picture of a {} on sand", "sand"),
    Prompt("a photo of a {} and a watermelon at night", "night", "watermelon"),
    Prompt("a {} on the sea", "sea"),
    Prompt("a photo of a {} on snow", "snow"),
)
METRICS = {
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "dino": "DINO-style",
    "likeness": "concept likeness",
    "noun": "noun right",
    "place": "rest of the prompt right",
    "moved": "rest of the picture moved",
    "score": "score",
}
LOWER = ("moved",)  # is better


class JudgeTrunk:
    """The judge's features before its heads, as an image encoder. It has never seen a text, and was taught to tell
    patterns as well as nouns: what DINO, which is too large to be embedded here, stands for in the papers' tables."""

    name, measure = "the judge's trunk", "DINO-style"

    def __init__(self, judge: Judge):
        self._network = judge.network

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        """(B, SIZE, SIZE, 3) in [0, 1] -> (B, 320): means and maxima of the two deepest levels, each
        level centred and scaled."""
        kept = []
        hooks = [
            level.register_forward_hook(lambda _, __, out: kept.append(out))
            for level in (self._network.down8, self._network.down16)
        ]
        try:
            self._network(pictures.float().movedim(-1, 1) * 2 - 1)
        finally:
            for hook in hooks:
                hook.remove()
        parts = [part for out in kept for part in (out.mean(dim=(2, 3)), out.amax(dim=(2, 3)))]
        return torch.cat([torch.nn.functional.layer_norm(part, part.shape[1:]) for part in parts], dim=1)


BACKBONES = {"clip_t": ToyboxEncoder.name, "clip_i": ToyboxEncoder.name, "dino": JudgeTrunk.name}


class Yardstick:
    """Everything that judges. `figures` of pictures is one dictionary a picture, whose keys are METRICS'."""

    def __init__(self, toybox: Toybox, judge: Judge):
        self.judge, self.pair, self.trunk = judge, ToyboxEncoder(toybox), JudgeTrunk(judge)

    def figures(self, concept: Concept, prompt: Prompt, pictures: Tensor, plain: Tensor) -> list[dict[str, float]]:
        """Pictures (B, SIZE, SIZE, 3) of one prompt, and what the plain model draws from the same seeds.

        likeness: of the appearance inside the object to the references, 0..1. place: whether the background is that of
        the prompt, and the second object, if it has one, too. score: the likeness of a picture whose noun and place are
        both right, 0 of others: what learning rates are chosen by. CLIP-T is of the prompt in plain words. moved: mean
        absolute difference to the plain picture (0..1) wherever neither has the concept; `other_seeds` is the same
        between plain pictures of different seeds.
        """
        features = self.pair.images(pictures)
        clip_t = prompt_similarity(features, self.pair.texts([prompt.text.format(concept.noun)]))
        clip_i = image_similarity(features, self.pair.images(concept.pictures))
        dino = image_similarity(self.trunk.images(pictures), self.trunk.images(concept.pictures))
        own, other = _apart(pictures, prompt)
        seen = self.judge.look(own)
        likeness = concept_similarity(own, seen.object_mask, concept.pictures, concept.masks)
        nouns = torch.tensor([noun == concept.noun for noun in seen.nouns])
        places = torch.tensor([place == prompt.place for place in seen.backgrounds])
        if other is not None:
            places &= torch.tensor([noun == prompt.second for noun in self.judge.nouns(other)])
        masks = _in_the_whole(seen.object_mask, prompt)
        plain_masks = _in_the_whole(self.judge.object_mask(_apart(plain, prompt)[0]), prompt)
        moved = background_change(pictures, plain, torch.maximum(masks, plain_masks))
        other_seeds = background_change(plain, plain.roll(1, 0), torch.maximum(plain_masks, plain_masks.roll(1, 0)))
        columns = (clip_t, clip_i, dino, likeness, nouns, places, moved, likeness * nouns * places, other_seeds)
        rows = torch.stack([column.float() for column in columns], dim=1).tolist()
        return [
            {key: round(value, 5) for key, value in zip((*METRICS, "other_seeds"), row, strict=True)} for row in rows
        ]


def _apart(pictures: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor | None]:
    """Pictures of the concept, and of the second object where a prompt has one."""
    return halves(pictures).chunk(2) if prompt.second else (pictures, None)


def _in_the_whole(masks: Tensor, prompt: Prompt) -> Tensor:
    """Masks of what `_apart` gives of the concept, in the whole pictures: nowhere in the half of a second object."""
    return whole(masks, torch.zeros_like(masks)) if prompt.second else masks
