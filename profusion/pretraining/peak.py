"""How much memory tensors take at most while something runs, by counting what torch allocates and frees.

It counts real tensors and torch's fake ones alike: so a step of a network that fits no machine at hand can be measured,
on fake tensors, by the very code that would run it. What libraries allocate beside tensors (workspaces, the driver's
context, gaps between blocks) is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """While it lasts, `bytes` is what tensors hold now and `peak` the most that it has been.

    Tensors that were there before are counted where they are given as `known`, and once; views are not.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()
        for tensor in known:
            self._count(tensor)

    def reset(self) -> None:
        """Forget the peak up to now."""
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_iter(found):
            if isinstance(value, Tensor):
                self._count(value)
        return found

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.bytes -= size


def tensors_of(*modules: torch.nn.Module) -> list[Tensor]:
    """All parameters and buffers."""
    return [value for module in modules for value in (*module.parameters(), *module.buffers())]
