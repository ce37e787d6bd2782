"""Similarities against scipy's cosine, their laws, and what they refuse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from profusion.metrics import MetricError
from profusion.metrics.similarity import (
    background_only,
    cosine,
    image_similarity,
    object_only,
    prompt_similarity,
    similarity_among,
)


def features(count, width=5, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_as_scipy_has_it():
    distance = pytest.importorskip("scipy.spatial.distance", reason="scipy is not installed: cosines are not checked")
    pictures, references, texts = features(4, seed=1), features(3, seed=2), features(4, seed=3)
    expected = torch.from_numpy(1 - distance.cdist(pictures, references, "cosine")).float()
    torch.testing.assert_close(cosine(pictures, references), expected)
    torch.testing.assert_close(image_similarity(pictures, references), expected.mean(dim=1))
    rows = [1 - distance.cosine(*pair) for pair in zip(pictures.numpy(), texts.numpy(), strict=True)]
    torch.testing.assert_close(prompt_similarity(pictures, texts), torch.tensor(rows, dtype=torch.float32))
    one = [1 - distance.cosine(row, texts[0].numpy()) for row in pictures.numpy()]
    torch.testing.assert_close(prompt_similarity(pictures, texts[:1]), torch.tensor(one, dtype=torch.float32))
    among = 1 - torch.from_numpy(distance.cdist(references, references, "cosine")).float()
    off = among[~torch.eye(3, dtype=torch.bool)].reshape(3, 2).mean(dim=1)
    torch.testing.assert_close(similarity_among(references), off)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**20), st.floats(0.01, 100))
def test_cosines_know_no_length_and_are_1_for_the_same(count, others, seed, scale):
    one, other = features(count, seed=seed), features(others, seed=seed + 1)
    found = cosine(one, other)
    assert found.shape == (count, others) and found.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(cosine(scale * one, other), found)
    torch.testing.assert_close(cosine(other, one), found.T)
    torch.testing.assert_close(cosine(one, one).diagonal(), torch.ones(count))
    torch.testing.assert_close(cosine(-one, other), -found)


def test_similarities_are_the_same_on_every_device(device):
    pictures, references, texts = features(4, seed=1), features(3, seed=2), features(4, seed=3)
    there = [value.to(device) for value in (pictures, references, texts)]
    torch.testing.assert_close(cosine(there[0], references).cpu(), cosine(pictures, references))
    torch.testing.assert_close(image_similarity(*there[:2]).cpu(), image_similarity(pictures, references))
    torch.testing.assert_close(prompt_similarity(there[0], there[2]).cpu(), prompt_similarity(pictures, texts))
    torch.testing.assert_close(similarity_among(there[1]).cpu(), similarity_among(references))
    picture, mask = torch.rand(1, 4, 4, 3), torch.ones(1, 4, 4).tril()
    assert torch.equal(object_only(picture.to(device), mask).cpu(), object_only(picture, mask))


def test_object_and_background_are_halves_of_a_picture():
    picture, mask = torch.rand(1, 4, 4, 3), torch.zeros(1, 4, 4)
    mask[:, :2] = 1
    inside, outside = object_only(picture, mask), background_only(picture, mask)
    assert torch.equal(inside[:, :2], picture[:, :2]) and (inside[:, 2:] == 0.5).all()
    assert torch.equal(outside[:, 2:], picture[:, 2:]) and (outside[:, :2] == 0.5).all()
    with pytest.raises(MetricError, match=r"give \(B, H, W\) of each"):
        object_only(picture, mask[:, :3])
    with pytest.raises(MetricError, match="mask 1 of 1 has values that are not finite"):
        object_only(picture, mask * math.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cosine(features(0), features(1)), "at least one row"),
        (lambda: cosine(features(2), features(1, width=6)), "width 5 and 6 do not compare.*trained with"),
        (lambda: cosine(features(2) * math.nan, features(1)), "feature 1 of 2 has values that are not finite"),
        (lambda: cosine(features(2) * 0, features(1)), "no direction"),
        (lambda: prompt_similarity(features(3), features(2)), "2 prompts for 3 pictures"),
        (lambda: similarity_among(features(1)), "at least two"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(MetricError, match=message):
        call()
