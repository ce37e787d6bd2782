"""How long things take beside each other: in one process, in turns, by the median."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def interleaved(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each task in each round. All tasks take turns, so that a machine that slows down slows all of them; a
    first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for counted in [False] + [True] * rounds:
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            if counted:
                times[name].append(time.perf_counter() - started)
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
