"""2-Wasserstein of fitted Gaussians against independent libraries, and its laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from profusion.metrics import MetricError, wasserstein_distance

SIZE = (2, 3, 2)
ELEMENTS = math.prod(SIZE)


def latents(count, seed=0, scale=1.0, shift=0.0, size=SIZE):
    """Correlated ones."""
    generator = torch.Generator().manual_seed(seed)
    elements = math.prod(size)
    mixing = torch.randn(elements, elements, generator=generator, dtype=torch.float64) / elements**0.5
    rows = torch.randn(count, elements, generator=generator, dtype=torch.float64) @ mixing
    return (scale * rows + shift).reshape(count, *size)


def moments(rows):
    """Mean and unbiased covariance, as numpy has them."""
    rows = rows.flatten(1).numpy()
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


def close(found, expected):
    assert abs(found - expected) <= 1e-6 * max(1.0, abs(expected)), f"{found} instead of {expected}"


@pytest.mark.parametrize("counts", [(40, 300), (13, 13)])
def test_as_optimal_transport_has_it(counts):
    ot = pytest.importorskip("ot", reason="POT is not installed: pip install POT, to check Wasserstein against it")
    one, other = latents(counts[0], 1), latents(counts[1], 2, 1.7, 0.5)
    found = wasserstein_distance(one, other)
    (m, s), (n, t) = moments(one), moments(other)
    close(found.distance, float(ot.gaussian.bures_wasserstein_distance(m, n, s, t)))
    assert found.shrinkage == (0.0, 0.0) and not found.note and found.pictures == counts


def test_as_frechets_formula_has_it():
    linalg = pytest.importorskip(
        "scipy.linalg", reason="scipy is not installed: the square root is not checked against it"
    )
    one, other = latents(50, 1), latents(60, 2, 0.5, -1.0)
    found = wasserstein_distance(one, other)
    (m, s), (n, t) = moments(one), moments(other)
    root = linalg.sqrtm(linalg.sqrtm(s) @ t @ linalg.sqrtm(s)).real
    close(found.squared, float(((m - n) ** 2).sum() + np.trace(s + t - 2 * root)))


@pytest.mark.parametrize(("counts", "size"), [((5, 7), SIZE), ((2, 9), SIZE), ((12, 30), SIZE), ((6, 4), (4, 6, 5))])
def test_with_few_pictures_it_is_that_of_shrunk_covariances(counts, size):
    """In the span of the pictures only, against all of both d x d matrices."""
    covariance = pytest.importorskip(
        "sklearn.covariance", reason="scikit-learn is not installed: shrinkage is not checked"
    )
    ot = pytest.importorskip("ot", reason="POT is not installed: pip install POT, to check Wasserstein against it")
    one, other = latents(counts[0], 1, size=size), latents(counts[1], 2, 1.7, 0.5, size=size)
    found = wasserstein_distance(one, other)
    fits = [covariance.OAS().fit(rows.flatten(1).numpy()) for rows in (one, other)]
    means, covariances = [fit.location_ for fit in fits], [fit.covariance_ for fit in fits]
    close(found.distance, float(ot.gaussian.bures_wasserstein_distance(*means, *covariances)))
    assert found.shrinkage == pytest.approx([fit.shrinkage_ for fit in fits], abs=1e-9)
    assert f"{min(counts)} pictures for {math.prod(size)} dimensions: covariances shrunk by" in found.note


def test_singular_covariances_of_all_kinds():
    """No spread at all, one direction only, spread on one side only."""
    still, moved = torch.ones(3, *SIZE), torch.full((4, *SIZE), 3.0)
    close(wasserstein_distance(still, moved).distance, 2 * ELEMENTS**0.5)
    line = torch.randn(40, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, ELEMENTS)
    found = wasserstein_distance(line, 2 * line)
    close(found.squared, (line.mean(0).square().sum() + line.var(0).sum()).item())
    spread = latents(30)
    found = wasserstein_distance(spread, torch.zeros(30, *SIZE))
    close(found.squared, (spread.mean(0).square().sum() + spread.var(0).sum()).item())


def test_it_is_the_same_on_every_device(device):
    one, other = latents(9).float(), latents(12, 1, 2.0).float()
    there = wasserstein_distance(one.to(device), other.to(device))
    assert there.distance == pytest.approx(wasserstein_distance(one, other).distance)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 2**20), st.floats(0.1, 10), st.floats(-50, 50))
def test_the_laws_of_a_distance(count, other_count, seed, scale, shift):
    one, other = latents(count, seed), latents(other_count, seed + 1, scale)
    found = wasserstein_distance(one, other).distance
    size = 1e-6 * (1 + scale + abs(shift))
    assert found >= 0 and wasserstein_distance(one, one).distance <= size
    assert abs(wasserstein_distance(other, one).distance - found) <= size
    assert abs(wasserstein_distance(one + shift, other + shift).distance - found) <= size
    close(wasserstein_distance(3 * one, 3 * other).distance, 3 * found)
    close(wasserstein_distance(one, one + shift).distance, abs(shift) * ELEMENTS**0.5)
    turned = torch.linalg.qr(latents(ELEMENTS, seed).flatten(1)).Q
    close(wasserstein_distance(one.flatten(1) @ turned, other.flatten(1) @ turned).distance, found)


def test_large_latents_of_half_precision_are_taken():
    """A latent of SD 1.5 has 16,384 elements: a covariance would have 2 GB."""
    one, other = torch.randn(6, 4, 64, 64).half(), torch.randn(5, 4, 64, 64).half()
    found = wasserstein_distance(one, other)
    assert math.isfinite(found.distance) and found.elements == 16384 and min(found.shrinkage) > 0.5


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (torch.zeros(1, *SIZE), torch.zeros(2, *SIZE), "the first set has 1 latent, .*at least two"),
        (torch.zeros(2, *SIZE), torch.zeros(0, *SIZE), "the second set has 0 latents"),
        (
            torch.zeros(2, *SIZE),
            torch.full((3, *SIZE), math.nan),
            "second set's latent 1 of 3 .*not finite .*3 in all.*float32",
        ),
        (torch.zeros(2, *SIZE), torch.zeros(2, 4, 3), "draw both sets at one size"),
    ],
)
def test_what_is_refused(one, other, message):
    with pytest.raises(MetricError, match=message):
        wasserstein_distance(one, other)
