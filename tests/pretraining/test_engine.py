"""One step over any number of processes is one step of one process."""

import json

import pytest
import torch

from profusion.loop import TrainingError
from profusion.pretraining.engine import MOST_SKIPPED, PretrainingOptions, rounds
from profusion.pretraining.ranks import Ranks
from tests.pretraining.processes import ROOT, together
from tests.pretraining.small import engine_for, network_for, pictures
from tests.shrunken import FAMILIES

WAYS = [
    (2, {"micro": 2}),
    (4, {"checkpointing": True}),
    (2, {"shard": True, "ema": 0.9, "checkpointing": True}),
]


def gradients(engine, latents, image_tokens):
    engine._optimizer.zero_grad()
    engine._gradient(latents, image_tokens)
    return {name: value.grad.clone() for name, value in engine.parameters.items()}


def assert_same(found, expected):
    """Each part of the gradient to 1e-6 of its norm; where a norm's groups have one channel, biases have none."""
    assert found.keys() == expected.keys()
    whole = sum(value.square().sum() for value in expected.values()).sqrt()
    for name, value in expected.items():
        assert value.dtype == torch.float64
        assert (found[name] - value).norm() <= max(1e-6 * value.norm(), 1e-12 * whole), name


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(("world", "way"), WAYS)
def test_the_gradient_of_several_processes_is_that_of_one(tmp_path, world, way):
    together(
        [ROOT / "tests/pretraining/worker.py", tmp_path / "found.pt", json.dumps({**way, "exact": True})],
        world,
        tmp_path / "log",
    )
    found, losses, step, names = torch.load(tmp_path / "found.pt")
    engine = engine_for(Ranks(), exact=True, ema=way.get("ema", 0.0))
    assert_same(found, gradients(engine, *pictures()))
    engine._optimizer.zero_grad()
    alone = [engine.take(*pictures()).loss for _ in range(3)]
    assert losses == pytest.approx(alone, rel=1e-5) and step == 3
    assert names == sorted(engine.state())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_noise", [False, True])
def test_rounds_and_checkpoints_leave_the_gradient_as_it_is(family, with_noise):
    given = pictures()
    given_to = {"family": family, "with_noise": with_noise, "exact": True}
    whole = gradients(engine_for(Ranks(), **given_to), *given)
    assert all(value.any() for value in whole.values()), "everything learns"
    assert_same(gradients(engine_for(Ranks(), micro=2, **given_to), *given), whole)
    assert_same(gradients(engine_for(Ranks(), checkpointing=True, **given_to), *given), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_finite_differences(family, monkeypatch):
    def error(predicted, noise, weight):  # the real one, which rounds to float32 at its end, hides small differences
        return (weight * ((predicted - noise) ** 2).mean(dim=(1, 2, 3))).mean()

    monkeypatch.setattr("profusion.pretraining.objective.weighted_noise_error", error)
    engine, given = engine_for(Ranks(), family, exact=True, with_noise=True), pictures()
    found, generator, step = gradients(engine, *given), torch.Generator().manual_seed(2), 1e-4
    for name in ("output.weight", "image_projection.weight", "second_latent.0.weight", "middle_block.1.proj_in.weight"):
        value = engine.parameters[name].data
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            value += sign * step * direction
            losses.append(engine._gradient(*given))
            value -= sign * step * direction
        expected = (found[name] * direction).sum().item()
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(expected, rel=1e-4), name


def test_a_step_that_is_not_finite_is_left_out_and_ten_in_a_row_end_it():
    engine, (latents, image_tokens) = engine_for(Ranks(), steps=100, ema=0.9), pictures()
    engine.take(latents, image_tokens)
    before, state = engine.weights(), engine.state()
    broken = latents.clone()
    broken[3, 0, 0, 0] = torch.nan
    step = engine.take(broken, image_tokens)
    assert step.skipped == "the loss is not finite" and engine.step == 2
    assert all(torch.equal(value, before[name]) for name, value in engine.weights().items())
    after = engine.state()
    assert all(torch.equal(value, after[name]) for name, value in state.items() if name != "step")
    assert engine.take(latents, image_tokens).skipped is None
    for _ in range(MOST_SKIPPED - 1):
        engine.take(broken, image_tokens)
    with pytest.raises(TrainingError, match="10 steps in a row.*Lower the learning rate"):
        engine.take(broken, image_tokens)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_restored_engine_goes_on_bit_for_bit(ema):
    whole, (latents, image_tokens) = engine_for(Ranks(), ema=ema, warmup=2, cosine=True), pictures()
    for _ in range(2):
        whole.take(latents, image_tokens)
    weights, state = whole.weights(), whole.state()
    other = engine_for(Ranks(), ema=ema, warmup=2, cosine=True)
    other.restore(weights, state)
    for _ in range(2):
        assert other.take(latents, image_tokens) == whole.take(latents, image_tokens)
    for averaged in (False, True):
        one, two = whole.weights(averaged), other.weights(averaged)
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert bool(ema) == any(name.startswith("ema.") for name in state)


def test_the_average_follows_and_is_there_only_while_it_is_asked_for():
    engine, (latents, image_tokens) = engine_for(Ranks(), ema=0.5), pictures()
    engine.take(latents, image_tokens)
    own = engine.weights()
    with engine.averaged():
        inside = engine.weights()
    assert all(torch.equal(engine.weights()[name], own[name]) for name in own)
    assert all(torch.equal(inside[name], engine.weights(averaged=True)[name]) for name in own)
    assert not torch.equal(inside["output.weight"], own["output.weight"])


def test_batches_that_cannot_be_shared_out_are_refused():
    assert rounds(PretrainingOptions(batch_size=64, micro=4), 8) == 2
    with pytest.raises(TrainingError, match="64 cannot be shared out to 3"):
        rounds(PretrainingOptions(batch_size=64), 3)
    with pytest.raises(TrainingError, match="32 rows a process cannot be taken 5"):
        rounds(PretrainingOptions(batch_size=64, micro=5), 2)
    with pytest.raises(ValueError, match="ema"):
        PretrainingOptions(ema=1.0)


def test_the_authors_layout_learns_too():
    model = engine_for(Ranks()).objective.base
    network = network_for(model, "authors")
    assert network.config.holds_position and network.config.with_noise and not network.config.normalise
