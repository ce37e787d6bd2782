"""The drawn training set: scenes, pictures and object masks, drawn once and kept in the work folder."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from profusion.models.tokenizer import tokenize
from profusion.toybox import world
from profusion.toybox.drawing import SIZE

from .session import Session, Stopped

CELLS = SIZE // 8  # latent cells a side
MAX_OBJECTS = 2
CHUNK = 250  # pictures drawn by one job


def _scenes(seed: int, chunk: int, count: int) -> list[world.Scene]:
    rng = np.random.default_rng((seed, chunk))
    return [world.sample_scene(rng) for _ in range(count)]


def _draw(job: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, SIZE, SIZE, 3) and silhouettes on the latent grid (n, 2, CELLS, CELLS), from (seed, chunk, n)."""
    pictures = np.empty((job[2], SIZE, SIZE, 3), np.uint8)
    masks = np.zeros((job[2], MAX_OBJECTS, CELLS, CELLS), np.uint8)
    for row, scene in enumerate(_scenes(*job)):
        picture = world.render(scene)
        pictures[row] = picture.image
        cells = picture.masks.reshape(-1, CELLS, 8, CELLS, 8).mean(axis=(2, 4))
        masks[row, : len(cells)] = np.round(cells)
    return pictures, masks


@dataclass
class DataSet:
    scenes: list[world.Scene]
    pictures: np.ndarray  # (n, SIZE, SIZE, 3) uint8
    masks: Tensor  # (n, 2, CELLS, CELLS) in [0, 1]

    @classmethod
    def draw(cls, session: Session) -> DataSet:
        """Draw what the recipe asks for, in processes as many as torch has threads; what was drawn before is kept.

        Raises Stopped when the session is over.
        """
        count, seed = session.recipe.pictures, session.recipe.seed
        size = min(CHUNK, count)
        chunks = -(-count // size)
        pictures = _kept(session.work / "pictures.npy", (chunks * size, SIZE, SIZE, 3))
        masks = _kept(session.work / "masks.npy", (chunks * size, MAX_OBJECTS, CELLS, CELLS))
        note = session.work / "drawn.json"
        done = json.loads(note.read_text()) if note.exists() else 0
        if done < chunks:
            with multiprocessing.get_context("spawn").Pool(torch.get_num_threads()) as pool:
                for part in pool.imap(_draw, [(seed, chunk, size) for chunk in range(done, chunks)]):
                    rows = slice(done * size, (done + 1) * size)
                    pictures[rows], masks[rows] = part
                    done += 1
                    pictures.flush(), masks.flush()
                    _note(note, done)
                    if session.over and done < chunks:
                        raise Stopped(f"drawing stopped at picture {done * size} of {count}")
                    if done % 10 == 0 or done == chunks:
                        session.say("draw", min(done * size, count), None)
        scenes = [scene for chunk in range(chunks) for scene in _scenes(seed, chunk, size)]
        return cls(scenes[:count], pictures[:count], torch.from_numpy(masks[:count].astype(np.float32) / 255))

    def __len__(self) -> int:
        return len(self.scenes)

    def pixels(self, indices: Tensor) -> Tensor:
        """(B, 3, SIZE, SIZE) in [-1, 1]."""
        return torch.from_numpy(self.pictures[indices.numpy()]).movedim(-1, 1).float() / 127.5 - 1


def _kept(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """An array of bytes in a file, made if it is not there."""
    if path.exists():
        return np.lib.format.open_memmap(path, mode="r+")
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)


def _note(path: Path, done: int) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(done))
    partial.replace(path)


@dataclass
class Captions:
    """A batch of captions as ids, and the context rows of their parts; -1 where there is none."""

    tokens: Tensor  # (B, 77)
    lengths: Tensor  # (B,) row of the end token
    nouns: Tensor  # (B, 2)
    background: Tensor  # (B, 77) 1.0 on the background's rows

    @classmethod
    def of(cls, captions: list[world.Caption], session: Session) -> Captions:
        """On the session's device."""
        tokens = tokenize([caption.text for caption in captions])
        lengths = torch.tensor([len(caption.text.split()) + 1 for caption in captions])
        nouns = torch.full((len(captions), MAX_OBJECTS), -1)
        background = torch.zeros(tokens.shape)
        for row, caption in enumerate(captions):
            for k, word in enumerate(caption.noun_words):
                nouns[row, k] = word + 1  # every word of the world is one token; row 0 is the start token
            for word in caption.background_words:
                background[row, word + 1] = 1.0
        return cls(*(session.put(tensor) for tensor in (tokens, lengths, nouns, background)))


def pooled(masks: Tensor, tokens: int) -> Tensor:
    """Silhouettes (B, K, CELLS, CELLS) on a coarser grid of `tokens` cells: (B, K, tokens)."""
    side = round(tokens**0.5)
    return F.adaptive_avg_pool2d(masks, side).flatten(2)
