"""The one training loop. A method adds what it draws, its loss, and what learns.

A step draws a batch from a generator that is seeded by the run's seed and the step alone, evaluates the loss, leaves
its gradient in the parameters and lets AdamW move them. So a run that stopped after any whole step, and was restored
from `TrainingLoop.state`, goes on bit for bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, by torch's names
_SEED_STRIDE = 1_000_003


class TrainingError(RuntimeError):
    """Training cannot start or go on. The message says why and what to do."""


@dataclass(frozen=True)
class LoopOptions:
    """How any method is trained. `steps` counts from nothing: a resumed training does what is left of them.

    learning_rate: AdamW's. batch_size: rows a step. seed: of everything that is drawn.
    """

    steps: int
    learning_rate: float
    batch_size: int
    seed: int

    largest_rate: ClassVar[float] = 1.0
    usual_rates: ClassVar[str] = "1e-5 to 1e-3"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: train at least one")
        if not 0 < self.learning_rate <= self.largest_rate:
            raise ValueError(
                f"learning_rate={self.learning_rate} must lie in (0, {self.largest_rate:g}]; {self.usual_rates} is usual"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")


@dataclass(frozen=True)
class Group:
    """Parameters that learn together, by name.

    name: what a message calls them. because: why no gradient may reach them, and what to do. factor: their learning
    rate as a multiple of the loop's.
    """

    name: str
    parameters: Mapping[str, Tensor]
    because: str
    factor: float = 1.0


class TrainingLoop(ABC):
    """A training run: `steps()` does the work, `state()` and `restore()` interrupt it without a trace.

    numbers: how many numbers a row's loss is a mean over. clip: the largest norm of the whole gradient. Parameters,
    loss and optimizer are float32, whatever the model computes in.
    """

    def __init__(self, options: LoopOptions, groups: Sequence[Group], numbers: int, clip: float = math.inf):
        self.options, self.groups, self.clip = options, list(groups), clip
        self.step = 0
        self.losses: list[float] = []
        # The gradient of a mean is this much smaller than of a sum, which float16 would round to nothing.
        self.loss_scale = 2.0 ** math.floor(math.log2(options.batch_size * numbers))
        with torch.inference_mode(False):  # a host may call in inference mode, whose tensors autograd does not take
            for parameter in self._learned().values():
                parameter.requires_grad_(True)
            parts = [{"params": list(group.parameters.values()), "factor": group.factor} for group in self.groups]
            self._optimizer = torch.optim.AdamW(parts, lr=options.learning_rate, weight_decay=0.0)

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Any:
        """A batch; all chance in it comes from the generator."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch, a float32 scalar that autograd may come from."""

    def learning_rate(self) -> float:
        """The learning rate of this step."""
        return self.options.learning_rate

    def batch(self) -> Any:
        """What this step trains on. It depends on the seed and the step only, so that a resumed training draws alike."""
        return self.draw(seeded(self.options.seed * _SEED_STRIDE + self.step))

    def steps(self) -> Iterator[float]:
        """Train to the end, yielding each step's loss; stop asking and the training stops after the last whole step.

        Raises TrainingError on a loss that is not finite; what was learned before it is kept.
        """
        while self.step < self.options.steps:
            yield self._one_step()

    def mean_loss(self, last: int) -> float:
        """The mean of the last losses; 0 where there are none."""
        recent = self.losses[-last:]
        return sum(recent) / max(1, len(recent))

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors and the course so far: with the parameters, all that the next step depends on."""
        kept = {"loss_scale": torch.tensor([self.loss_scale], dtype=torch.float64), "step": torch.tensor([self.step])}
        if self.losses:
            kept["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        for name, parameter in self._learned().items():
            moments = self._optimizer.state.get(parameter, {})
            kept |= {f"{kind}.{name}": moments[kind].detach().cpu() for kind in _MOMENTS if moments}
        return kept

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state()` was taken; the parameters must be those of that moment."""
        self.step = int(state["step"])
        self.losses = state["losses"].tolist() if "losses" in state else []
        if "loss_scale" in state:
            self.loss_scale = state["loss_scale"].item()
        with torch.inference_mode(False):
            for name, parameter in self._learned().items():
                moments = {kind: state.get(f"{kind}.{name}") for kind in _MOMENTS}
                if moments["exp_avg"] is not None:
                    moments = {kind: value.to(parameter, copy=True) for kind, value in moments.items()}
                    self._optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}

    def _learned(self) -> dict[str, Tensor]:
        return {name: value for group in self.groups for name, value in group.parameters.items()}

    def _one_step(self) -> float:
        # Autograd must be on even inside a host that runs its nodes in inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            for part in self._optimizer.param_groups:
                part["lr"] = self.learning_rate() * part["factor"]
            value = self._differentiate()
            self._optimizer.step()
        self.step += 1
        self.losses.append(value)
        return value

    def _differentiate(self) -> float:
        """Leave the loss's gradient, clipped, in the parameters; returns the loss."""
        batch, parameters = self.batch(), list(self._learned().values())
        value, self.loss_scale = differentiate(
            lambda: self.loss(batch),
            parameters,
            self.loss_scale,
            f"at step {self.step}",
            self.options.learning_rate,
            f"no gradient reaches {self.groups[0].name}: {self.groups[0].because}",
        )
        for group in self.groups:
            if not any(item.grad is not None and item.grad.any() for item in group.parameters.values()):
                raise TrainingError(f"no gradient reaches {group.name}: {group.because}")
        if math.isfinite(self.clip):
            gradients = [item.grad for item in parameters if item.grad is not None]
            norm = math.hypot(*(gradient.norm().item() for gradient in gradients))
            for gradient in gradients:
                gradient.mul_(min(1.0, self.clip / norm))
        return value


def seeded(number: int) -> torch.Generator:
    """A CPU generator of a whole number of any size and sign."""
    return torch.Generator().manual_seed(number % 2**63)


def differentiate(
    loss_of: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    scale: float,
    when: str,
    learning_rate: float,
    without_gradient: str,
) -> tuple[float, float]:
    """Leave a loss's gradient in the parameters' `grad`; returns the loss, and the scale that it could be multiplied by.

    A float16 model would round the gradient of a mean over many cells to zero, so the loss is multiplied by `scale`, a
    power of two, on the way back, which in float32 changes no bit. Where that overflows, a smaller one is taken and
    `loss_of` evaluated again. Raises TrainingError: `without_gradient` is what to say where none arrives.
    """
    while True:
        loss = loss_of()
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} {when}. Lower the learning rate ({learning_rate}), or use a model in float32 or "
                "bfloat16"
            )
        for parameter in parameters:
            parameter.grad = None
        if loss.requires_grad:
            (loss * scale).backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not any(gradient.any() for gradient in gradients):
            raise TrainingError(without_gradient)
        if all(torch.isfinite(gradient).all() for gradient in gradients):
            for gradient in gradients:
                gradient /= scale
            return value, scale
        if scale <= 2**-16:
            raise TrainingError(f"the gradient overflowed {when}: use a model in float32 or bfloat16")
        scale /= 16
