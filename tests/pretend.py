"""A second device on a machine with one: its tensors lie in main memory, and mix with others no more than a GPU's do.

Like Apple's it has no float64, not even on the way to another device. Numbers are the CPU's. Registering it is for a
whole process, so `install` is called only where a test wants it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NAME = "pretend"
# What a GPU takes from both: copies are how tensors travel, and indices may lie on the CPU.
MAY_MIX = {
    "aten::copy_",
    "aten::_to_copy",
    "aten::_has_compatible_shallow_copy_type",
    "aten::index",
    "aten::index_put_",
    "aten::_index_put_impl_",
}


def is_possible() -> bool:
    """Whether this torch lets Python register a device."""
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # noqa: F401
    except ImportError:
        return False
    return True


class _Backend:
    """What torch asks of `torch.pretend`: one device, which draws nothing itself."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:  # asked for by gradient checkpointing
        return [torch.float16, torch.bfloat16]


@lru_cache(maxsize=1)
def install() -> torch.library.Library:
    """Register the device: `torch.device("pretend")`."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run, "PrivateUse1")  # what makes tensors from none; the rest goes through PretendTensor
    torch.tensor = _tensor
    return library


_from_numbers = torch.tensor


def _tensor(numbers, *, device: torch.device | str | None = None, **options: Any) -> Tensor:
    """torch.tensor, whose own way to a device written in Python is an internal error of torch 2.14."""
    made = _from_numbers(numbers, **options)
    return made if device is None else made.to(device)


class PretendTensor(Tensor):
    """A tensor of the device; `raw` is where its numbers are."""

    @staticmethod
    def __new__(cls, raw: Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device(NAME, 0),
        )

    def __init__(self, raw: Tensor):
        self.raw = raw

    def __repr__(self, **_: Any) -> str:
        return f"{NAME}({self.raw!r})"

    def new_tensor(self, numbers, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return _tensor(numbers, dtype=dtype or self.dtype, device=self.device, **options)

    def __getitem__(self, index):
        return super().__getitem__(_lists_to_tensors(index))

    def __setitem__(self, index, value):
        super().__setitem__(_lists_to_tensors(index), value)

    def tolist(self) -> list:
        return self.raw.tolist()

    def numpy(self, *, force: bool = False):
        raise TypeError(f"can't convert a {NAME} tensor to numpy: use Tensor.cpu() first")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, *args, **(kwargs or {}))


def _run(operator, *args, **kwargs):
    """Check that all is on one device, compute on the CPU, and let the results be of this device again."""
    values = pytree.tree_leaves((args, kwargs))
    _check(operator, values)
    own = {id(value.raw): value for value in values if isinstance(value, PretendTensor)}
    results = operator(*_map(_to_raw, args), **_map(_to_raw, kwargs))
    leaves = any(isinstance(value, torch.device) and value.type != NAME for value in values)
    into_other = operator._schema.name == "aten::copy_" and not isinstance(args[0], PretendTensor)
    if leaves or into_other:
        return results

    def own_or_new(value):
        if not isinstance(value, Tensor):
            return value
        if value.dtype == torch.float64:
            raise TypeError(f"{operator._schema.name}: {NAME} has no float64")
        return own[id(value)] if id(value) in own else PretendTensor(value)

    return _map(own_or_new, results)


def _check(operator, values: list) -> None:
    name = operator._schema.name
    here = any(isinstance(value, PretendTensor) for value in values)
    apart = [
        tuple(value.shape)
        for value in values
        if isinstance(value, Tensor) and not isinstance(value, PretendTensor) and value.ndim
    ]
    if here and apart and name not in MAY_MIX:
        raise RuntimeError(f"{name}: expected all tensors on one device, and those of shapes {apart} are on the CPU")
    doubles = [value for value in values if value is torch.float64 or getattr(value, "dtype", None) == torch.float64]
    if here and doubles:
        raise TypeError(f"{name}: {NAME} has no float64")
    drawn = [value for value in values if isinstance(value, torch.Generator)]
    to_here = any(isinstance(value, torch.device) and value.type == NAME for value in values)
    if drawn and (here or to_here):
        raise RuntimeError(f"{name}: expected a {NAME!r} device type for generator, and it is {drawn[0].device.type!r}")


def _lists_to_tensors(index):
    """Indices without lists, which torch would make tensors of as `torch.tensor` does."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(_from_numbers(part) if isinstance(part, list) else part for part in parts)


def _to_raw(value):
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.raw if isinstance(value, PretendTensor) else value


def _map(function, tree):
    return pytree.tree_map(function, tree)
