"""2-Wasserstein distance of the Gaussians fitted to two sets of latents: did the pictures of a whole class change?

    W^2 = |m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2)

m, S the mean and covariance of each set (arXiv 2404.14007, section 3; as FID, arXiv 1706.08500, but on latents of the
VAE, of pictures of the super-class drawn before and after customisation, from the same seeds). W has the latents' unit;
W^2 is what FID would report.

A set that has no more pictures than a latent has elements d has a singular covariance, and its size alone would decide
the distance. Both are then shrunk towards spheres as Ledoit and Wolf do, S <- (1 - l) S + l mu I with mu = tr(S) / d,
by the l that suits Gaussians and few samples best (oracle approximating shrinkage, arXiv 0907.4698, without its terms
in 2 / d; Ledoit and Wolf's own l is 0 for two pictures). Outside of the span of the pictures such covariances are
multiples of I, so nothing of size d x d is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import MetricError, check_finite


@dataclass(frozen=True)
class Wasserstein:
    """squared: W^2. pictures: of each set. elements: of a latent. shrinkage: l of each set,
    0 where it was not needed."""

    squared: float
    pictures: tuple[int, int]
    elements: int
    shrinkage: tuple[float, float]

    @property
    def distance(self) -> float:
        """W."""
        return self.squared**0.5

    @property
    def note(self) -> str:
        """What to know about the fit, or nothing."""
        if not any(self.shrinkage):
            return ""
        strongest = max(self.shrinkage)
        return (
            f"{min(self.pictures)} pictures for {self.elements} dimensions: covariances shrunk by "
            f"{100 * strongest:.0f} %"
        )


@dataclass(frozen=True)
class _Gaussian:
    """Mean (d,) and covariance Q M Q^T + floor (I - Q Q^T), for an orthonormal basis Q (d,
    r) that two of them share."""

    mean: Tensor
    inner: Tensor
    floor: float
    shrinkage: float


def wasserstein_distance(latents: Tensor, others: Tensor) -> Wasserstein:
    """W between the Gaussians fitted to two sets of latents, (n, ...) and (m, ...), float64 on the CPU.

    Raises MetricError for a set of one latent, which has no covariance, for NaN, and for latents of different sizes.
    """
    first, second = (_rows(rows, name) for rows, name in ((latents, "first"), (others, "second")))
    if latents.shape[1:] != others.shape[1:]:
        raise MetricError(
            f"latents of {tuple(latents.shape[1:])} and {tuple(others.shape[1:])}: draw both sets at one size"
        )
    elements = first.shape[1]
    shrink = min(len(first), len(second)) <= elements
    centred = torch.cat([rows - rows.mean(dim=0) for rows in (first, second)])
    # Any basis whose span holds all the centred latents will do: outside of it both covariances are multiples of I.
    basis = torch.linalg.qr(centred.T).Q if len(centred) < elements else torch.eye(elements, dtype=torch.float64)
    a, b = (_fit(rows, basis, shrink) for rows in (first, second))
    inside = a.inner.trace() + b.inner.trace() - 2 * torch.linalg.svdvals(_root(a.inner) @ _root(b.inner)).sum()
    outside = (elements - basis.shape[1]) * (a.floor**0.5 - b.floor**0.5) ** 2
    squared = (a.mean - b.mean).square().sum() + inside.clamp(min=0) + outside
    return Wasserstein(squared.item(), (len(first), len(second)), elements, (a.shrinkage, b.shrinkage))


def _rows(latents: Tensor, name: str) -> Tensor:
    if latents.ndim < 2 or len(latents) < 2:
        count = len(latents) if latents.ndim else 0
        raise MetricError(
            f"the {name} set has {count} latent{'' if count == 1 else 's'}, which have no covariance: draw at least "
            "two, better sixteen or more"
        )
    check_finite(
        latents, f"the {name} set's latent", "the model that drew it overflowed; run it in float32 or bfloat16"
    )
    return latents.detach().cpu().double().flatten(1)  # there first: not every device has float64


def _fit(rows: Tensor, basis: Tensor, shrink: bool) -> _Gaussian:
    """The unbiased covariance, or the shrunk one, which starts from the biased one."""
    mean = rows.mean(dim=0)
    centred = rows - mean
    inside = centred @ basis  # (n, r)
    if not shrink:
        return _Gaussian(mean, inside.T @ inside / (len(rows) - 1), 0.0, 0.0)
    amount, sphere = _shrinkage(centred)
    covariance = inside.T @ inside / len(rows)
    inner = (1 - amount) * covariance + amount * sphere * torch.eye(len(covariance), dtype=rows.dtype)
    return _Gaussian(mean, inner, amount * sphere, amount)


def _shrinkage(centred: Tensor) -> tuple[float, float]:
    """How much to shrink the covariance S = X^T X / n of centred rows X (n, d), and to which variance: (l, mu)."""
    count, elements = centred.shape
    gram = centred @ centred.T / count  # its eigenvalues are those of S that are not 0
    trace, square = gram.trace(), gram.square().sum()
    unevenness = square - trace**2 / elements
    amount = (square + trace**2) / ((count + 1) * unevenness) if unevenness > 0 else torch.ones(())
    return amount.clamp(max=1).item(), (trace / elements).item()


def _root(covariance: Tensor) -> Tensor:
    """The square root of a symmetric matrix without negative eigenvalues, but for rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
