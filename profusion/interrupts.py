"""Ctrl-C and SIGTERM, gathered: in the middle of a training's step, half of what it learns would have moved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def gathered() -> Iterator[list[int]]:
    """The signals so far, in a list that grows. The second one is not waited for: it raises KeyboardInterrupt.

    Outside the main thread, which alone is told of signals, the list stays empty.
    """
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def gather(number: int, _: FrameType | None) -> None:
        signals.append(number)
        if len(signals) > 1:
            raise KeyboardInterrupt

    before = [signal.signal(number, gather) for number in NUMBERS]
    try:
        yield signals
    finally:
        for number, handler in zip(NUMBERS, before, strict=True):
            signal.signal(number, handler)
