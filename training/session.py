"""One sitting of a training: its folder and device, when it must stop, and how much is left of the whole."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .recipe import SECONDS_A_STEP, STAGES, Recipe


class Stopped(Exception):
    """The sitting is over before the training is: its time is up, or it was asked to stop. All is saved."""


@dataclass
class Session:
    """Where and on what to train; `minutes` is how long at most, from now on."""

    work: Path
    recipe: Recipe = Recipe()
    device: torch.device = torch.device("cpu")
    minutes: float | None = None
    save_seconds: float = 60.0
    sheet_scenes: int = 16
    sheet_steps: int = 30
    asked_to_stop: bool = False
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)

    @property
    def over(self) -> bool:
        """Whether to stop now."""
        late = self.minutes is not None and time.monotonic() - self.began > 60 * self.minutes
        return late or self.asked_to_stop

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGINT ask for a stop at the next step; a second SIGINT stops at once."""

        def ask(number: int, frame) -> None:
            if self.asked_to_stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked_to_stop = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def autocast(self) -> AbstractContextManager:
        """bfloat16 for convolutions and matrix products."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor on the device; pictures and latents channels-last, as their convolutions want them."""
        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        return tensor.to(self.device).contiguous(memory_format=layout)

    def minutes_left(self, stage: str, step: int, pace: float | None) -> float:
        """Minutes to the end of everything, if each later stage is slower or quicker than estimated as this one is."""
        expected = SECONDS_A_STEP[stage]
        pace = expected if pace is None else pace
        later = STAGES[STAGES.index(stage) + 1 :]
        rest = sum(SECONDS_A_STEP[name] * self.recipe.steps(name) for name in later)
        return (pace * (self.recipe.steps(stage) - step) + rest * pace / expected) / 60

    def say(self, stage: str, step: int, pace: float | None, shown: str = "") -> None:
        """One line of progress."""
        speed = "" if pace is None else f"  {pace:.3f} s/step"
        left = f"{self.minutes_left(stage, step, pace):.0f} min left of all"
        print(
            f"{time.strftime('%H:%M:%S')} {stage} {step}/{self.recipe.steps(stage)}{shown}{speed}  {left}", flush=True
        )
