"""What F's evaluations are known by, and how many of them are kept."""

import gc

import pytest
import torch
from torch import nn

from profusion.foundations import (
    Evaluated,
    Foundations,
    UntoldError,
    fingerprint,
    of_f,
    queries_by_name,
    queries_by_place,
    state_key,
)
from profusion.foundations import names as names_of


def test_a_fingerprint_is_of_every_bit():
    x = torch.randn(2, 3)
    other = x.clone()
    other.view(torch.int32)[1, 2] += 1
    assert fingerprint(x) == fingerprint(x.clone()) == fingerprint(x.t().contiguous().t())
    different = [x, other, x.reshape(3, 2), x.double(), x.bfloat16(), [x], (x, x), {"x": x}, {"y": x}, [[x], x], 1, 1.0]
    different += [True, "1", b"1", None, [], {}, [None], torch.zeros(()), torch.zeros(1), torch.float32, 0.1 + 0.2, 0.3]
    assert len({fingerprint(thing) for thing in different}) == len(different)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) and fingerprint(-0.0) != fingerprint(0.0)


@pytest.mark.parametrize("shape", [(1,), (3, 2)])
def test_views_without_strides_are_told(shape):
    assert fingerprint(torch.ones(1).expand(shape)) == fingerprint(torch.ones(shape))


@pytest.mark.parametrize("thing", [len, lambda: 1, object(), nn.Identity(), range(3), [{"a": object()}], torch.Tensor])
def test_what_does_something_is_not_told(thing):
    with pytest.raises(UntoldError):
        fingerprint(thing)


CONDS = [[{"uuid": 1, "cross_attn": torch.ones(1, 2, 3), "profusion_infusion": [object()]}], [{"uuid": 2}]]


def test_f_does_not_depend_on_names_and_concepts():
    renamed = [[{**CONDS[0][0], "uuid": 3, "profusion_infusion": []}], [{"uuid": 4}]]
    assert fingerprint(of_f(CONDS)) == fingerprint(of_f(renamed)) != fingerprint(of_f(CONDS[::-1]))
    assert of_f([None, []]) == [None, []]
    x = torch.zeros(1)
    assert state_key(b"a", CONDS, {}, x) == state_key(b"a", renamed, {}, x) != state_key(b"b", CONDS, {}, x)
    assert state_key(b"a", CONDS, {}, x) != state_key(b"a", CONDS, {}, x + 1)


@pytest.mark.parametrize(
    "options",
    [
        {"model_function_wrapper": len},
        {"transformer_options": {"patches": {"attn2_patch": [len]}}},
        {"transformer_options": {"wrappers": {"apply_model": {"somebody's": [len]}}}},
        {"transformer_options": {"callbacks": {"on_pre_run": {None: [len]}}}},
        {"context_handler": object()},
    ],
)
def test_with_functions_on_the_model_there_is_no_key(options):
    assert state_key(b"", CONDS, options) is None


def test_without_them_there_is_one():
    ours = {"wrappers": {"calc_cond_batch": {"profusion_infusion": [len], "none": []}}, "sample_sigmas": object()}
    assert state_key(b"", CONDS, {"sampler_cfg_function": len, "transformer_options": ours}) is not None
    for name in ("control", "hooks", "gligen"):
        assert state_key(b"", [[{**CONDS[0][0], name: object()}]], {}) is None


def test_conditionings_are_known_by_their_place():
    names = names_of(CONDS)
    assert names == [(0, 1), (1, 2)]
    queries = {("middle", (name, 0)): torch.randn(1) for name in [*names, (0, 9)]}
    kept = queries_by_place(queries, names)
    assert set(kept) == {("middle", (0, 0)), ("middle", (1, 0))}
    again = queries_by_name(kept, [(0, 7), (1, 8)])
    assert again["middle", ((0, 7), 0)] is queries["middle", ((0, 1), 0)]


def evaluated(size, queries=0):
    left = {("middle", (0, 0)): torch.ones(queries // 4)} if queries else None
    return Evaluated([torch.ones(size // 4)], {0: 1}, {}, left)


class Model:
    pass


def test_it_is_bounded_and_the_run_at_hand_comes_first():
    kept, model = Foundations(1000), Model()
    kept.begin(model)
    for key in (b"a", b"b"):
        kept.keep(key, evaluated(100, 300), 1)
    assert kept.size == 800 and len(kept) == 2
    kept.keep(b"c", evaluated(100, 300), 1)  # no room for its queries
    assert kept.size == 900 and kept.get(b"c").queries is None
    kept.keep(b"d", evaluated(200), 1)  # queries go for it, the last first
    assert kept.size == 800 and kept.get(b"b").queries is None and kept.get(b"a").queries
    kept.keep(b"e", evaluated(1100), 1)
    assert kept.get(b"e") is None and kept.size == 800
    kept.keep(b"e", evaluated(1000), 2)  # of two pictures there may be twice as much
    assert kept.get(b"e") is not None and kept.size == 1800
    kept.begin(model)
    kept.get(b"a")
    kept.keep(b"f", evaluated(100, 500), 1)  # what this run has not asked for goes
    assert kept.size == 1000 and kept.get(b"f").queries and len(kept) == 2


def test_what_is_kept_is_nobody_elses():
    kept, given = Foundations(), evaluated(100, 100)
    kept.keep(b"a", given, 1)
    given.predicted[0].zero_()
    given.queries["middle", (0, 0)].zero_()
    assert kept.get(b"a").predicted[0].all() and kept.get(b"a").queries["middle", (0, 0)].all()


def test_a_further_look_adds_to_the_first():
    kept = Foundations()
    kept.keep(b"a", Evaluated([torch.ones(1)], {}, {"ball": (torch.ones(2), torch.ones(1))}, {"q": torch.ones(3)}), 1)
    kept.keep(b"a", Evaluated([torch.ones(1)], {}, {"cup": (torch.ones(2), torch.ones(1))}), 1)
    assert set(kept.get(b"a").maps) == {"ball", "cup"} and kept.get(b"a").queries is not None
    assert kept.size == sum(4 * n for n in (1, 2, 1, 2, 1, 3))


def test_there_is_one_model_and_nothing_of_one_that_is_gone():
    kept, one, other = Foundations(), Model(), Model()
    kept.begin(one)
    kept.keep(b"a", evaluated(4), 1)
    kept.begin(one)
    kept.forget(other)
    assert len(kept) == 1
    kept.begin(other)
    assert len(kept) == 0
    kept.keep(b"a", evaluated(4), 1)
    del one
    gc.collect()
    assert len(kept) == 1
    del other
    gc.collect()
    assert len(kept) == 0 and kept.size == 0
    kept.begin(three := Model())
    kept.keep(b"a", evaluated(4), 1)
    kept.forget(three)
    assert len(kept) == 0
