"""The judge: a small network that says what a Toybox picture shows and where, so that captions can be scored.

It has learnt from drawn pictures only, never from generated ones (`python -m training.toybox` makes its weights).
Pictures are the host's IMAGE tensors, (B, SIZE, SIZE, 3) in [0, 1]; every mask is (B, SIZE, SIZE) in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..problems import Explained
from .drawing import BACKGROUNDS, PATTERNS, SIZE
from .pipeline import load_network
from .world import NOUNS

_BATCH = 64  # pictures judged at once; more only take more memory


class JudgeError(Explained, ValueError):
    """Something that is not a batch of Toybox pictures."""


def _convolution(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1), nn.GroupNorm(8, out_channels), nn.SiLU()
    )


class JudgeNetwork(nn.Module):
    """Convolutions at a half of the size down to a sixteenth, and back up to masks of every pixel."""

    def __init__(self):
        super().__init__()
        self.down2 = _convolution(12, 16)
        self.down4 = nn.Sequential(_convolution(16, 32, stride=2), _convolution(32, 32))
        self.down8 = nn.Sequential(_convolution(32, 64, stride=2), _convolution(64, 64))
        self.down16 = nn.Sequential(_convolution(64, 96, stride=2), _convolution(96, 96))
        self.up8 = _convolution(96 + 64, 32)
        self.up4 = _convolution(32 + 32, 16)
        self.up2 = _convolution(16 + 16, 16)
        self.masks = nn.Conv2d(16, 2 * 4, 1)
        self.noun = nn.Linear(2 * 96, len(NOUNS))
        self.background = nn.Linear(2 * 96, len(BACKGROUNDS))
        self.pattern = nn.Linear(2 * 64, len(PATTERNS))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, SIZE, SIZE) in [-1, 1] -> logits: nouns (B, 13), backgrounds (B, 6), patterns (B, 4), and of the masks
        of whole objects and of their bodies (B, 2, SIZE, SIZE)."""
        x2 = self.down2(F.pixel_unshuffle(pixels, 2))
        x4 = self.down4(x2)
        x8 = self.down8(x4)
        x16 = self.down16(x8)
        h = self.up8(torch.cat([_twice(x16), x8], dim=1))
        h = self.up4(torch.cat([_twice(h), x4], dim=1))
        h = self.up2(torch.cat([_twice(h), x2], dim=1))
        masks = F.pixel_shuffle(self.masks(h), 2)
        whole, fine = _summary(x16), _summary(x8)
        return self.noun(whole), self.background(whole), self.pattern(fine), masks


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _summary(x: Tensor) -> Tensor:
    """(B, C, H, W) -> the mean and the maximum of each channel, (B, 2C)."""
    return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)


def halves(pictures: Tensor) -> Tensor:
    """The left and the right half of pictures of two objects, each with its edges repeated to full width.

    (B, SIZE, SIZE, ...) -> (2B, SIZE, SIZE, ...), all left halves first. Masks (B, SIZE, SIZE) can be halved alike.
    """
    middle, margin = SIZE // 2, SIZE // 4
    columns = torch.arange(-margin, middle + margin, device=pictures.device).clamp(0, middle - 1)
    return torch.cat([pictures[:, :, columns], pictures[:, :, columns + middle]])


def whole(left: Tensor, right: Tensor) -> Tensor:
    """`halves` undone: (B, SIZE, SIZE, ...) of left and of right halves -> (B, SIZE, SIZE, ...)."""
    kept = slice(SIZE // 4, SIZE // 4 + SIZE // 2)
    return torch.cat([left[:, :, kept], right[:, :, kept]], dim=2)


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in each of B pictures: probabilities of NOUNS (B, 13), BACKGROUNDS (B, 6) and PATTERNS (B, 4;
    no meaning for an object that has its own appearance); soft masks (B, SIZE, SIZE) of whole objects and of their
    bodies."""

    noun_probabilities: Tensor
    background_probabilities: Tensor
    pattern_probabilities: Tensor
    object_mask: Tensor
    body_mask: Tensor

    @property
    def nouns(self) -> list[str]:
        """The likeliest noun of each picture."""
        return [NOUNS[i] for i in self.noun_probabilities.argmax(dim=1).tolist()]

    @property
    def backgrounds(self) -> list[str]:
        """The likeliest background of each picture."""
        return [BACKGROUNDS[i] for i in self.background_probabilities.argmax(dim=1).tolist()]

    @property
    def patterns(self) -> list[str]:
        """The likeliest pattern of each picture."""
        return [PATTERNS[i] for i in self.pattern_probabilities.argmax(dim=1).tolist()]


@dataclass(frozen=True)
class Judge:
    """The trained network. `look` says everything at once; the other methods are its parts.

    Nouns and patterns are those of one object a picture: for two side by side, ask about `halves(pictures)`.
    """

    network: JudgeNetwork

    @classmethod
    def load(cls, folder: Path | None = None) -> Judge:
        """Load the shipped weights, or those of another folder; FileNotFoundError if there are none."""
        network = JudgeNetwork()
        network.load_state_dict(load_network("judge", folder))
        return cls(network.eval().requires_grad_(False))

    @torch.no_grad()
    def look(self, pictures: Tensor) -> Verdict:
        """Judge pictures (B, SIZE, SIZE, 3) in [0, 1]."""
        _check(pictures)
        parts = [self.network(rows.float().movedim(-1, 1) * 2 - 1) for rows in pictures.split(_BATCH)]
        nouns, backgrounds, patterns, masks = (torch.cat(part) for part in zip(*parts, strict=True))
        objects, bodies = masks.sigmoid().unbind(dim=1)
        return Verdict(nouns.softmax(dim=1), backgrounds.softmax(dim=1), patterns.softmax(dim=1), objects, bodies)

    def nouns(self, pictures: Tensor) -> list[str]:
        """The object of each picture."""
        return self.look(pictures).nouns

    def backgrounds(self, pictures: Tensor) -> list[str]:
        """The background of each picture."""
        return self.look(pictures).backgrounds

    def patterns(self, pictures: Tensor) -> list[str]:
        """The pattern that each picture's object wears."""
        return self.look(pictures).patterns

    def object_mask(self, pictures: Tensor) -> Tensor:
        """Where the objects are, outlines and fittings included: (B, SIZE, SIZE)."""
        return self.look(pictures).object_mask

    def body_mask(self, pictures: Tensor) -> Tensor:
        """Where the objects wear their appearance: (B, SIZE, SIZE)."""
        return self.look(pictures).body_mask


def _check(pictures: Tensor) -> None:
    if pictures.dim() != 4 or tuple(pictures.shape[1:]) != (SIZE, SIZE, 3) or not len(pictures):
        raise JudgeError(
            f"pictures have the shape {tuple(pictures.shape)}; the judge takes (B, {SIZE}, {SIZE}, 3), B at least 1"
        )
    if not pictures.is_floating_point() or not bool(((pictures >= 0) & (pictures <= 1)).all()):
        raise JudgeError("pictures must be floating-point numbers in 0..1")
