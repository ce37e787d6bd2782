"""The arithmetic of the benchmark that says what a start from S* saves."""

import pytest

from benchmarks.residual_seed import steps_needed


@pytest.mark.parametrize(
    ("target", "rising", "expected"),
    [(0.1, True, 0.0), (0.4, True, 15.0), (0.7, True, 40.0), (0.9, True, None), (0.65, False, 0.0), (0.1, False, None)],
)
def test_steps_needed_lie_between_those_that_were_measured(target, rising, expected):
    found = steps_needed([0, 10, 20, 40], [0.2, 0.3, 0.5, 0.7], target, rising)
    assert found == (None if expected is None else pytest.approx(expected))


def test_steps_needed_are_those_of_the_first_time():
    assert steps_needed([0, 10, 20, 30], [0.5, 0.3, 0.4, 0.1], 0.35, False) == pytest.approx(7.5)
