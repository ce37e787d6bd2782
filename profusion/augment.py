"""Variants of one picture for fine-tuning (ProFusion, arXiv 2305.13579, section 3.1): the object stays, and what is
around it is drawn anew, so that what is learned from them is the object alone. It may be moved first, as the authors'
code does, so that its place is not learned either."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .pictures import PictureError, latent_masks

NOUN = "%noun%"
KEPT_SHARE = 0.5  # a latent cell of which the object covers this much is not drawn anew

# As in the authors' code: degrees, and shares of a side and of the size.
MOST_TURN, MOST_SHIFT, LEAST_SCALE = 10.0, 0.2, 0.6
TRIES, INSIDE = 20, 0.98  # how often a place is drawn until so much of the object is inside the picture


def variant_prompts(text: str, noun: str) -> list[str]:
    """The prompts of a text, one a line, with the noun for each %noun%. Raises ValueError where there is none, or no
    noun."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f'prompts: give at least one, one a line, such as "a photo of a {NOUN} on grass"')
    if any(NOUN in prompt for prompt in prompts) and not noun.strip():
        raise ValueError(f"noun is empty, and the prompts have {NOUN} in them: say what the picture shows, such as cat")
    return [prompt.replace(NOUN, noun.strip()) for prompt in prompts]


def redrawn_cells(mask: Tensor, cells: tuple[int, int]) -> Tensor:
    """1 at each latent cell that is drawn anew, 0 where the object is: mask (H, W) -> (h, w).

    Raises PictureError where the object covers every cell, so that nothing would be.
    """
    redrawn = (latent_masks(mask[None], cells)[0] < KEPT_SHARE).float()
    if not redrawn.any():
        raise PictureError(
            "the mask covers the whole picture, so there is no background to draw anew. Paint only the object white; "
            "the mask of Load Image is the other way round: put Invert Mask between"
        )
    return redrawn


def soft_edge(mask: Tensor, pixels: int) -> Tensor:
    """The mask (H, W) with an edge that falls to 0 over so many pixels outside it; inside it stays as it is."""
    if not pixels:
        return mask
    side = 2 * pixels + 1
    padded = F.pad(mask[None, None], [pixels] * 4, mode="replicate")
    mean = F.avg_pool2d(padded, side, stride=1)[0, 0]  # half of it lies inside at a straight edge
    return torch.maximum(mask, (2 * mean).clamp(max=1))


def composite(drawn: Tensor, picture: Tensor, mask: Tensor) -> Tensor:
    """The picture where the mask is 1, to the bit, and what was drawn where it is 0: (H, W, 3) twice, (H, W) ->
    (H, W, 3)."""
    return torch.lerp(drawn, picture, mask[..., None])


def moved(picture: Tensor, mask: Tensor, generator: torch.Generator, mirror: bool) -> tuple[Tensor, Tensor]:
    """The object elsewhere in the picture: turned by up to MOST_TURN either way, shifted by up to MOST_SHIFT of each
    side, LEAST_SCALE to 1 times as large, and mirrored half of the time if it may be: (H, W, 3), (H, W) -> the same.

    Unlike in the authors' code no place is taken where the object would be cut off, as far as there is another.
    """
    best, most = (picture, mask), -1.0
    for _ in range(TRIES):
        turn, across, down, size, side = (2 * torch.rand(5, generator=generator) - 1).tolist()
        scale = LEAST_SCALE + (1 - LEAST_SCALE) * (size + 1) / 2
        flip = -1.0 if mirror and side < 0 else 1.0
        angle, (height, width) = math.radians(MOST_TURN * turn), mask.shape
        # From a place in the result, in [-1, 1] of each half side, back to where it was: unshift, unturn, unscale.
        cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
        back = torch.tensor([[flip * cos, flip * sin * height / width, 0.0], [-sin * width / height, cos, 0.0]])
        back[:, 2] = -back[:, :2] @ torch.tensor([2 * MOST_SHIFT * across, 2 * MOST_SHIFT * down])
        places = F.affine_grid(back[None], [1, 1, height, width], align_corners=False).to(picture)
        there = F.grid_sample(mask[None, None], places, padding_mode="zeros", align_corners=False)[0, 0]
        inside = float(there.sum() / (scale**2 * mask.sum()))
        if inside > most:
            colours = picture.movedim(-1, 0)[None]
            colours = F.grid_sample(colours, places, padding_mode="border", align_corners=False)[0]
            best, most = (colours.movedim(0, -1).clamp(0, 1), there.clamp(0, 1)), inside
        if inside >= INSIDE:
            break
    return best
