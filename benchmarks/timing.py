"""How long things take beside each other: in one process, in turns, by the median."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu: what this process computes, in all its threads; beside others on a busy CPU it is the truer one."""


def interleaved(tasks: Mapping[str, Callable[[], object]], rounds: int, clock: str = "wall") -> dict[str, list[float]]:
    """Seconds of each task in each round, by one of CLOCKS. All tasks take turns, so that a machine that slows down
    slows all of them; a first round is not counted."""
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for counted in [False] + [True] * rounds:
        for name, task in tasks.items():
            started = now()
            task()
            if counted:
                times[name].append(now() - started)
    return times


def against(times: Mapping[str, Sequence[float]], plain: str, pictures: int = 1) -> dict[str, dict[str, float]]:
    """Medians of the seconds a picture, and of the ratio to the `plain` task of the same round."""
    return {
        name: {
            "seconds": round(statistics.median(values) / pictures, 4),
            "times_plain": round(
                statistics.median(one / base for one, base in zip(values, times[plain], strict=True)), 3
            ),
        }
        for name, values in times.items()
    }
