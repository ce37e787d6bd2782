"""C at every n-th step: when it is evaluated, whatever the sampler calls, and what it is between."""

import pytest
import torch

from profusion.stride import Stride, between, evaluated_at, step_of

SIGMAS = [16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.0]


def test_a_step_is_a_noise_level():
    assert [step_of(sigma, SIGMAS) for sigma in SIGMAS] == list(range(8))
    assert step_of(17.0, SIGMAS) == 0 and step_of(8.0 * (1 + 1e-6), SIGMAS) == step_of(8.0 * (1 - 1e-6), SIGMAS) == 1
    assert step_of(7.0, SIGMAS) == 1 and step_of(0.1, SIGMAS) == 6


@pytest.mark.parametrize(
    "steps, every, expected",
    [
        (20, 5, [0, 6, 12, 18]),
        (20, 4, [0, 4, 9, 14, 18]),
        (25, 5, [0, 6, 12, 17, 23]),
        (8, 5, [0, 6]),
        (4, 8, [0, 2]),
        (2, 8, [0, 1]),
        (1, 3, [0]),
        (5, 1, [0, 1, 2, 3, 4]),
    ],
)
def test_evaluations_are_spread_from_the_first_step_to_the_last_but_one(steps, every, expected):
    assert evaluated_at(steps, every) == expected


def test_more_evaluations_are_never_fewer():
    for steps in range(1, 60):
        counts = [len(evaluated_at(steps, every)) for every in range(1, 9)]
        assert counts == sorted(counts, reverse=True) and counts[0] == steps


def due_at(every, calls):
    stride, found = Stride(every, SIGMAS), []
    for sigma in calls:
        found.append(stride.due(sigma))
        if found[-1]:
            stride.keep(sigma, [torch.ones(1)], [torch.zeros(1)])
    return found


def test_one_call_a_step():
    assert due_at(1, SIGMAS[:-1]) == [True] * 7
    assert due_at(3, SIGMAS[:-1]) == [True, False, True, False, False, True, False]


def test_several_calls_a_step():
    """Heun's: at a step's begin and at its end, which is the next one's begin."""
    calls = [SIGMAS[0], *(level for level in SIGMAS[1:-1] for _ in range(2))]
    assert due_at(3, calls) == [True, False, False, True, True, *[False] * 4, True, True, False, False]
    middles = [level for first in SIGMAS[:-2] for level in (first, first * 0.8)]
    assert due_at(3, middles) == [True, True, False, False, True, True, *[False] * 4, True, True]


def test_a_sampler_that_leaves_levels_out_or_goes_back():
    assert due_at(2, [16.0, 1.5, 0.3]) == [True, True, True]
    assert due_at(3, [16.0, 2.0, 8.0, 1.0]) == [True, True, True, True]


def test_between_c_is_f_and_the_last_difference_carried_on():
    stride, generator = Stride(2, SIGMAS), torch.manual_seed(0)
    (own, plain, later, further), pictures = torch.randn(4, 2, 4, 8, 8, generator=generator), (1, 2)
    assert stride.due(16.0, pictures)
    stride.keep(16.0, [own, plain], [plain, plain], pictures)
    assert not stride.due(8.0, pictures) and stride.due(8.0)
    found = stride.between(8.0, [later, later], pictures)
    assert torch.equal(found[0], later + (own - plain)) and torch.equal(found[1], later)
    stride.keep(4.0, [further, plain], [plain, plain], pictures)
    found = stride.between(2.0, [later, later], pictures)
    torch.testing.assert_close(found[0], later + (further - plain) + (further - own) / 2)
    assert torch.equal(found[1], later)
    both = between([later], [further - plain], [own - plain], 0.5)
    assert torch.equal(found[0], both[0])


def test_a_difference_that_grows_evenly_is_met():
    stride, plain = Stride(3, SIGMAS), torch.randn(4, generator=torch.manual_seed(0))
    for step, sigma in enumerate(SIGMAS[:-1]):
        own = plain + 0.1 * step
        if stride.due(sigma):
            stride.keep(sigma, [own], [plain])
        elif step > 3:
            torch.testing.assert_close(stride.between(sigma, [plain])[0], own)


def test_of_several_calls_in_a_step_the_last_counts():
    stride, plain = Stride(2, SIGMAS), torch.zeros(1)
    for sigma, own in ((16.0, 1.0), (4.0, 5.0), (4.0, 3.0)):
        stride.keep(sigma, [plain + own], [plain])
    assert stride.between(2.0, [plain])[0] == 3.0 + (3.0 - 1.0) / 2
    stride.keep(16.0, [plain + 7.0], [plain])  # a sampler that goes back begins anew
    assert stride.between(8.0, [plain])[0] == 7.0


def test_every_is_one_or_more():
    with pytest.raises(ValueError, match="give 1, for each step, or more"):
        Stride(0)
