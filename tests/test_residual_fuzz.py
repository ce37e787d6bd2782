"""Mutated residual files: each is refused, or gives exactly what was saved. Never a crash, never something else.

Two kinds of damage. Accidents (bits, cuts, splices, edited headers) keep the old checksum: what loads must be equal to
what was saved. Forgeries are given a checksum that fits: what loads must be a valid residual, which saves and loads.
"""

from pathlib import Path

import numpy
import pytest
import torch

from profusion.residual import PRECISIONS, Residual, ResidualError, load_residual, save_residual
from tools.fuzz.mutations import ACCIDENTS, forge

LAYERS = ("input.1.0", "input.4.0", "middle.0.0", "output.3.0")
ROUNDS = 120  # of each mutation, in each precision


def make_residual(seed: int) -> Residual:
    generator = torch.Generator().manual_seed(seed)
    delta, moment = torch.randn(2, 4, 1, 96, generator=generator)
    state = {"exp_avg": moment, "step": torch.tensor(3), "rng": generator.get_state()}
    return Residual(delta, f"cat {seed}", LAYERS, "SD 1.x", steps=10 + seed, seed=seed, training_state=state)


def same(a: Residual, b: Residual) -> bool:
    def fields(residual: Residual):
        return residual.noun, residual.layers, residual.architecture, residual.steps, residual.seed

    states = [residual.training_state or {} for residual in (a, b)]
    return (
        fields(a) == fields(b)
        and torch.equal(a.delta, b.delta)
        and states[0].keys() == states[1].keys()
        and all(t.dtype == states[1][n].dtype and torch.equal(t, states[1][n]) for n, t in states[0].items())
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mutation", ACCIDENTS, ids=lambda mutation: mutation.__name__)
def test_a_damaged_file_is_refused_or_loads_as_it_was_saved(tmp_path, mutation, precision):
    original = save_residual(make_residual(0), tmp_path / "a.safetensors", precision).path
    data, saved = original.read_bytes(), load_residual(original)
    other = save_residual(make_residual(1), tmp_path / "b.safetensors", precision).path.read_bytes()
    path = tmp_path / "mutated.safetensors"
    random = numpy.random.default_rng(ACCIDENTS.index(mutation))
    refused = 0
    for _ in range(ROUNDS):
        path.write_bytes(mutation(random, data, other))
        try:
            assert same(load_residual(path), saved)
        except ResidualError as problem:
            assert str(path) in str(problem)
            refused += 1
    assert refused > ROUNDS / 4  # the mutations do bite


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_forged_file_is_refused_or_is_a_residual_like_any_other(tmp_path, precision):
    data = save_residual(make_residual(0), tmp_path / "a.safetensors", precision).path.read_bytes()
    path, again = tmp_path / "forged.safetensors", tmp_path / "again.safetensors"
    random = numpy.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for _ in range(3 * ROUNDS):
        path.write_bytes(forge(random, data))
        loaded = load_or_none(path)
        outcomes[loaded is not None] += 1
        if loaded is not None:
            assert torch.isfinite(loaded.delta).all()
            assert loaded.delta.shape[:2] == (len(loaded.layers), 1)
            assert same(load_residual(save_residual(loaded, again, "float32").path), loaded)
    assert min(outcomes.values()) > 0


def load_or_none(path: Path) -> Residual | None:
    try:
        return load_residual(path)
    except ResidualError as problem:
        assert str(path) in str(problem)
        assert len(str(problem)) < 1000
        return None
