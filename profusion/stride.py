"""A cheaper customised stream: C at one step in n alone, and between them what it differs by from F, carried on.

With d = D_C - D_F, of denoised predictions, at the two steps k < l at which C was last evaluated, at a step i between

    D_C = D_F + d_l + (d_l - d_k) (i - l) / (l - k)

and D_F + d_l before there are two. What C draws otherwise than F is settled early, changes slowly and ends as the
difference of the two pictures, so that it is not in proportion to the noise. n = 1 is the paper's scheme (arXiv
2404.14007, section 4).

One n-th of the steps, twice at least, spread evenly from the first to the last but one: of as many evaluations, those
whose last one is early leave the picture further off (of 20 steps, 0, 5, 10, 15 by half as much again as 0, 6, 12, 18).

A step is one of the run's noise levels, not a call of the model: samplers call it once, twice or thrice a step, and at
the steps that are C's it is evaluated at each of their calls.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

EVERY = 5  # as a new node has it, see benchmarks/infusion_rows.py
MOST = 8  # steps: beyond, C is hardly looked at
_SAME = 1e-4  # relative: samplers that compute with the logarithm of a level have it back so exactly


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """Which of a run's falling noise levels has last been reached at a level: 0 is the first, and what is above it."""
    return sum(level >= sigma * (1 - _SAME) for level in sigmas[1:])


def evaluated_at(steps: int, every: int) -> list[int]:
    """Of a run's steps, the first being 0, those at which C is evaluated."""
    if every == 1 or steps < 3:
        return list(range(max(steps, 1)))
    count = max(2, math.ceil(steps / every))
    return sorted({round(index * (steps - 2) / (count - 1)) for index in range(count)})


def between(
    foundation: Sequence[Tensor],
    last: Sequence[Tensor],
    before: Sequence[Tensor] | None = None,
    ahead: float = 0.0,
) -> list[Tensor]:
    """D_C = D_F + d_l + (d_l - d_k) ahead, of each group of conditionings: d_l is `last`, d_k `before`, None for none.

    ahead: (i - l) / (l - k).
    """
    if before is None or not ahead:
        return [plain + one for plain, one in zip(foundation, last, strict=True)]
    of_both = zip(foundation, last, before, strict=True)
    return [plain + (one + (one - other) * ahead) for plain, one, other in of_both]


@dataclass
class _Evaluated:
    step: int
    differences: list[Tensor]


class Stride:
    """When C is evaluated in one run, and what it is meanwhile.

    every: at one step in so many; 1 is at each. sigmas: the run's noise levels, falling. What is kept is that of some
    pictures of a batch, `of`, where not all are evaluated at once. Raises ValueError unless every is 1 or more.
    """

    def __init__(self, every: int, sigmas: Sequence[float] = ()):
        if every < 1:
            raise ValueError(f"every={every}: give 1, for each step, or more")
        self.every, self._sigmas = every, list(sigmas)
        self._at = evaluated_at(len(self._sigmas) - 1, every)
        self._last: dict[Hashable, list[_Evaluated]] = {}  # two at most, the last one first

    def due(self, sigma: float, of: Hashable = None) -> bool:
        """Whether C is to be evaluated at a noise level: not since the last of its steps, or in this very step."""
        if self.every == 1 or of not in self._last:
            return True
        step, last = step_of(sigma, self._sigmas), self._last[of][0].step
        return step == last or bisect_right(self._at, step) != bisect_right(self._at, last)

    def keep(
        self, sigma: float, customised: Sequence[Tensor], foundation: Sequence[Tensor], of: Hashable = None
    ) -> None:
        """Note what C differs by from F, as both were evaluated."""
        if self.every > 1:
            differences = [own - plain for own, plain in zip(customised, foundation, strict=True)]
            one = _Evaluated(step_of(sigma, self._sigmas), differences)
            before = [other for other in self._last.get(of, ()) if other.step < one.step]
            self._last[of] = [one, *before[:1]]

    def between(self, sigma: float, foundation: Sequence[Tensor], of: Hashable = None) -> list[Tensor]:
        """C's predictions at a noise level where it is not due, from F's."""
        last, *before = self._last[of]
        if not before:
            return between(foundation, last.differences)
        ahead = (step_of(sigma, self._sigmas) - last.step) / (last.step - before[0].step)
        return between(foundation, last.differences, before[0].differences, ahead)
