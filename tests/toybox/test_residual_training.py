"""A residual's training on Toybox: what becomes of pictures and masks on the way into it."""

import pytest
import torch

from profusion.residual.training import TrainingOptions
from profusion.toybox.drawing import SIZE
from profusion.toybox.pipeline import NETWORKS, WEIGHTS, Toybox

pytestmark = pytest.mark.skipif(
    not all((WEIGHTS / f"toybox_{name}.safetensors").is_file() for name in NETWORKS),
    reason="Toybox's weights are not there: train them with `python -m training.toybox`",
)


def test_pictures_are_mirrored_with_their_masks():
    toybox, generator = Toybox.load(), torch.Generator().manual_seed(0)
    pictures, masks = torch.rand(2, SIZE, SIZE, 3, generator=generator), torch.zeros(2, SIZE, SIZE)
    masks[0, 10:40, :30], masks[1, 50:, 60:90] = 1, 1
    sides = [toybox.references(pictures, masks), toybox.references(pictures.flip(2), masks.flip(2))]
    known = [item for side in sides for item in side]
    assert not torch.equal(known[0].mask, known[2].mask)
    for flip, expected in ((True, {0, 1, 2, 3}), (False, {0, 1})):
        run, seen = toybox.training(pictures, masks, "ball", TrainingOptions(batch_size=16, flip=flip)), set()
        batch = run.batch()
        for latent, mask in zip(batch.noisy - batch.sigma.view(-1, 1, 1, 1) * batch.noise, batch.mask, strict=True):
            nearest = min(range(4), key=lambda index: (known[index].latent - latent).abs().max())
            assert (known[nearest].latent - latent).abs().max() < 1e-3 and torch.equal(mask, known[nearest].mask)
            seen.add(nearest)
        assert seen == expected
