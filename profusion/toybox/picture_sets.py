"""Pictures of Toybox's world, and what Toybox encodes them to."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..promptnet.training import PictureSet
from . import world
from .pipeline import Toybox

_BATCH = 32


def drawn_pictures(count: int, seed: int) -> Iterator[Tensor]:
    """Pictures (SIZE, SIZE, 3) in [0, 1] of one object each, of random appearance on a random background.

    Never of what the world holds out, nor near a concept's colours, so that those stay unseen.
    """
    rng = np.random.default_rng(seed)
    while count:
        scene = world.sample_scene(rng)
        if len(scene.objects) == 1:
            yield torch.from_numpy(world.render(scene).image).float() / 255
            count -= 1


@torch.no_grad()
def encoded_pictures(toybox: Toybox, pictures: Iterable[Tensor]) -> PictureSet:
    """Latents and image tokens of pictures (SIZE, SIZE, 3); the tokens in float16, since they are many."""
    latents, image_tokens, batch = [], [], []
    for picture in itertools.chain(pictures, [None]):
        if picture is not None:
            batch.append(picture)
        if batch and (picture is None or len(batch) == _BATCH):
            stack = torch.stack(batch)
            latents.append(toybox.vae.latents(stack))
            image_tokens.append(toybox.vision(toybox.vision.preprocess(stack)).half())
            batch = []
    return PictureSet(torch.cat(latents), torch.cat(image_tokens))


def digest(path: Path) -> str:
    """Says whether two files have the same contents, wherever they lie."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
