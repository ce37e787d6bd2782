"""What there is to learn: a concept's pictures, drawn or the user's own, and the prompts in which it is tried."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..pictures import read_pictures
from . import world
from .pipeline import SIZE

CONCEPT = "slate and apricot mushroom"
PICTURES = 4
DEMO_PROMPTS = (
    "a photo of a {} on grass",
    "a photo of a {} on snow",
    "a photo of a {} at night",
    "a photo of a {} by a brick wall",
    "a picture of a {} on the sea",
    "a photo of a {} on sand",
)


@dataclass(frozen=True)
class Concept:
    """What is to be learned: pictures (M, 96, 96, 3), masks (M, 96, 96), the class noun, and words for people.

    about: what was done to the pictures, in words.
    """

    name: str
    noun: str
    pictures: Tensor
    masks: Tensor
    about: str = ""


def drawn_concept(name: str = CONCEPT, count: int = PICTURES, seed: int = 0) -> Concept:
    """Pictures of a concept that no training picture came near."""
    noun, _ = world.concept(name)
    drawn = world.concept_pictures(name, count, np.random.default_rng(seed))
    pictures = torch.stack([torch.from_numpy(item.image).float() / 255 for item in drawn])
    masks = torch.stack([torch.from_numpy(item.masks[0]).float() / 255 for item in drawn])
    return Concept(name, noun, pictures, masks)


def own_concept(folder: Path, noun: str, size: int = SIZE) -> Concept:
    """The user's pictures, as squares of `size` pixels; an alpha channel is the object's mask."""
    return Concept(f"your {noun}", noun, *read_pictures(folder, size))
