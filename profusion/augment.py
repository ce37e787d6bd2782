"""Variants of one picture for fine-tuning (ProFusion, arXiv 2305.13579, section 3.1): the object stays, and what is
around it is drawn anew, so that what is learned from them is the object alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .pictures import PictureError, latent_masks

NOUN = "%noun%"
KEPT_SHARE = 0.5  # a latent cell of which the object covers this much is not drawn anew


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
