"""Which of the palette's colours an object wears, found without a network.

Blur mixes colours: the edge between red and yellow is orange, and to count each pixel for its nearest colour would see
an orange that nobody painted. So a colour and each pair of colours a, b is tried as the explanation of all pixels x:
with

    t = clamp(<x - a, b - a> / |b - a|^2, 0, 1)                     how far x lies from a towards b
    cost = mean |x - a - t (b - a)|^2 + MIXING t (1 - t) |b - a|^2   off the line, and a mixture rather than a or b

(t = 0 for a single colour a), in RGB where a difference in brightness counts half, because objects are shaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from .world import PALETTE, Appearance

LEAST_SHARE = 0.15  # of the object, for a colour to be one of its two
MIXING = 0.2
SECOND_COLOR = 0.6  # a second colour must bring the cost below this share of what the best single one leaves
_PAIRS = torch.tensor(list(combinations(range(len(PALETTE)), 2)))  # (28, 2)


def _shaded(colors: Tensor) -> Tensor:
    """Colours (..., 3), 0..1, with half of their brightness."""
    return colors - 0.5 * colors.mean(dim=-1, keepdim=True)


def palette_shares(pictures: Tensor, masks: Tensor) -> Tensor:
    """The share that each colour of PALETTE, one or two of them, has in the objects of pictures.

    pictures (B, H, W, 3) in [0, 1], masks (B, H, W) of the objects' bodies -> (B, 8), sums 1, at most two numbers not
    0. All zeros where a mask is empty.
    """
    palette = _shaded(pictures.new_tensor(list(PALETTE.values())) / 255)
    return torch.stack(
        [_shares(_shaded(picture[mask > 0.5]), palette) for picture, mask in zip(pictures, masks, strict=True)]
    )


def _shares(pixels: Tensor, palette: Tensor) -> Tensor:
    """Pixels (n, 3) of one object -> (8,)."""
    shares = palette.new_zeros(len(palette))
    if not len(pixels):
        return shares
    single_costs = torch.cdist(pixels, palette).square().mean(dim=0)  # (8,)
    start, along = palette[_PAIRS[:, 0]], palette[_PAIRS[:, 1]] - palette[_PAIRS[:, 0]]  # (28, 3)
    length = along.square().sum(dim=1)
    offset = pixels[:, None] - start  # (n, 28, 3)
    t = ((offset * along).sum(dim=2) / length).clamp(0, 1)  # (n, 28)
    costs = ((offset - t[..., None] * along).square().sum(dim=2) + MIXING * t * (1 - t) * length).mean(dim=0)
    second = t.mean(dim=0)
    costs[torch.minimum(second, 1 - second) < LEAST_SHARE] = torch.inf
    best = int(costs.argmin())
    if costs[best] < SECOND_COLOR * single_costs.min():
        shares[_PAIRS[best]] = torch.stack([1 - second[best], second[best]])
    else:
        shares[single_costs.argmin()] = 1.0
    return shares


def color_names(shares: Sequence[float]) -> tuple[str, ...]:
    """The one or two colours with a share, the larger first."""
    present = [index for index, share in enumerate(shares) if share > 0]
    return tuple(list(PALETTE)[index] for index in sorted(present, key=lambda index: -shares[index]))


def wears(shares: Sequence[float], look: Appearance) -> bool:
    """Whether an object with these palette shares has the colours of a look that `named` ones make up: a plain object
    mostly its one colour, any other just its two, in either order."""
    if not look.named:
        raise ValueError("a look in colours without a name cannot be judged by its colours")
    seen = color_names(shares)
    return seen[:1] == (look.name1,) if look.pattern == "plain" else set(seen) == {look.name1, look.name2}
