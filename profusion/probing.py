"""How much of a model's attention a noun has, layer by layer: what a residual at that noun can act through.

A residual moves what is read at the noun's rows; in a layer in which the picture hardly looks at them it hardly moves
anything. The share is the mean of all heads' A[I, N], of all that a cell attends to: in a UNet's cross-attention the
prompt, in a joint attention the picture as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .devices import area_means, smoothly_resized
from .holding import region_of
from .problems import Explained

FAINT = 0.01
"""With a smaller share of the attention inside its object, a noun may be too faint for a concept."""

ALIKE = 2.0
"""Where the share inside is not so many times that outside, the noun says little of where the object is."""


class UnseenError(Explained, RuntimeError):
    """A model whose attention was not all seen."""


@dataclass(frozen=True)
class LayerShare:
    """A layer's attention to a noun, as a share of all, where the object is and where it is not; nan of no cells."""

    name: str
    inside: float
    outside: float


class NounShares:
    """Gathers a noun's maps of every layer; takes the place of `holding.NounMaps` in patches that look.

    layers: their names, in the order in which a model evaluates them.
    """

    def __init__(self, layers: Sequence[str]):
        self._layers = tuple(layers)
        self._sums: list[Tensor | None] = [None] * len(layers)
        self._seen: Counter = Counter()
        self._turns = 0

    def add(self, key: Hashable, found: Tensor, region: Any = None, pictures: Any = None, area: Any = None) -> None:
        """A layer's map (N, h, w), of the next layer: see `holding.NounMaps.add`."""
        index = self._seen[key] % len(self._layers)
        self._seen[key] += 1
        whole, before = found.float().mean(dim=0).cpu(), self._sums[index]
        if before is not None and before.shape != whole.shape:
            raise UnseenError("the model was evaluated at several sizes: probe it without tiles, areas or windows")
        self._sums[index] = whole if before is None else before + whole
        self._turns += not index

    def maps(self) -> list[Tensor]:
        """Of each layer, the mean (h, w) over what was added. Raises UnseenError unless all layers were seen alike."""
        if not self._turns or any(count % len(self._layers) for count in self._seen.values()):
            raise UnseenError(
                f"of {len(self._layers)} attentions with text not all were seen: another pack on the model leaves some "
                "out, or merges tokens. Probe the model without it"
            )
        return [total / self._turns for total in self._sums]

    def region(self, size: Sequence[int]) -> Tensor:
        """Where the model sees the noun, by the mean of all layers: (H, W), 0 or 1."""
        return region_of(self.mean(size)[None])[0]

    def mean(self, size: Sequence[int]) -> Tensor:
        """The mean map of all layers, (H, W)."""
        return torch.stack([smoothly_resized(one[None, None], size)[0, 0] for one in self.maps()]).mean(dim=0)

    def shares(self, region: Tensor) -> list[LayerShare]:
        """Of each layer, inside and outside of a region (H, W) in [0, 1]."""
        found = []
        for name, one in zip(self._layers, self.maps(), strict=True):
            inside = area_means(region[None, None].float(), one.shape)[0, 0]
            parts = [float((one * part).sum() / part.sum()) for part in (inside, 1 - inside)]
            found.append(LayerShare(name, *parts))
        return found


def report(noun: str, shares: Sequence[LayerShare]) -> str:
    """A table for people: each layer's shares in percent, and the mean of all, with what it says."""
    inside, outside = (sum(getattr(one, part) for one in shares) / len(shares) for part in ("inside", "outside"))
    rows = [f"{one.name:<12} {100 * one.inside:7.2f} {100 * one.outside:7.2f}" for one in shares]
    said = f"{noun!r} has {100 * inside:.2f} % of the attention inside its object, and {100 * outside:.2f} % outside."
    if inside < FAINT:
        said += (
            f" That is less than {100 * FAINT:g} %: a residual at it has little to act through. Try another noun, or "
            "a prompt that says less besides"
        )
    elif not inside > ALIKE * outside:
        said += " That is much alike: the model hardly tells by this noun where the object is"
    return "\n".join([said, f"{'layer':<12} {'inside':>7} {'outside':>7}", *rows])
