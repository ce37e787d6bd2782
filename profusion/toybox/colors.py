"""Which of the palette's colours an object wears, counted without a network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .similarity import blur_inside
from .world import PALETTE, Appearance, nearest_color

LEAST_SHARE = 0.15  # of the object, for a colour to count as one of its two
_NEIGHBOURHOOD = 4.0  # pixels
_EVEN = 0.05  # the weight of a pixel like those around it
_PURITY = 40.0  # RGB distance from the palette at which a pixel is taken for a mixture
_COLORS = np.array(list(PALETTE.values()))


def palette_shares(pictures: Tensor, masks: Tensor) -> Tensor:
    """The share of each colour of PALETTE in what pictures show inside masks: (B, H, W, 3), (B, H, W) -> (B, 8), sums 1.

    Each pixel counts for its nearest colour. A blurred edge between red and yellow is orange, and so is no object's colour:
    pixels weigh more where they differ from their neighbourhood (as the middle of a dot does) and less where they are far
    from every colour. All zeros where a mask is empty.
    """
    inside = masks > 0.5
    pixels, picture = pictures[inside], inside.nonzero()[:, 0]  # (n, 3), (n,)
    nearest = torch.from_numpy(nearest_color(255 * pixels.cpu().numpy(), _COLORS)).to(pictures.device)
    difference = 255 * pixels - torch.from_numpy(_COLORS).to(pictures)[nearest]
    difference = difference - 0.5 * difference.mean(dim=1, keepdim=True)  # as nearest_color does: objects are shaded
    pure = torch.exp(-0.5 * (difference.norm(dim=1) / _PURITY) ** 2)
    unlike = (pixels - blur_inside(pictures, inside.to(pictures), _NEIGHBOURHOOD)[inside]).norm(dim=1)
    shares = pictures.new_zeros(len(pictures), len(_COLORS))
    shares.index_put_((picture, nearest), pure * (_EVEN + unlike), accumulate=True)
    return shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-9)


def color_names(shares: Sequence[float]) -> tuple[str, ...]:
    """The one or two colours an object wears, the larger first: those of the two largest shares that reach LEAST_SHARE."""
    order = sorted(range(len(shares)), key=lambda i: -shares[i])[:2]
    return tuple(list(PALETTE)[i] for i in order if shares[i] >= LEAST_SHARE)


def wears(shares: Sequence[float], look: Appearance) -> bool:
    """Whether an object with these palette shares has the colours of a look that `named` ones make up: a plain object mostly
    its one colour, any other just its two, in either order."""
    if not look.named:
        raise ValueError("a look in colours without a name cannot be judged by its colours")
    seen = color_names(shares)
    return seen[:1] == (look.name1,) if look.pattern == "plain" else set(seen) == {look.name1, look.name2}
