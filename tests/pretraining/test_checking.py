"""A validation over any number of processes is that of one."""

import pytest
import torch

from profusion.pretraining.checking import Validation
from profusion.pretraining.ranks import Ranks
from tests.pretraining.small import SIDE, TOKENS, WIDTH, engine_for


class Encoded:
    """Features and embeddings of pictures, without a network."""

    def __init__(self, vae):
        self.vae = vae

    def features(self, pictures):
        mean = pictures.float().mean(dim=(1, 2, 3)) / 255
        latents = mean[:, None, None, None].expand(-1, 4, SIDE // 2, SIDE // 2)
        return latents, mean[:, None, None].expand(-1, TOKENS, WIDTH)

    def embeddings(self, pictures):
        return torch.nn.functional.normalize(pictures.float().mean(dim=(1, 2)) + 1, dim=1)


class OneOf(Ranks):
    """A process of several that run one after the other; what it gives is kept."""

    def sums(self, values):
        self.given.append(list(values))
        return list(values)

    def gathered(self, thing):
        self.given.append(thing)
        self.before.append(thing)
        return self.before


def found(world, count, engine):
    pictures = torch.randint(256, (count, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    losses, drawn, before = [], {}, []
    for rank in range(world):
        engine.ranks = OneOf(rank, world)
        object.__setattr__(engine.ranks, "given", [])
        object.__setattr__(engine.ranks, "before", before)
        validation = Validation(engine, Encoded(engine.objective.base.vae), pictures)
        validation.loss()
        validation.drawn(4)
        with_one_word, with_words, (numbers, *rest) = engine.ranks.given
        losses.append(with_one_word + with_words)
        drawn |= {number: values for number, *values in zip(numbers, *rest, strict=True)}
    return torch.tensor(losses).sum(dim=0).tolist(), drawn


@pytest.mark.parametrize(("world", "count"), [(2, 1), (2, 3), (2, 4)])
def test_any_number_of_processes_finds_what_one_does(world, count, monkeypatch):
    monkeypatch.setattr("profusion.pretraining.checking.SHEET_STEPS", 2)
    engine = engine_for(Ranks())
    alone, expected = found(1, count, engine)
    losses, drawn = found(world, count, engine)
    assert losses == pytest.approx(alone, rel=1e-5)
    assert sorted(drawn) == sorted(expected) == list(range(count))
    for number, (given, made, alike) in drawn.items():
        assert torch.equal(given, expected[number][0])
        assert (made.int() - expected[number][1].int()).abs().max() <= 1
        assert alike == pytest.approx(expected[number][2], abs=1e-3)
