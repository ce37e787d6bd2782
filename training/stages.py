"""What every training stage shares: deterministic seeds, EMA, a cosine schedule, and checkpoints that resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .muon import Muon
from .session import Session, Stopped

Loss = Callable[[int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
"""Of a step and its own CPU generator: the loss, and what to show of it."""


@dataclass
class TrainingStage:
    """A loop of optimiser steps over `modules`, which are on the session's device; it resumes bit for bit.

    All randomness of a step comes from the seed and the step's number, so a checkpoint holds none.
    """

    name: str
    modules: nn.ModuleDict
    session: Session
    learning_rate: float = 2e-3
    matrix_rate: float = 0.02
    warmup: int = 30
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    seed: int = 0
    watch: Callable[[int], None] | None = (
        None  # called every recipe.sheet_every steps, with the averaged weights in place
    )
    ema: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        named = [(name, value) for name, value in self.modules.named_parameters() if value.requires_grad]
        matrices = [value for name, value in named if value.ndim >= 2 and "embedding" not in name]
        others = [value for name, value in named if value.ndim < 2 or "embedding" in name]
        adam = torch.optim.AdamW(others, lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=self.weight_decay)
        self.optimizers = [Muon(matrices, lr=self.matrix_rate, weight_decay=self.weight_decay), adam]
        self._peaks = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.ema = {name: value.detach().clone() for name, value in self.modules.state_dict().items()}

    @property
    def steps(self) -> int:
        return self.session.recipe.steps(self.name)

    @property
    def path(self) -> Path:
        return self.session.work / f"{self.name}.pt"

    def rate(self, step: int) -> float:
        """Linear warm-up, then one uninterrupted cosine to 1 % of the peak."""
        progress = step / self.steps
        return min(1.0, (step + 1) / self.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    def run(self, loss_of: Loss, finish: Callable[[], None] | None = None) -> bool:
        """Train to the end, from the checkpoint if there is one, and put the averaged weights into the modules.

        finish: may change the modules once more before the end is saved. False if all that had been done before. Raises
        Stopped, all saved, when the session is over.
        """
        step = self._resume()
        if step == self.steps:
            self.modules.load_state_dict(self.ema)
            return False
        totals: dict[str, Tensor] = {}
        first, started, saved, shown = step, time.monotonic(), time.monotonic(), time.monotonic()
        while step < self.steps:
            if self.session.over:
                self._save(step, totals)
                raise Stopped(f"{self.name} stopped at step {step} of {self.steps}")
            parts = self._step(step, loss_of)
            step += 1
            for key, value in parts.items():
                totals[key] = value if key not in totals else torch.lerp(totals[key], value, 0.02)
            now = time.monotonic()
            if now - shown > 20 or step == self.steps:
                words = "".join(f"  {key} {value.item():.4f}" for key, value in totals.items())
                self.session.say(self.name, step, (now - started) / (step - first), words)
                shown = now
            if now - saved > self.session.save_seconds and step < self.steps:
                self._save(step, totals)
                saved = time.monotonic()
            if self.watch and step % self.session.recipe.sheet_every == 0 and step < self.steps:
                with self.averaged():
                    self.watch(step)
        self._finish(totals, finish)
        return True

    def _step(self, step: int, loss_of: Loss) -> dict[str, Tensor]:
        for group, peak in zip(self._groups(), self._peaks, strict=True):
            group["lr"] = peak * self.rate(step)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        with self.session.autocast():
            loss, parts = loss_of(step, generator)
        self.modules.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self._update_ema(step + 1)
        return {key: value.detach().float() for key, value in {"loss": loss, **parts}.items()}

    def _groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def _update_ema(self, step: int) -> None:
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        state = self.modules.state_dict()
        names = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.ema[name] for name in names], [state[name] for name in names], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, inside."""
        trained = {name: value.clone() for name, value in self.modules.state_dict().items()}
        self.modules.load_state_dict(self.ema)
        try:
            yield
        finally:
            self.modules.load_state_dict(trained)

    def _save(self, step: int, totals: dict[str, Tensor]) -> None:
        if not all(torch.isfinite(value) for value in totals.values()):
            raise RuntimeError(f"{self.name}: the loss is no number at step {step}; the last checkpoint is {self.path}")
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        self._write({"step": step, "modules": self.modules.state_dict(), "optimizers": optimizers, "ema": self.ema})

    def _finish(self, totals: dict[str, Tensor], finish: Callable[[], None] | None) -> None:
        if not all(torch.isfinite(value) for value in totals.values()):
            raise RuntimeError(f"{self.name}: the loss is no number at the end; the last checkpoint is {self.path}")
        self.modules.load_state_dict(self.ema)
        if finish:
            finish()
        self._write({"step": self.steps, "ema": self.modules.state_dict()})

    def _write(self, state: dict) -> None:
        temporary = self.path.with_suffix(".partial")
        torch.save(state, temporary)
        temporary.replace(self.path)

    def _resume(self) -> int:
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True, map_location=self.session.device)
        self.ema = state["ema"]
        if state["step"] < self.steps:
            self.modules.load_state_dict(state["modules"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        return state["step"]
