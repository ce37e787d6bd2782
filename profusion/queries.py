"""Where F's queries wait for C, and how much of the device's memory they take meanwhile.

F leaves the input of every cross-attention (`infusion.foundation_patches`): for SDXL at 1024 pixels under guidance, 400
MiB a picture. `WaitingQueries` keeps some of them there and the rest in main memory, from where C has each back for the
time of its layer. A copy there and back changes no bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

KEPT = 46 * 2**20  # bytes a picture: all that SD 1.x leaves at 512 pixels
OWN_MEMORY = ("cuda", "xpu")  # devices whose memory is not the main memory

_TO_QUERY = re.compile(r"(input|middle|output)_blocks?\.(\d+)\.(?:\d+\.)?transformer_blocks\.\d+\.attn2\.to_q\.weight")
_DOWN, _UP = re.compile(r"input_blocks\.(\d+)\.0\.op\.weight"), re.compile(r"output_blocks\.(\d+)\.\d+\.conv\.weight")


class TakenOnce(dict):
    """Queries that are each handed out once: C needs none twice, and while it is evaluated memory is dear."""

    def get(self, key: Hashable, default: Tensor | None = None) -> Tensor | None:
        return self.pop(key, default)


class WaitingQueries(MutableMapping):
    """Queries (rows of pictures, T, D) by layer and conditioning, as often as they are asked for.

    kept: bytes a picture that may stay on the device. `on_device`: bytes that do.
    """

    def __init__(self, kept: int = KEPT, spill: Callable[[Tensor], Tensor] | None = None):
        """spill: moves rows to main memory."""
        self._kept, self._spill = kept, spill or in_main_memory
        self._waiting: dict[Hashable, Tensor] = {}
        self._sizes: dict[Hashable, int] = {}  # of those on the device
        self.on_device = 0

    def __setitem__(self, key: Hashable, rows: Tensor) -> None:
        if key in self:
            del self[key]
        size = rows.numel() * rows.element_size()
        if rows.device.type not in OWN_MEMORY:
            self._waiting[key] = rows
        elif self.on_device + size > self._kept * len(rows):
            self._waiting[key] = self._spill(rows)
        else:
            self._waiting[key] = rows.clone()  # a chunk of a batch would keep all of it
            self._sizes[key] = size
            self.on_device += size

    def __getitem__(self, key: Hashable) -> Tensor:
        return self._waiting[key]

    def __delitem__(self, key: Hashable) -> None:
        del self._waiting[key]
        self.on_device -= self._sizes.pop(key, 0)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._waiting)

    def __len__(self) -> int:
        return len(self._waiting)


def in_main_memory(rows: Tensor) -> Tensor:
    """A copy in main memory, pinned where that can be had, so that the device need not wait for it."""
    try:
        copy = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    except RuntimeError:  # the system pins no more
        return rows.to("cpu", copy=True)
    return copy.copy_(rows, non_blocking=True)


def query_numbers(parameters: Mapping[str, Tensor]) -> list[float]:
    """How many numbers each cross-attention's query has for a row, as a multiple of the latent's cells, in any order.

    parameters: a UNet's, by name; only shapes are read.
    """
    downs = [int(match[1]) for name in parameters if (match := _DOWN.search(name))]
    ups = [int(match[1]) for name in parameters if (match := _UP.search(name))]
    numbers = []
    for name, weight in parameters.items():
        if not (match := _TO_QUERY.search(name)):
            continue
        kind, block = match[1], int(match[2])
        halved = {
            "input": sum(down < block for down in downs),
            "middle": len(downs),
            "output": len(downs) - sum(up < block for up in ups),
        }[kind]
        numbers.append(weight.shape[1] / 4**halved)
    return numbers


def bytes_on_device(numbers: Sequence[float], cells: int, rows: int, element: int, kept: int = KEPT) -> float:
    """What F's queries take on a device whose memory is its own, for a picture.

    numbers: see `query_numbers`. cells: of the latent. rows: conditionings in a batch. element: bytes of a number.
    """
    waiting = min(kept, sum(numbers) * cells * rows * element)
    return waiting + max(numbers, default=0) * cells * rows * element  # and one layer's, while C has it
