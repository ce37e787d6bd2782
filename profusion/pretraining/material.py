"""What a training stands on, made of a command line's words: the base, the pictures, and those kept apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import load_image_tower
from ..checkpoints.loading import native_size, plan
from ..checkpoints.vision import vision_plan
from ..decoding import PictureError
from ..keeping import digest
from ..learning import Say
from ..pipeline import Pipeline
from ..promptnet.network import PromptNetConfig
from ..stable_diffusion import StableDiffusion
from .arguments import Data
from .cache import FeatureCache
from .cache import Sizes as CacheSizes
from .command import Command, Material
from .encoding import Encoders
from .feeds import Feed
from .lanes import Streamed
from .opening import open_source
from .order import Share
from .plan import Sizes
from .promptnet import config_for
from .ranks import Ranks
from .sources import Source
from .squares import Framing, square
from .stream import PictureStream

if TYPE_CHECKING:
    from ..models.clip import VisionModel


class Rest(Source):
    """A source without some of its pictures, which are kept apart: their numbers, rising, (K,) int64."""

    def __init__(self, source: Source, kept: np.ndarray):
        self._source, self._kept = source, kept
        self.where, self.left_out = source.where, Counter(source.left_out)
        self.parts = self._parts()

    def _parts(self) -> list[int]:
        ends = np.cumsum(self._source.parts) if len(self._source.parts) else []
        return [int(size) for size in np.diff(ends - np.searchsorted(self._kept, ends), prepend=0)] if len(ends) else []

    def __len__(self) -> int:
        return len(self._source) - len(self._kept)

    def _whole(self, entry: int) -> int:
        # The number among all: as many more as there are kept ones before it.
        return entry + int(np.searchsorted(self._kept - np.arange(len(self._kept)), entry, side="right"))

    def key(self, entry: int) -> str:
        return self._source.key(self._whole(entry))

    def read(self, entry: int) -> bytes:
        return self._source.read(self._whole(entry))

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()} without {len(self._kept)}"


def kept_apart(source: Source, count: int) -> np.ndarray:
    """Numbers of pictures to keep from a training, evenly over all: so many, or a tenth where there are few."""
    count = min(count, len(source) // 10)
    return np.linspace(0, len(source) - 1, count).round().astype(np.int64)


def read_squares(source: Source, entries: np.ndarray, size: int) -> Tensor:
    """Pictures of these numbers that can be read, (V, size, size, 3), uint8. Raises PictureError where none can."""
    found, problem = [], None
    for entry in entries.tolist():
        try:
            found.append(square(source.read(entry), source.key(entry), Framing(size)))
        except PictureError as error:
            problem = error
    if not found:
        raise problem or PictureError(f"{source.where} has no pictures to check with")
    return torch.stack(found)


def sizes_of(command: Command, data: Data, checkpoint: Path, tower: Path) -> Sizes:
    """The sizes of a checkpoint and of an image tower, from the headers of their files. Raises CheckpointError."""
    base, (_, vision, _) = plan(checkpoint), vision_plan(tower)
    towers = tuple(one.config for one in base.towers)
    config = config_for(
        base.unet,
        [one.width for one in towers],
        vision.width,
        command.tokens,
        command.with_noise,
        command.layout,
    )
    return Sizes(base.unet, base.vae, towers, vision, config, data.size or native_size(base))


def on_checkpoint(command: Command, data: Data, checkpoint: Path, tower: Path, ranks: Ranks, say: Say) -> Material:
    """A checkpoint of SD 1.x, SD 2.x or SDXL, and pictures of a folder or of tar shards. Raises CheckpointError and
    PictureError."""
    kind = torch.bfloat16 if command.bfloat16 else torch.float32
    source = opened(data.where, ranks, say)  # before a base is read, which takes longer
    say(f"reading {checkpoint}")
    base = StableDiffusion.load(checkpoint, data.size, kind).to(ranks.device)
    vision = load_image_tower(tower, kind).to(ranks.device)
    widths = [tower.sizes.width for tower in base.towers]
    config = config_for(
        base.unet.config, widths, vision.sizes.width, command.tokens, command.with_noise, command.layout
    )
    return of_source(command, data, source, base, vision, config, ranks, say)


def opened(where: str, ranks: Ranks, say: Say) -> Source | Streamed:
    """A source of pictures. The first process looks through new shards, and the others read what it noted. Raises
    PictureError in all of them."""
    source, problem = None, None
    if ranks.first:
        try:
            source = open_source(where, say=say)
        except Exception as error:  # whatever it is: the others must not wait for this process
            problem = error
    ranks.agree(problem)
    return open_source(where) if source is None else source


def of_source(
    command: Command,
    data: Data,
    source: Source | Streamed,
    base: Pipeline,
    vision: VisionModel,
    config: PromptNetConfig,
    ranks: Ranks,
    say: Say,
) -> Material:
    """The material of any source of pictures. Raises PictureError, StreamError, OrderError and CacheError."""
    source, shown = _apart(data, source, base.size, say)
    options, encoders = command.options, Encoders(base.vae, vision)
    stream = PictureStream(
        source, base.size, options.batch_size, options.seed, Share(ranks.rank, ranks.world), data.workers, data.crop
    )
    about = {"pictures": _identity(source), "encoders": encoders.fingerprint(), "side": str(base.size)}
    cache = _cache(data, source, encoders, base, about) if data.cache else None
    fingerprint = f"{' '.join(about.values())} {data.crop}" + ("" if cache is None else f" {cache.sizes.dtype}")
    return Material(base, vision, Feed(stream, encoders, cache), shown, config, fingerprint)


def _identity(source: Source | Streamed) -> str:
    return digest(source.called, source.lanes) if isinstance(source, Streamed) else source.fingerprint()


def _apart(data: Data, source: Source | Streamed, size: int, say: Say) -> tuple[Source | Streamed, Tensor]:
    """What is left of a source to train on, and pictures to check with."""
    if data.kept_where:
        other = open_source(data.kept_where)
        if isinstance(other, Streamed):
            raise PictureError(f"--validation-data {data.kept_where}: give a folder or local shards, to check with")
        shown = read_squares(other, np.arange(min(len(other), data.kept)), size)
        say(f"pictures of {data.where}, and {len(shown)} of {data.kept_where} to check with")
        return source, shown
    if isinstance(source, Streamed):
        raise PictureError(
            f"{data.where} can only be read on, so that none of it can be kept apart: give --validation-data, a "
            "folder of pictures to check with"
        )
    kept = kept_apart(source, data.kept)
    few = not len(kept)
    shown = read_squares(source, np.arange(min(len(source), data.kept)) if few else kept, size)
    rest = Rest(source, kept)
    say(
        f"{len(rest):,} pictures of {data.where}, and {len(shown)} "
        + ("of them to check with: there are too few to keep any apart" if few else "kept apart to check with")
    )
    return rest, shown


def _cache(data: Data, source: Source | Streamed, encoders: Encoders, base: Pipeline, about: dict) -> FeatureCache:
    if isinstance(source, Streamed):
        raise PictureError(f"--cache: {data.where} can only be read on, and a cache needs to find its pictures again")
    if data.crop == "random":
        raise PictureError("--cache keeps one square of each picture, and --crop random draws another each time")
    channels, cells = base.unet.config.in_channels, base.size // base.cell
    vision = encoders.vision.sizes
    sizes = CacheSizes(len(source), (channels, cells, cells), (vision.tokens, vision.width))
    return FeatureCache(Path(data.cache), sizes, about)
