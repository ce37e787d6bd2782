"""The judge, on drawn pictures alone.

Blur, noise, tints and shifts are added while it trains, so that it reads a decoded picture as it reads a drawn one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profusion.toybox import world
from profusion.toybox.judge import JudgeNetwork, halves

from .norm import with_quick_norms
from .session import Session
from .stages import TrainingStage

TURN = 50
UNKNOWN = -1  # no label: the nouns of a picture of two objects, the pattern of a lemon


@dataclass(frozen=True)
class Drawn:
    """Labelled pictures (B, SIZE, SIZE, 3) and masks of whole objects and of bodies (B, SIZE, SIZE, 2), both uint8
    0..255; labels (B, 3): indices into NOUNS, BACKGROUNDS and PATTERNS, or UNKNOWN."""

    pictures: Tensor
    masks: Tensor
    labels: Tensor

    @classmethod
    def draw(cls, count: int, seed: tuple[int, ...]) -> Drawn:
        """`count` scenes; each one of two objects also gives one of its halves as a picture of its own."""
        rng = np.random.default_rng((4, *seed))
        parts = [part for _ in range(count) for part in _draw(rng)]
        return cls(*(torch.stack(column) for column in zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures and masks as channels (B, 3 + 2, SIZE, SIZE) in [0, 1], and labels."""
        layers = torch.cat([self.pictures[indices], self.masks[indices]], dim=-1)
        return layers.movedim(-1, 1).float() / 255, self.labels[indices]


def _draw(rng: np.random.Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A scene's (picture, masks, labels), and one of its halves' where there are two objects."""
    scene = world.sample_scene(rng, hold_out=False)
    drawn = world.render(scene)
    picture = torch.from_numpy(drawn.image)
    masks = torch.from_numpy(np.stack([drawn.masks.max(axis=0), drawn.bodies.max(axis=0)], axis=-1))
    if len(scene.objects) == 1:
        return [(picture, masks, _labels(scene, scene.objects[0]))]
    side = int(rng.integers(2))
    half = (halves(picture[None])[side], halves(masks[None])[side], _labels(scene, scene.objects[side]))
    return [(picture, masks, _labels(scene, None)), half]


def _labels(scene: world.Scene, item: world.SceneObject | None) -> Tensor:
    look = item.appearance if item is not None else None
    noun = UNKNOWN if item is None else world.NOUNS.index(item.noun)
    pattern = UNKNOWN if look is None else world.PATTERNS.index(look.pattern)
    return torch.tensor([noun, world.BACKGROUNDS.index(scene.background), pattern])


def augment(layers: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, move, resize, tint, blur and speckle pictures; their masks (the last two channels) only move along."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    count, size = len(layers), layers.shape[-1]
    mirror = 1 - 2 * (torch.rand(count, generator=generator) < 0.5).float()
    zoom = uniform(0.85, 1.2, count)
    placement = torch.zeros(count, 2, 3)
    placement[:, 0, 0], placement[:, 1, 1] = zoom * mirror, zoom
    placement[:, :, 2] = uniform(-0.12, 0.12, count, 2)
    grid = F.affine_grid(placement, list(layers.shape), align_corners=False)
    moved = F.grid_sample(layers, grid, padding_mode="reflection", align_corners=False)
    pictures, masks = moved[:, :3], moved[:, 3:]
    pictures = (pictures - 0.5) * uniform(0.85, 1.15, count, 1, 1, 1) + 0.5
    pictures = pictures * uniform(0.94, 1.06, count, 3, 1, 1) + uniform(-0.05, 0.05, count, 1, 1, 1)
    blurred = F.interpolate(pictures, size=int(size * uniform(0.22, 0.8, 1)), mode="bilinear", antialias=True)
    blurred = F.interpolate(blurred, size=size, mode="bicubic")
    pictures = torch.lerp(pictures, blurred, uniform(-0.4, 1.0, count, 1, 1, 1).clamp(min=0))
    noise = torch.randn(pictures.shape, generator=generator) * uniform(0, 0.04, count, 1, 1, 1)
    return torch.cat([(pictures + noise).clamp(0, 1), masks], dim=1)


def train_judge(session: Session, batch: int = 64) -> JudgeNetwork:
    """Cross-entropy on the three labels and on every pixel of the masks. Every TURN steps there are new scenes."""
    torch.manual_seed(session.recipe.seed + 4)
    network = JudgeNetwork().to(session.device, memory_format=torch.channels_last)
    network = with_quick_norms(network) if session.device.type == "cpu" else network
    stage = TrainingStage(
        "judge", nn.ModuleDict({"judge": network}), session, learning_rate=3e-3, ema_decay=0.99, seed=5
    )

    @lru_cache(maxsize=1)
    def scenes_of(turn: int) -> Drawn:
        return Drawn.draw(session.recipe.judge_scenes, (session.recipe.seed, turn))

    def loss_of(step: int, generator: torch.Generator):
        drawn = scenes_of(step // TURN)
        layers, labels = drawn.batch(torch.randint(len(drawn), (batch,), generator=generator))
        layers, labels = session.put(augment(layers, generator)), session.put(labels)
        *logits, masks = (part.float() for part in network(layers[:, :3] * 2 - 1))
        named = [F.cross_entropy(logits[k], labels[:, k], ignore_index=UNKNOWN) for k in range(3)]
        shaped = F.binary_cross_entropy_with_logits(masks, layers[:, 3:].clamp(0, 1))
        return sum(named) + 3 * shaped, {"noun": named[0], "pattern": named[2], "mask": shaped}

    stage.run(loss_of)
    return network.eval()
