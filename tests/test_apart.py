"""Copies of what functions and objects remember: each run has its own, and what is no memory stays one."""

import collections
import functools
import itertools
import random
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn

from profusion.apart import LARGEST, Apart


def counter():
    count = 0

    def step():
        nonlocal count
        count += 1
        return count

    def look():
        return count

    return step, look


def test_a_closures_variables_are_its_own_and_functions_that_share_one_still_do():
    step, look = counter()
    step()
    apart = Apart()
    own_step, own_look = apart([step, look])
    assert (own_step(), own_step(), own_look()) == (2, 3, 3)
    assert look() == 1 and step() == 2 and own_look() == 3
    assert apart(step) is own_step  # the same whenever it is asked for


class Remembering:
    __slots__ = ("__dict__", "slot")

    def __init__(self):
        self.seen, self.slot, self.mean = [], [], torch.zeros(2)

    def __call__(self, value):
        self.seen.append(value)
        self.slot.append(value)
        self.mean.add_(value)
        return len(self.seen)

    note = __call__


@pytest.mark.parametrize(
    "get",
    [
        lambda it: it,
        lambda it: it.note,
        lambda it: functools.partial(it, 2),
        lambda it: functools.partial(it.note, value=2),
        lambda it: lambda *_: it(2),
        lambda it: {"a": ({"b": [it]},)}["a"][0]["b"][0],
        lambda it: it.seen.append,
    ],
)
def test_an_object_is_its_own_however_it_is_reached(get):
    it = Remembering()
    own = Apart()(get(it))
    for _ in range(2):
        own() if isinstance(own, functools.partial) else own(2)
    assert it.seen == it.slot == [] and it.mean.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("make", "use"),
    [
        (lambda: [1, [2]], lambda it: it[1].append(3)),
        (lambda: {"a": {1}}, lambda it: it["a"].add(3)),
        (lambda: collections.deque([[1]]), lambda it: it[0].append(3)),
        (lambda: collections.defaultdict(list, a=[1]), lambda it: it["a"].append(3)),
        (lambda: types.SimpleNamespace(a=[1]), lambda it: it.a.append(3)),
        (lambda: torch.zeros(3), lambda it: it.add_(1)),
        (lambda: itertools.count(), next),
        (lambda: random.Random(0), lambda it: it.random()),
        (lambda: iter([1, 2]), next),
        (lambda: iter((1, 2)), next),
        (lambda: iter(range(3)), next),
        (lambda: np.zeros(3), lambda it: np.copyto(it, 1)),
        (lambda: np.random.default_rng(0), lambda it: it.random()),
        (lambda: np.random.RandomState(0), lambda it: it.rand()),
        (lambda: torch.Generator().manual_seed(0), lambda it: torch.rand(1, generator=it)),
        (lambda: collections.namedtuple("Pair", "a b")([1], 2), lambda it: it.a.append(3)),
    ],
)
def test_kinds_of_memory(make, use):
    def state(it):
        if isinstance(it, random.Random):
            return it.getstate()
        if isinstance(it, np.random.Generator):
            return str(it.bit_generator.state)
        if isinstance(it, np.random.RandomState):
            return str(it.get_state())
        if hasattr(it, "__length_hint__") and not isinstance(it, itertools.count):
            return it.__length_hint__()
        return it.get_state().tolist() if isinstance(it, torch.Generator) else repr(it)

    it = make()
    before = state(it)
    own = Apart()(it)
    assert type(own) is type(it) and state(own) == before
    use(own)
    assert state(it) == before != state(own)


def test_what_is_no_memory_stays_one():
    shared = [
        nn.Linear(2, 2),
        nn.Parameter(torch.zeros(2)),
        torch.zeros(LARGEST // 4 + 1),
        np.zeros(LARGEST // 8 + 1),
        np.array([object()]),
        threading.Lock(),
        threading.Event(),
        Remembering,
        torch,
        len,
        "text",
        (1, "two"),
        counter,
    ]
    assert all(Apart()(value) is value for value in shared)
    it = Remembering()
    assert Apart([Remembering.__module__])(it) is it
    assert Apart([Remembering.__module__]).object(it) is not it


def test_a_packs_own_kind_of_what_is_shared_is_shared():
    """A copy of a host's patcher would take away, once it goes, what the original had put on the network."""
    others = type("Patcher", (Remembering,), {"__module__": "some_pack.patching"})()
    assert Apart([Remembering.__module__])(others) is others and Apart()(others) is not others


def test_circles_end():
    it = Remembering()
    it.me, it.again = it, lambda: it
    own = Apart()(it)
    assert own is not it and own.me is own and own.again() is own


def test_a_function_is_told_by_all_that_it_was():
    def named(value, *, more=[1]):  # noqa: B006 (it is the point: a default may remember)
        """Text."""
        more.append(value)
        return len(more)

    named.note = [1]
    own = Apart()(named)
    assert (own.__name__, own.__doc__, own.__qualname__) == (named.__name__, named.__doc__, named.__qualname__)
    assert own(1) == 2 and own(1) == 3 and named(1) == 2
    own.note.append(2)
    assert named.note == [1]


def test_what_cannot_be_copied_is_shared():
    class Single:
        def __copy__(self):
            raise TypeError("there is one")

    it = Single()
    assert Apart()(it) is it


def test_a_variable_that_is_not_there_yet():
    def later():
        return value

    own = Apart()(later)
    with pytest.raises(NameError):
        own()
    value = 1
    assert later() == value
