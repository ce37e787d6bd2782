"""Ctrl-C, SIGTERM and SIGHUP, gathered: in the middle of a training's step, half of what it learns would have moved."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

TOGETHER = 2.0  # seconds: what stops programs may send both
NUMBERS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]  # Windows has no SIGHUP, which a closed terminal sends


@contextlib.contextmanager
def gathered() -> Iterator[list[int]]:
    """The signals so far, in a list that grows. One that comes TOGETHER seconds after the first raises
    KeyboardInterrupt at once: somebody does not want to wait for the step.

    Outside the main thread, which alone is told of signals, the list stays empty.
    """
    signals: list[int] = []
    times: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def gather(number: int, _: FrameType | None) -> None:
        signals.append(number)
        times.append(time.monotonic())
        if times[-1] - times[0] > TOGETHER:
            raise KeyboardInterrupt

    # nohup and shells have some ignored
    numbers = [number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, gather) for number in numbers]
    try:
        yield signals
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
