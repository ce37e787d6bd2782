"""The one training loop. A method adds what it draws, its loss, and what learns.

A step draws a batch from a generator that is seeded by the run's seed and the step alone, evaluates the loss, leaves
its gradient in the parameters and lets AdamW move them. So a run that stopped after any whole step, and was restored
from `TrainingLoop.state`, goes on bit for bit.

The loss is multiplied by a scale before it is differentiated, and the gradient divided by it after, so that float16
models neither round small gradients to zero nor overflow.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from .keeping import Partial
from .problems import Explained

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, by torch's names
_SEED_STRIDE = 1_000_003
_SAME_LOSS = 1e-3  # relative: GPUs do not round alike every time

SCALE_FACTOR = 16.0  # a power of two: in float32 no scale changes a bit of the gradient
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-16, 2.0**32
GROWTH_INTERVAL = 50  # steps


class TrainingError(Explained, RuntimeError):
    """Training cannot start or go on. The message says why and what to do."""


class NoGradientError(TrainingError):
    """No gradient reaches what is to be learned."""


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
    may_be_automatic: ClassVar[bool] = False  # whether 0 is a learning rate: one that the method finds itself

    def __post_init__(self) -> None:
        check_whole(self, "steps", "batch_size", "seed")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: train at least one")
        automatic = self.may_be_automatic and self.learning_rate == 0
        if not automatic and not 0 < self.learning_rate <= self.largest_rate:
            raise ValueError(
                f"learning_rate={self.learning_rate} must lie in (0, {self.largest_rate:g}]; {self.usual_rates} is "
                f"usual{', 0 is automatic' * self.may_be_automatic}"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")


def check_whole(options: Any, *fields: str) -> None:
    """Raise ValueError unless these fields are whole numbers: NaN is neither too small nor too large."""
    for field in fields:
        value = getattr(options, field)
        if not isinstance(value, Integral):
            raise ValueError(f"{field}={value} must be a whole number")


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
        # A float16 model would round the gradient of a mean, this much smaller than a sum's, to zero on the way back.
        self.loss_scale = self._first_scale = 2.0 ** math.floor(math.log2(options.batch_size * numbers))
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

    def prepare(self) -> None:  # noqa: B027 (most methods need nothing)
        """What has to be known of the model before the first step here, where it can be evaluated."""

    def after_step(self) -> None:  # noqa: B027
        """What is to be done once a step has moved the parameters, such as keeping them within bounds."""

    def why_ended(self) -> str:
        """Why there is nothing more to learn, in words; empty while there is."""
        return ""

    def batch(self) -> Any:
        """What this step trains on. It depends on the seed and the step only, so that a resumed training draws
        alike."""
        return self.draw(generator_of(self.options.seed * _SEED_STRIDE + self.step))

    def steps(self, partial: Partial | None = None) -> Iterator[float]:
        """Train to the end, yielding each step's loss; stop asking and the training stops after the last whole step.

        partial: the file that is written now and then meanwhile. Ends before the last step where `why_ended` says so.
        Raises TrainingError on a loss that is not finite; what was learned before it is kept.
        """
        if self.step < self.options.steps:
            self.prepare()
        while self.step < self.options.steps and not self.why_ended():
            loss = self._one_step()
            if partial is not None:
                partial.after_step()
            yield loss

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
            kept |= {f"{kind}.{name}": moments[kind].detach().cpu() for kind in MOMENTS if moments}
        return kept

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state()` was taken; the parameters must be those of that moment."""
        self.step = int(state["step"])
        self.losses = state["losses"].tolist() if "losses" in state else []
        if "loss_scale" in state:
            self.loss_scale = state["loss_scale"].item()
        with torch.inference_mode(False):
            for name, parameter in self._learned().items():
                moments = {kind: state.get(f"{kind}.{name}") for kind in MOMENTS}
                if moments["exp_avg"] is not None:
                    moments = {kind: value.to(parameter, copy=True) for kind, value in moments.items()}
                    self._optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}

    def begins_like(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the first step here has the loss that the first one of a state had; to be asked before any step.

        Where it has not, something else is trained, or with something else, such as another patch on the model.
        """
        if self.step or "losses" not in state:
            return True
        with torch.inference_mode(False), torch.no_grad():
            loss = self.loss(self.batch()).item()
        return math.isclose(loss, state["losses"][0].item(), rel_tol=_SAME_LOSS)

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
        self.after_step()
        return value

    def _differentiate(self) -> float:
        """Leave the loss's gradient, clipped, in the parameters; returns the loss.

        A loss scale that is too large for this step, or too small, is changed and the same batch evaluated again.
        """
        batch, overflowed_at, raised = self.batch(), math.inf, False
        scale = grown_scale(self.loss_scale, self.step, self._first_scale)
        while True:
            gradient = self._gradient(self.loss(batch), scale)
            if not math.isfinite(gradient.loss):
                rate = self.options.learning_rate
                advice = f". Lower the learning rate ({rate}), or" if rate else ":"
                raise TrainingError(
                    f"the loss is {gradient.loss} at step {self.step}{advice} use a model in float32 or bfloat16"
                )
            if not gradient.finite:
                overflowed_at, scale = scale, scale / SCALE_FACTOR
                if scale < SMALLEST_SCALE:
                    raise TrainingError(self._overflow())
            elif gradient.missing is not None:
                larger = max(scale * SCALE_FACTOR, self._first_scale)
                if larger >= overflowed_at and not raised:
                    raise TrainingError(self._overflow())  # too much at one scale, nothing at the next
                if not gradient.attached or larger >= overflowed_at or larger > LARGEST_SCALE:
                    raise NoGradientError(f"no gradient reaches {gradient.missing.name}: {gradient.missing.because}")
                scale, raised = larger, True
            else:
                self.loss_scale = scale
                self._unscale_and_clip()
                return gradient.loss

    def _gradient(self, loss: Tensor, scale: float) -> _Gradient:
        """Leave the gradient of scale * loss in the parameters. The device is waited for once."""
        for parameter in self._learned().values():
            parameter.grad = None
        attached = loss.requires_grad
        if attached:
            (loss * scale).backward()
        totals = [_total(group.parameters.values(), loss) for group in self.groups]  # of each group, NaN if one is
        value, *sizes = torch.stack([loss.detach().float(), *totals]).tolist()
        missing = next((group for group, size in zip(self.groups, sizes, strict=True) if not size), None)
        return _Gradient(value, all(math.isfinite(size) for size in sizes), missing, attached)

    def _unscale_and_clip(self) -> None:
        gradients = [item.grad for item in self._learned().values() if item.grad is not None]
        torch._foreach_div_(gradients, self.loss_scale)
        if math.isfinite(self.clip):
            norm = math.hypot(*torch.stack(torch._foreach_norm(gradients)).tolist())
            if norm > self.clip:
                torch._foreach_mul_(gradients, self.clip / norm)

    def _overflow(self) -> str:
        return f"the gradient overflowed at step {self.step}: use a model in float32 or bfloat16"


@dataclass(frozen=True)
class _Gradient:
    """What is known of a gradient: the loss it is of, whether all of it is finite, a group that has none, and whether
    the loss depends on anything that learns."""

    loss: float
    finite: bool
    missing: Group | None
    attached: bool


def _total(parameters: Iterable[Tensor], like: Tensor) -> Tensor:
    """The sum of |gradient| of parameters, a scalar on the device of `like`; 0 where there is none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=like.device)
    # Not the largest: MPS overlooks NaN in a maximum.
    return torch.stack(torch._foreach_norm(gradients, 1)).sum().to(like.device)


def grown_scale(scale: float, step: int, first: float) -> float:
    """The loss scale to begin a step with: one that fell tries to grow back, now and then.

    As torch's GradScaler, but on a grid of steps: so what the scale will be needs no counter in a file.
    """
    return min(scale * SCALE_FACTOR, first) if scale < first and step % GROWTH_INTERVAL == 0 else scale


def generator_of(number: int) -> torch.Generator:
    """A CPU generator of a whole number of any size and sign."""
    return torch.Generator().manual_seed(number % 2**63)


def pauses(first: int, last: int, every: int) -> Iterator[int]:
    """The steps at which a training pauses, to draw a sample perhaps: multiples of `every` (0: none), and the last."""
    if every:
        yield from range(first - first % every + every, last, every)
    yield last
