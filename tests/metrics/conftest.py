"""Toybox's pair of towers, and pairs that are none."""

import pytest
import torch

from profusion.toybox.encoder import ToyboxEncoder


class Mismatched:
    """A pair whose text tower was not trained with its image tower."""

    name, measure = "mismatched", "CLIP-I"

    def __init__(self, encoder, seed):
        self.images, self._encoder = encoder.images, encoder
        self._mixing = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed))

    def texts(self, texts):
        return self._encoder.texts(texts) @ self._mixing


@pytest.fixture(scope="session")
def toybox():
    return ToyboxEncoder()


@pytest.fixture(scope="session")
def mismatched(toybox):
    return lambda seed: Mismatched(toybox, seed)
