"""What Toybox's world has to learn: a concept's pictures, drawn, and the prompts in which it is tried."""

from __future__ import annotations

import numpy as np
import torch

from ..learning import Concept
from . import world

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


def drawn_concept(name: str = CONCEPT, count: int = PICTURES, seed: int = 0) -> Concept:
    """Pictures of a concept that no training picture came near."""
    noun, _ = world.concept(name)
    drawn = world.concept_pictures(name, count, np.random.default_rng(seed))
    pictures = torch.stack([torch.from_numpy(item.image).float() / 255 for item in drawn])
    masks = torch.stack([torch.from_numpy(item.masks[0]).float() / 255 for item in drawn])
    return Concept(name, noun, pictures, masks)
