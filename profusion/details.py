"""Details of a concept: values at its noun that differ from place to place, where the model's own state decides.

Infusion's residual is a constant, V_bar = W_V (c + onehot(noun) delta) (arXiv 2404.14007, Eq. 6): wherever F looks at
the noun, C finds the same. That, and not the lock, is what limits how alike a concept becomes. With a capacity of n
there are n - 1 details beside delta in each cross-attention layer, and at picture place t

    V_bar(t) = W_V (c + onehot(noun) (delta + sum_{r=1}^{n-1} a_r(t) delta_r))
    a_r(t) = tanh(u_r . n_C(t) / sqrt(C))

n_C is the customised stream's own normed hidden state of C numbers, which its queries would be made of, had they not
F's to give way to. The map stays F's. Attention is linear in its values, so that a detail is what a region is, with
weights in [-1, 1] that nobody paints:

    out_C(t) = base(t) + sum_r a_r(t) (alone_r(t) - base(t))       alone_r: with delta_r at the noun besides

A capacity of 1 has no details, and is the paper's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CAPACITY = 8


@dataclass(frozen=True, eq=False)
class Details:
    """The details of a concept in all layers of a model.

    values: (layers, n - 1, D), each delta_r. gates: (n - 1, sum of widths), each u_r, layer by layer. widths: C of each
    layer. Raises ValueError where they do not belong together.
    """

    values: Tensor
    gates: Tensor
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        count = self.values.shape[1] if self.values.ndim == 3 else 0
        if self.values.ndim != 3 or len(self.values) != len(self.widths) or not 1 <= count < MAX_CAPACITY:
            raise ValueError(
                f"values has the shape {tuple(self.values.shape)} for {len(self.widths)} layers; give (layers, "
                f"details, width) with 1 to {MAX_CAPACITY - 1} details"
            )
        if min(self.widths) < 1 or tuple(self.gates.shape) != (count, sum(self.widths)):
            raise ValueError(
                f"gates has the shape {tuple(self.gates.shape)}; give ({count}, {sum(self.widths)}), for the widths of "
                "the layers"
            )

    @property
    def count(self) -> int:
        """n - 1."""
        return len(self.gates)

    def gates_of(self, layer: int) -> Tensor:
        """u_r of a layer, by its place among them: (n - 1, C)."""
        start = sum(self.widths[:layer])
        return self.gates[:, start : start + self.widths[layer]]

    def to(self, device: torch.device) -> Details:
        """The same on a device."""
        return Details(self.values.to(device), self.gates.to(device), self.widths)


def beginning(
    capacity: int, layers: int, context_dim: int, widths: Sequence[int], generator: torch.Generator
) -> Details:
    """Details that nothing has been learned of: delta_r = 0, which is the plain model, and u_r ~ N(0, 1).

    Were the u_r alike, so would be what is learned of the details; were they 0, nothing would.
    """
    gates = torch.randn(capacity - 1, sum(widths), generator=generator)
    return Details(torch.zeros(layers, capacity - 1, context_dim), gates, tuple(widths))


def openings(gates: Tensor, n: Tensor) -> Tensor:
    """a_r(t) = tanh(u_r . n(t) / sqrt(C)): u (R, C), n (N, T, C) -> (N, T, R) in [-1, 1], of n's type and device.

    n is normed, about 1 a number, so that u_r of numbers about 1 open as far as they close.
    """
    return torch.tanh(n @ (gates.to(n) / math.sqrt(n.shape[-1])).T)


def longest(delta: Tensor, values: Tensor) -> Tensor:
    """How far the noun's row is moved at most, wherever it is: max over a in [-1, 1]^R of |delta + sum_r a_r delta_r|.

    delta (layers, 1, D), values (layers, R, D) -> (layers, 1, 1). The norm is convex, so that the largest is at a
    corner of the cube; those are a few, and their norms are had from the Gram matrix.
    """
    together = torch.cat([delta, values], dim=1)
    gram = together @ together.mT  # (layers, 1 + R, 1 + R)
    corners = torch.tensor([(1.0, *signs) for signs in itertools.product((1.0, -1.0), repeat=values.shape[1])])
    corners = corners.to(gram)
    squares = torch.einsum("cr,lrs,cs->lc", corners, gram, corners)
    return squares.clamp_min(0).sqrt().amax(dim=1)[:, None, None]
