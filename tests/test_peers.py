"""The benchmark's peers: untrained they are the plain model, a step of training helps, and
each moves only what it says."""

import math
from functools import lru_cache

import pytest
import torch

from benchmarks.peers import PEERS, Peer
from benchmarks.peers.lora import Lora
from profusion.residual.training import ResidualTraining, TrainingOptions
from profusion.toybox.concepts import drawn_concept
from profusion.toybox.pipeline import CELLS, Toybox

KERNEL = [peer for peer in PEERS if peer is not Lora]
NOUN = "mushroom"
OTHER = "a photo of a cat on grass"
LEAVE_OTHERS_ALONE = [peer for peer in KERNEL if not peer.prior]


@pytest.fixture(scope="module")
def toybox():
    return Toybox.load()


@pytest.fixture(scope="module")
def concept():
    return drawn_concept(count=1)


@pytest.fixture
def batch(generator):
    return torch.randn(2, 4, 6, 6, generator=generator), torch.tensor([0.7, 4.0])


@pytest.fixture(autouse=True)
def one_class_picture(monkeypatch):
    """Class pictures take most of the time here, and any will do."""
    picture = torch.randn(1, 4, CELLS, CELLS, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(Peer, "_class_pictures", lambda self, seed: picture)


def trained(peer, concept, steps=1):
    recipe = TrainingOptions(steps=steps, learning_rate=peer.rates[-1], batch_size=2, flip=False)
    return list(peer.steps(concept, recipe))


@pytest.mark.parametrize("kind", KERNEL, ids=lambda kind: kind.name)
@torch.no_grad()
def test_untrained_it_is_the_plain_model_bit_for_bit(toybox, batch, kind):
    peer = kind(toybox, NOUN)
    words = {"S*": NOUN, f"S* {NOUN}": f"sks {NOUN}"}.get(
        peer.phrase, peer.phrase
    )  # a word begun as that word's embedding
    plain = Peer(toybox, NOUN).predict_noise(*batch, f"a photo of a {words} on grass")
    assert torch.equal(peer.predict_noise(*batch, f"a photo of a {peer.phrase} on grass"), plain)


@pytest.mark.parametrize("kind", KERNEL, ids=lambda kind: kind.name)
def test_a_step_of_training_moves_what_is_trained_and_nothing_else(toybox, concept, batch, kind):
    peer = kind(toybox, NOUN)
    plain = Peer(toybox, NOUN)
    before = {name: value.detach().clone() for name, value in peer.trained().items()}
    kept = {name: value.clone() for name, value in peer.unet.state_dict().items() if name not in before}
    (loss,) = trained(peer, concept)
    assert math.isfinite(loss)
    assert any(not torch.equal(value, before[name]) for name, value in peer.trained().items())
    assert all(torch.equal(value, kept[name]) for name, value in peer.unet.state_dict().items() if name in kept)
    with torch.no_grad():
        called = f"a photo of a {peer.phrase} on grass"
        assert not torch.equal(peer.predict_noise(*batch, called), plain.predict_noise(*batch, called))
        same = torch.equal(peer.predict_noise(*batch, OTHER), plain.predict_noise(*batch, OTHER))
    assert same == (kind in LEAVE_OTHERS_ALONE)
    assert peer.size() > sum(value.numel() for value in before.values()) * (0.75 if hasattr(peer, "residual") else 2)


@pytest.mark.parametrize("kind", KERNEL, ids=lambda kind: kind.name)
def test_training_lowers_the_loss_of_the_very_batch(toybox, concept, kind, monkeypatch):
    """Every step draws the same batch: the loss after the first is lower than before it."""
    draw = ResidualTraining.batch
    first_batch = lru_cache(lambda training: draw(training))
    monkeypatch.setattr(ResidualTraining, "batch", first_batch)
    first, second = trained(kind(toybox, NOUN), concept, steps=2)
    assert second < first
