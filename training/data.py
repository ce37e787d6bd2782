"""The drawn training set: pictures, object masks and scenes, made once and kept in the work folder."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from profusion.models.tokenizer import tokenize
from profusion.toybox import world

CELLS = 12  # latent cells a side
MAX_OBJECTS = 2


def _draw(job: tuple[int, int, int]) -> tuple[list, np.ndarray, np.ndarray]:
    """Scenes, pictures (n, 96, 96, 3) and silhouettes on the latent grid (n, 2, 12, 12), from one seed."""
    seed, index, count = job
    rng = np.random.default_rng((seed, index))
    scenes = [world.sample_scene(rng) for _ in range(count)]
    pictures = np.empty((count, world.SIZE, world.SIZE, 3), np.uint8)
    masks = np.zeros((count, MAX_OBJECTS, CELLS, CELLS), np.uint8)
    block = world.SIZE // CELLS
    for row, scene in enumerate(scenes):
        picture = world.render(scene)
        pictures[row] = picture.image
        cells = picture.masks.reshape(-1, CELLS, block, CELLS, block).mean(axis=(2, 4))
        masks[row, : len(cells)] = np.round(cells)
    return scenes, pictures, masks


@dataclass
class DataSet:
    scenes: list[world.Scene]
    pictures: np.ndarray  # (n, 96, 96, 3) uint8
    masks: Tensor  # (n, 2, 12, 12) in [0, 1]

    @classmethod
    def draw(cls, count: int, seed: int, workers: int = 2, chunk: int = 500) -> DataSet:
        jobs = [(seed, index, min(chunk, count - index * chunk)) for index in range(-(-count // chunk))]
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            parts = pool.map(_draw, jobs)
        scenes = [scene for part in parts for scene in part[0]]
        masks = torch.from_numpy(np.concatenate([part[2] for part in parts])).float() / 255
        return cls(scenes, np.concatenate([part[1] for part in parts]), masks)

    def __len__(self) -> int:
        return len(self.scenes)

    def pixels(self, indices: Tensor) -> Tensor:
        """(B, 3, 96, 96) in [-1, 1]."""
        return torch.from_numpy(self.pictures[indices.numpy()]).movedim(-1, 1).float() / 127.5 - 1


@dataclass
class Captions:
    """A batch of captions as ids, and the context rows of their parts; -1 where there is none."""

    tokens: Tensor  # (B, 77)
    lengths: Tensor  # (B,) row of the end token
    nouns: Tensor  # (B, 2)
    background: Tensor  # (B, 77) 1.0 on the background's rows

    @classmethod
    def of(cls, captions: list[world.Caption]) -> Captions:
        tokens = tokenize([caption.text for caption in captions])
        lengths = torch.tensor([len(caption.text.split()) + 1 for caption in captions])
        nouns = torch.full((len(captions), MAX_OBJECTS), -1)
        background = torch.zeros(tokens.shape)
        for row, caption in enumerate(captions):
            for k, word in enumerate(caption.noun_words):
                nouns[row, k] = word + 1  # every word of the world is one token; row 0 is the start token
            for word in caption.background_words:
                background[row, word + 1] = 1.0
        return cls(tokens, lengths, nouns, background)


def check_vocabulary() -> None:
    """Every word the world uses must be one token, or `Captions` would point at the wrong rows."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        text = world.caption(world.sample_scene(rng), rng).text
        length = int((tokenize(text)[0] == 49407).int().argmax())
        if length != len(text.split()) + 1:
            raise ValueError(f"a word of {text!r} is more than one token")


def pooled(masks: Tensor, tokens: int) -> Tensor:
    """Silhouettes (B, K, 12, 12) on a coarser grid of `tokens` cells: (B, K, tokens)."""
    side = round(tokens**0.5)
    return F.adaptive_avg_pool2d(masks, side).flatten(2)


def work_folder(path: str) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
