"""Pictures to train a PromptNet on: drawn from Toybox's world or read from a folder, encoded once and kept."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..learning import Say
from ..pictures import read_pictures
from ..promptnet.training import PictureSet
from . import world
from .pipeline import SIZE, Toybox, weight_file

_FORMAT = "profusion.pictures"
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


def toybox_pictures(
    toybox: Toybox, source: str, count: int, seed: int, cache: Path | None = None, say: Say = lambda _: None
) -> PictureSet:
    """The pictures of a source as Toybox encodes them: "toybox" draws `count` from `seed`, else a folder of pictures.

    cache: a file that keeps them. It is written where it is missing or keeps others, and read where it keeps these.
    Raises PictureError where the folder has none that can be read, OSError where the cache cannot be written.
    """
    if source == "toybox":
        pictures, what = drawn_pictures(count, seed), f"{count} pictures drawn from seed {seed}"
    else:
        read, _, note = read_pictures(Path(source), SIZE)
        say(note)
        contents = hashlib.sha256((read * 255).round().byte().numpy().tobytes()).hexdigest()[:16]
        pictures, count, what = iter(read), len(read), f"{len(read)} pictures {contents}"
    key = json.dumps([what, *(digest(weight_file(network)) for network in ("vae", "vision"))])
    kept = None if cache is None else read_cache(cache, key)
    if kept is not None:
        say(f"{count} pictures from {cache}")
        return kept
    say(f"encoding {count} pictures")
    encoded = encoded_pictures(toybox, pictures)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"latents": encoded.latents, "image_tokens": encoded.image_tokens}
        files.write_atomically(cache, files.tensor_pieces(tensors, {"format": _FORMAT, "key": key}))
    return encoded


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


def read_cache(path: Path, key: str) -> PictureSet | None:
    """The pictures in a cache, if it keeps those of this key; a damaged cache keeps nothing."""
    if not path.is_file():
        return None
    try:
        tensors, metadata = files.read_tensors(path)
        if (metadata.get("format"), metadata.get("key")) != (_FORMAT, key):
            return None
        files.check_tensors(tensors, metadata, ("format", "key"))
        return PictureSet(tensors["latents"].clone(), tensors["image_tokens"].clone())
    except (files.FileFormatError, OSError, KeyError, ValueError):
        return None


def digest(path: Path) -> str:
    """Says whether two files have the same contents, wherever they lie."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
