"""The processes of a training, as `torchrun` and `accelerate launch` start them: who this one is, and what they agree
on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from ..loop import TrainingError
from ..problems import Explained, why

MINUTES = 10  # that a process waits for the others; one that was killed is found out much sooner


class LostProcess(TrainingError):
    """Another process of the training ended, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them, on its device."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def rows(self, total: int) -> slice:
        """This process's rows of a global batch of so many, which `world` divides."""
        count = total // self.world
        return slice(self.rank * count, (self.rank + 1) * count)

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sums of these numbers over all processes. Raises LostProcess."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64 if self.device.type == "cpu" else torch.float32)
        total = total.to(self.device)
        with _answering():
            dist.all_reduce(total)
        return total.tolist()

    def gathered(self, thing: Any) -> list[Any]:
        """What each process gives, in their order, anything that can be pickled. Raises LostProcess."""
        if self.world == 1:
            return [thing]
        found: list[Any] = [None] * self.world
        with _answering():
            dist.all_gather_object(found, thing)
        return found

    def agree(self, problem: Exception | None) -> None:
        """Raise a problem of any process in all of them, so that none waits for one that has given up.

        Raises this process's own as it is, and TrainingError for another's.
        """
        words = self.gathered(None if problem is None else why(problem))
        if problem is not None:
            raise problem
        for rank, word in enumerate(words):
            if word is not None:
                raise TrainingError(f"process {rank} of {self.world} says: {word}")


@contextlib.contextmanager
def joined(device: str = "cpu", minutes: float = MINUTES) -> Iterator[Ranks]:
    """Join the other processes where torchrun started any, and leave them at the end.

    device: of torch; "cuda" becomes this process's own card. Raises TrainingError for a device that is not here, and
    LostProcess where the others cannot be found.
    """
    if dist.is_torchelastic_launched() and ":" in device:
        raise TrainingError(
            f"--device {device}: under torchrun each process takes a card of its own; give --device cuda"
        )
    if not dist.is_torchelastic_launched():
        yield Ranks(device=_there(device))
        return
    try:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    except (RuntimeError, ValueError) as error:
        raise LostProcess(
            f"the processes of this training could not find each other ({why(error)}). Start it with torchrun, which "
            "says where they meet"
        ) from error
    try:
        own = _there(f"cuda:{dist.get_node_local_rank(0)}" if device == "cuda" else device)
        yield Ranks(dist.get_rank(), dist.get_world_size(), own)
    finally:
        with contextlib.suppress(Exception):  # the others may be gone
            dist.destroy_process_group()


def _there(device: str) -> torch.device:
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"--device {device}: it is not here; leave it out to train on the CPU") from error
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Words for what a collective call raises where another process has gone."""
    try:
        yield
    except RuntimeError as error:  # torch's own kinds of it are RuntimeErrors
        raise lost(error) from error


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Words for what DDP and FSDP raise anywhere, as they put parameters together, where another process has gone."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, Explained) or not is_loss_of_a_process(error):
            raise
        raise lost(error) from error


def lost(error: BaseException) -> LostProcess:
    """The error of a process whose partner has gone."""
    return LostProcess(
        f"another process of this training ended or does not answer ({why(error):.200}). Look at what it said, and "
        "start the same command again: it goes on from the last checkpoint"
    )


def is_loss_of_a_process(error: BaseException) -> bool:
    """Whether an error inside a step, as DDP's and FSDP's are, says that another process has gone."""
    text = str(error).lower()
    words = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "distbackend")
    return isinstance(error, RuntimeError) and any(word in text for word in words)
