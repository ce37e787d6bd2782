"""What every training stage shares: deterministic seeds, EMA, a cosine schedule, and checkpoints that resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .muon import Muon


@dataclass
class TrainingStage:
    """A loop of `steps` optimiser steps over `modules`, checkpointed every `save_seconds` under `path`."""

    name: str
    modules: nn.ModuleDict
    steps: int
    path: Path
    learning_rate: float = 2e-3
    matrix_rate: float = 0.02
    warmup: int = 30
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    save_seconds: float = 120.0
    seed: int = 0
    ema: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        named = [(name, value) for name, value in self.modules.named_parameters() if value.requires_grad]
        matrices = [value for name, value in named if value.ndim >= 2 and "embedding" not in name]
        others = [value for name, value in named if value.ndim < 2 or "embedding" in name]
        adam = torch.optim.AdamW(others, lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=self.weight_decay)
        self.optimizers = [Muon(matrices, lr=self.matrix_rate, weight_decay=self.weight_decay), adam]
        self._peaks = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.ema = {name: value.detach().clone() for name, value in self.modules.state_dict().items()}

    def rate(self, step: int) -> float:
        """Linear warm-up, then one uninterrupted cosine to 1 % of the peak."""
        progress = step / self.steps
        return min(1.0, (step + 1) / self.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    def run(self, loss_of: Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]) -> None:
        """Train to the end, from the checkpoint if there is one; then put the EMA weights into the modules."""
        step, started, saved = self._resume(), time.monotonic(), time.monotonic()
        first, totals = step, {}
        while step < self.steps:
            for group, peak in zip(self._groups(), self._peaks, strict=True):
                group["lr"] = peak * self.rate(step)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            loss, parts = loss_of(step, generator)
            if not torch.isfinite(loss):
                raise RuntimeError(
                    f"{self.name}: loss is {loss.item()} at step {step}; the last checkpoint is {self.path}"
                )
            self.modules.zero_grad(set_to_none=True)
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            step += 1
            self._update_ema(step)
            for key, value in {"loss": loss.item(), **parts}.items():
                totals[key] = totals.get(key, value) * 0.98 + value * 0.02
            if step % 50 == 0 or step == self.steps:
                pace = (time.monotonic() - started) / (step - first)
                shown = "  ".join(f"{key} {value:.4f}" for key, value in totals.items())
                print(
                    f"{self.name} {step}/{self.steps}  {shown}  {pace:.2f} s/step  "
                    f"{pace * (self.steps - step) / 60:.1f} min left",
                    flush=True,
                )
            if time.monotonic() - saved > self.save_seconds:
                self._save(step)
                saved = time.monotonic()
        if step > first:
            self._save(step)
        self.modules.load_state_dict(self.ema)

    def _groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def _update_ema(self, step: int) -> None:
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        for name, value in self.modules.state_dict().items():
            if value.is_floating_point():
                self.ema[name].lerp_(value, 1 - decay)

    def _save(self, step: int) -> None:
        temporary = self.path.with_suffix(".partial")
        state = {
            "step": step,
            "modules": self.modules.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "ema": self.ema,
        }
        torch.save(state, temporary)
        temporary.replace(self.path)

    def _resume(self) -> int:
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        self.modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema = state["ema"]
        return state["step"]
