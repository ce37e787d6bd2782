"""Three hundred mutated files of all kinds; `make fuzz` tries twenty thousand (tools/fuzz)."""

import pytest
import torch

from tools.fuzz.__main__ import FIXED_SEED, fuzz, outcome
from tools.fuzz.kinds import kinds

FILES = 300


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return kinds(tmp_path_factory.mktemp("examples"))


def test_mutated_files_of_every_kind_are_refused_or_whole(every, tmp_path):
    each, total, refused = -(-FILES // len(every)), 0, 0
    for kind in every:
        found = fuzz(kind, each, FIXED_SEED, tmp_path)
        total += found.outcomes.total()
        refused += found.outcomes["refused"]
    assert total >= FILES and refused > total / 4


def test_the_examples_are_whole_and_a_breach_of_the_contract_is_noticed(every, tmp_path):
    for kind in every:
        path = tmp_path / f"example{kind.suffix}"
        path.write_bytes(kind.examples[0])
        original = kind.load(path)
        assert outcome(kind, path, False, original) == ("equal" if kind.equal else "another")
        if kind.equal is not None:
            path.write_bytes(kind.examples[1])
            with pytest.raises(AssertionError, match="nobody noticed"):
                outcome(kind, path, False, original)


def test_the_same_seed_makes_the_same_files(every, tmp_path):
    kind = every[0]
    assert fuzz(kind, 30, 5, tmp_path).outcomes == fuzz(kind, 30, 5, tmp_path).outcomes
    torch.manual_seed(0)
    assert fuzz(kind, 30, 5, tmp_path).outcomes == fuzz(kind, 30, 5, tmp_path).outcomes
