"""PromptNet's training over any number of processes: torch's DDP, or FSDP2 where a network must be sharded.

A step is drawn for the *global* batch from the seed and the step alone, and each process takes its rows: so any number
of processes sees the same pictures, noise and prompt, the gradient is that of one process up to rounding, and a run
that is resumed, with as many processes or others, goes on as it would have.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..diffusion import training_sigmas
from ..loop import MOMENTS, TrainingError, check_whole, generator_of
from ..promptnet.training import PromptNetOptions, draw_noise, learning_rate_at
from .objective import Objective
from .ranks import Ranks, is_loss_of_a_process, lost

_SEED_STRIDE = 1_000_003
MOST_SKIPPED = 10  # steps in a row whose loss or gradient is not finite, before a training gives up


class GivenUp(TrainingError):
    """Too many steps in a row taught nothing."""


@dataclass(frozen=True)
class PretrainingOptions(PromptNetOptions):
    """How a PromptNet is trained at size; see `PromptNetOptions`. batch_size: of all processes together.

    micro: rows that a process evaluates at once; a step takes as many rounds as it needs (gradient accumulation).
    0 is all of its rows. ema: share of the average that is kept each step, 0 for no average. weight_decay: AdamW's.
    """

    micro: int = 0
    ema: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "micro")
        if self.micro < 0 or not 0 <= self.ema < 1 or not self.weight_decay >= 0:
            raise ValueError(
                f"micro={self.micro} and weight_decay={self.weight_decay} must not be negative, and ema={self.ema} "
                "must lie in [0, 1)"
            )


def rounds(options: PretrainingOptions, world: int) -> int:
    """Evaluations a step and process. Raises TrainingError where the batch cannot be shared out evenly."""
    rows, rest = divmod(options.batch_size, world)
    if rest or not rows:
        raise TrainingError(
            f"a batch of {options.batch_size} cannot be shared out to {world} processes: give a multiple of {world}"
        )
    micro = options.micro or rows
    if rows % micro:
        raise TrainingError(f"{rows} rows a process cannot be taken {micro} at a time: give a divisor of {rows}")
    return rows // micro


@dataclass(frozen=True)
class Step:
    """What a step did. loss: the mean over the global batch. norm: of the whole gradient, before it was clipped.
    skipped: why nothing was learned from it."""

    number: int
    loss: float
    norm: float
    learning_rate: float
    skipped: str | None = None


class Engine:
    """One training in this process: `take` makes a step together with the other processes.

    shard: whether parameters, gradients and moments are cut between the processes (torch's FSDP2). checkpointing:
    whether blocks are evaluated twice, so that little waits for the way back.
    """

    def __init__(
        self,
        objective: Objective,
        options: PretrainingOptions,
        ranks: Ranks,
        shard: bool = False,
        checkpointing: bool = False,
    ):
        self.objective, self.options, self.ranks = objective, options, ranks
        self.checkpointing = checkpointing
        self.step = self.skipped_in_a_row = 0
        self._rounds = rounds(options, ranks.world)
        self._sigmas = training_sigmas()
        self.network = objective.network.requires_grad_(True).train(False)
        self._wrapped = self._distributed(shard)
        self.parameters = dict(self.network.named_parameters())
        self._optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            fused=ranks.device.type == "cuda" and not shard,
        )
        self.average = (
            {name: value.detach().clone() for name, value in self.parameters.items()} if options.ema else None
        )

    def _distributed(self, shard: bool) -> nn.Module:
        if self.ranks.world == 1:
            return self.objective
        if not shard:
            ids = [self.ranks.device] if self.ranks.device.type == "cuda" else None
            return DistributedDataParallel(self.objective, device_ids=ids, gradient_as_bucket_view=True)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.ranks.device.type, (self.ranks.world,))
        for block in [*self.network.input_blocks, self.network.middle_block]:
            fully_shard(block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)
        return self.objective

    def take(self, latents: Tensor, image_tokens: Tensor) -> Step:
        """One step on this process's rows of the global batch: latents (rows, C, H, W), image tokens (rows, L, width).

        A loss or gradient that is not finite is not learned from. Raises TrainingError after MOST_SKIPPED of those in a
        row, and LostProcess where another process has gone.
        """
        try:
            return self._take(latents, image_tokens)
        except RuntimeError as error:
            if is_loss_of_a_process(error):
                raise lost(error) from error
            raise

    def _take(self, latents: Tensor, image_tokens: Tensor) -> Step:
        rate = learning_rate_at(self.step, self.options)
        for part in self._optimizer.param_groups:
            part["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._gradient(latents, image_tokens)
        norm = self._norm()
        mean = self.ranks.sums([loss])[0] / self.ranks.world
        skipped = None
        if math.isfinite(mean) and math.isfinite(norm):
            self._clip(norm)
            self._optimizer.step()
            self._follow()
            self.skipped_in_a_row = 0
        else:
            skipped = "the loss is not finite" if not math.isfinite(mean) else "the gradient is not finite"
            self.skipped_in_a_row += 1
            self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise GivenUp(
                f"{skipped} for {MOST_SKIPPED} steps in a row, up to step {self.step}; what was learned before is "
                f"kept. Lower the learning rate ({self.options.learning_rate}), or train without bfloat16, "
                "in another --out, with --start"
            )
        return Step(self.step, mean, norm, rate, skipped)

    def _gradient(self, latents: Tensor, image_tokens: Tensor) -> float:
        """Leave the gradient of this process's mean loss in the parameters (DDP and FSDP make the mean over all
        processes of it); returns that loss."""
        shape = tuple(latents.shape[1:])
        drawn = draw_noise(self.options, self._sigmas, shape, generator_of(self._seed()))
        rows = self.ranks.rows(self.options.batch_size)
        device, kind = self.ranks.device, next(iter(self.parameters.values())).dtype
        given = [
            values.to(device, kind, non_blocking=True).contiguous().chunk(self._rounds)
            for values in (latents, image_tokens, drawn.noise[rows], drawn.sigma[rows])
        ]
        total = torch.zeros((), device=device, dtype=kind)
        for index, parts in enumerate(zip(*given, strict=True)):
            last = index == self._rounds - 1
            with self._unsynchronised(not last), self._twice():
                loss = self._wrapped(*parts, drawn.prompt) / self._rounds
            with self._unsynchronised(not last):
                loss.backward()
            total += loss.detach()
        return total.item()

    def _twice(self) -> contextlib.AbstractContextManager:
        return self.objective.checkpointed() if self.checkpointing else contextlib.nullcontext()

    @contextlib.contextmanager
    def _unsynchronised(self, wanted: bool) -> Iterator[None]:
        """Gradients stay in this process until the last round."""
        if isinstance(self._wrapped, DistributedDataParallel) and wanted:
            with self._wrapped.no_sync():
                yield
        else:
            yield

    def _norm(self) -> float:
        gradients = [item.grad for item in self.parameters.values() if item.grad is not None]
        if not gradients:
            raise TrainingError("no gradient reaches PromptNet: it is frozen, or the base's networks leave none")
        norm = nn.utils.get_total_norm(gradients)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _clip(self, norm: float) -> None:
        if norm > self.options.clip:
            gradients = [item.grad for item in self.parameters.values() if item.grad is not None]
            torch._foreach_mul_(gradients, self.options.clip / norm)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the parameters; early on it follows quickly, as it has seen little."""
        if self.average is None:
            return
        kept = min(self.options.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - kept)

    def _seed(self) -> int:
        return self.options.seed * _SEED_STRIDE + self.step

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """While this lasts the network is its average, where there is one."""
        if self.average is None:
            yield
            return
        self._forget_whole()
        with torch.no_grad():
            own = {name: value.detach().clone() for name, value in self.parameters.items()}
            try:
                for name, value in self.parameters.items():
                    value.copy_(self.average[name])
                yield
            finally:
                for name, value in self.parameters.items():
                    value.copy_(own[name])
                self._forget_whole()

    def _forget_whole(self) -> None:
        """Have FSDP put parameters together anew: what no gradient went back through, it keeps whole for the next
        step, whatever its parts are by then."""
        for module in self.network.modules():
            if hasattr(module, "reshard"):
                module.reshard()

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on beside the parameters, whole and on the CPU.

        Every process must ask for it, as for `weights`, and the first alone has it: others would only hold copies.
        """
        kept = {"step": torch.tensor([self.step])}
        for name, parameter in self.parameters.items():
            moments = self._optimizer.state.get(parameter, {})
            kept |= {f"{kind}.{name}": self._whole(moments[kind]) for kind in MOMENTS if moments}
        if self.average is not None:
            kept |= {f"ema.{name}": self._whole(value) for name, value in self.average.items()}
        if self._optimizer.state:
            kept["updates"] = next(iter(self._optimizer.state.values()))["step"].detach().cpu().clone()
        return kept

    def weights(self, averaged: bool = False) -> dict[str, Tensor]:
        """The network's state dict, or its average, whole and on the CPU; see `state`."""
        found = {**self.network.state_dict(), **((self.average or {}) if averaged else {})}
        return {name: self._whole(value) for name, value in found.items()}

    def _whole(self, value: Tensor) -> Tensor:
        value = value.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value  # together with all processes
        return value.to("cpu", copy=True) if self.ranks.first else value.new_empty(0)

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Go on where `weights` and `state` were taken, by as many processes or others."""
        for name, value in self.network.state_dict().items():
            _fill(value, weights[name])
        self.step = int(state["step"])
        for name, parameter in self.parameters.items():
            if f"exp_avg.{name}" in state:
                moments = {kind: _like(parameter, state[f"{kind}.{name}"]) for kind in MOMENTS}
                updates = state["updates"].clone().to(parameter.device if self._fused() else "cpu")
                self._optimizer.state[parameter] = {"step": updates, **moments}
        if self.average is not None:
            for name, value in self.average.items():
                _fill(value, state.get(f"ema.{name}", weights[name]))
        self._forget_whole()

    def _fused(self) -> bool:
        return bool(self._optimizer.defaults.get("fused"))


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor placed as a parameter is."""
    found = torch.empty_like(parameter, requires_grad=False)
    _fill(found, value)
    return found


def _fill(place: Tensor, value: Tensor) -> None:
    if hasattr(place, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(place.device, place.dtype), place.device_mesh, place.placements)
    place.copy_(value)
