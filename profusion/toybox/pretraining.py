"""What PromptNet's pre-training takes of Toybox: its networks, and pictures drawn from its world."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace

import numpy as np
from PIL import Image

from ..learning import Say
from ..pretraining.arguments import TOYBOX as DRAWN
from ..pretraining.arguments import Data
from ..pretraining.command import Command, Material
from ..pretraining.material import of_source, opened
from ..pretraining.plan import Sizes
from ..pretraining.promptnet import in_layout
from ..pretraining.ranks import Ranks
from ..pretraining.sources import Source
from ..promptnet.network import PromptNetConfig
from . import world
from .configs import TOYBOX, TOYBOX_PROMPTNET, TOYBOX_TEXT, TOYBOX_VAE, TOYBOX_VISION
from .pipeline import SIZE, Toybox


class DrawnPictures(Source):
    """So many pictures of one object each, of random appearance on a random background, each from a seed of its own.

    Never of what the world holds out, nor near a concept's colours, so that those stay unseen.
    """

    def __init__(self, count: int, seed: int):
        self.where, self.left_out = f"Toybox's world (seed {seed})", Counter()
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return self._count

    def key(self, entry: int) -> str:
        return f"{entry:08}"

    def read(self, entry: int) -> bytes:
        rng = np.random.default_rng((40, self._seed, entry))
        while len((scene := world.sample_scene(rng)).objects) != 1:
            pass
        file = io.BytesIO()
        Image.fromarray(world.render(scene).image).save(file, "png", compress_level=1)
        return file.getvalue()

    def fingerprint(self) -> str:
        return f"{self._count} pictures drawn from seed {self._seed}"


def config_of(command: Command) -> PromptNetConfig:
    """The sizes of the PromptNet that a command asks for."""
    second = "noisy" if command.with_noise else "none"
    return in_layout(replace(TOYBOX_PROMPTNET, tokens=command.tokens, second_latent=second), command.layout)


def toybox_sizes(command: Command) -> Sizes:
    """For a plan."""
    return Sizes(TOYBOX, TOYBOX_VAE, (TOYBOX_TEXT,), TOYBOX_VISION, config_of(command), SIZE)


def on_toybox(command: Command, data: Data, ranks: Ranks, say: Say, toybox: Toybox | None = None) -> Material:
    """Toybox, and pictures that are drawn or those of a folder or of tar shards. Raises PictureError."""
    toybox = toybox or Toybox.load()
    for module in (toybox.unet, toybox.vae, toybox.text, toybox.vision):
        module.to(ranks.device)
    source = (
        DrawnPictures(data.pictures, command.options.seed) if data.where == DRAWN else opened(data.where, ranks, say)
    )
    if not data.cache and data.crop == "center":
        data = replace(data, cache=str(command.folder / "features"))  # small, and read many times
    return of_source(command, data, source, toybox, toybox.vision, config_of(command), ranks, say)
