"""What something costs: UNet rows, seconds, bytes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Cost:
    """rows: latents that a network was evaluated on, each under one condition; calls: batches of
    them; seconds: wall clock."""

    rows: int = 0
    calls: int = 0
    seconds: float = 0.0


@contextmanager
def measured(network: nn.Module) -> Iterator[Cost]:
    """Count what a UNet, the kernel's or the host's, evaluates in the block, and time the block:
    `with measured(unet) as cost`.

    Its first argument is x (B, C, H, W). Seconds are complete once the block is left, work that
    is queued on a GPU included.
    """
    cost = Cost()

    def count(_: nn.Module, arguments: tuple) -> None:
        cost.rows += len(arguments[0])
        cost.calls += 1

    hook = network.register_forward_pre_hook(count)
    started = time.perf_counter()
    try:
        yield cost
    finally:
        hook.remove()
        if any(parameter.is_cuda for parameter in network.parameters()):
            torch.cuda.synchronize()
        cost.seconds = time.perf_counter() - started


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of what was learned, as it would be written without compression; of a file, take the file's size."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
