"""Copies of what functions and objects remember, so that two runs which take turns do so without meeting in it.

A function remembers in its closure, a method in its object, an object in its attributes; and what these hold may
remember too, arrays and random generators among it. Networks, classes and libraries' own objects stay one. So do a
module's variables and Python generators, of which there cannot be two: runs that take turns meet in those.
"""

from __future__ import annotations

import collections
import copy
import enum
import functools
import itertools
import random
import sys
import types
from collections.abc import Callable, Collection
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LARGEST = 2**24  # bytes of a tensor or an array that may be a run's memory; larger ones are somebody's weights

_CONTAINERS = (dict, list, set, collections.deque)
_ITERATORS = (itertools.count, itertools.cycle, *(type(iter(empty)) for empty in ([], (), "", range(0))))
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


class Apart:
    """`apart(value)`: value with all that it may remember copied; the same copy whenever it is asked for again.

    shared: names of packages, beside the libraries, whose objects stay as they are, and those of kinds made from them.
    """

    def __init__(self, shared: Collection[str] = ()):
        self._shared = tuple(shared)
        self._copies: dict[int, tuple[Any, Any]] = {}  # the original too, so that its id stays its own
        self._unfilled: list[Callable[[], None]] = []

    def __call__(self, value: Any) -> Any:
        found = self._of(value)
        while self._unfilled:
            self._unfilled.pop()()
        return found

    def object(self, value: Any) -> Any:
        """A copy of this object, whatever its class."""
        if id(value) not in self._copies:
            self._object(value)
        return self(value)

    def _of(self, value: Any) -> Any:
        known = self._copies.get(id(value))
        if known is not None:
            return known[1]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType | types.BuiltinMethodType):
            return self._method(value)
        if isinstance(value, functools.partial):
            parts = self._of(value.func), *map(self._of, value.args)
            return type(value)(*parts, **{name: self._of(part) for name, part in value.keywords.items()})
        if isinstance(value, tuple):
            return self._tuple(value)
        if isinstance(value, _CONTAINERS):
            return self._container(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, torch.Generator):
            return self._keep(value, torch.Generator(value.device).set_state(value.get_state()))
        if isinstance(value, np.ndarray):
            return self._keep(value, value.copy()) if value.nbytes <= LARGEST and not value.dtype.hasobject else value
        if isinstance(value, _ITERATORS):
            return self._keep(value, copy.copy(value))
        if isinstance(value, _GENERATORS):
            return self._keep(value, copy.deepcopy(value))
        return self._object(value) if self._is_memory(value) else value

    def _keep(self, value: Any, made: Any) -> Any:
        self._copies[id(value)] = value, made
        return made

    def _function(self, function: types.FunctionType) -> Any:
        closure, own = function.__closure__ or (), vars(function)
        if not (closure or own or function.__defaults__ or function.__kwdefaults__):
            return function
        cells = tuple(self._cell(cell) for cell in closure)
        code, names = function.__code__, function.__globals__
        made = self._keep(function, types.FunctionType(code, names, function.__name__, None, cells or None))

        def fill() -> None:
            made.__defaults__ = function.__defaults__ and self._of(function.__defaults__)
            made.__kwdefaults__ = function.__kwdefaults__ and self._of(function.__kwdefaults__)
            for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
                setattr(made, name, getattr(function, name))
            vars(made).update({name: self._of(part) for name, part in own.items()})

        self._unfilled.append(fill)
        return made

    def _cell(self, cell: types.CellType) -> types.CellType:
        if id(cell) in self._copies:
            return self._copies[id(cell)][1]
        made = self._keep(cell, types.CellType())

        def fill() -> None:
            try:
                contents = cell.cell_contents
            except ValueError:  # nothing in it yet
                return
            made.cell_contents = self._of(contents)

        self._unfilled.append(fill)
        return made

    def _method(self, method: Any) -> Any:
        owner = method.__self__
        own = self._of(owner)
        if own is owner:
            return method
        if isinstance(method, types.MethodType):
            return types.MethodType(self._of(method.__func__), own)
        return getattr(own, method.__name__)

    def _tuple(self, value: tuple) -> tuple:
        parts = [self._of(part) for part in value]
        if all(part is before for part, before in zip(parts, value, strict=True)):
            return value
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)

    def _container(self, value: Any) -> Any:
        made = self._keep(value, copy.copy(value))

        def fill() -> None:
            if isinstance(value, dict):
                for name, part in value.items():
                    made[name] = self._of(part)
            elif not isinstance(value, set):  # what is in a set cannot change
                for place, part in enumerate(value):
                    made[place] = self._of(part)

        self._unfilled.append(fill)
        return made

    def _tensor(self, value: Tensor) -> Tensor:
        is_state = type(value) is Tensor and not value.requires_grad
        if not is_state or value.numel() * value.element_size() > LARGEST:
            return value
        return self._keep(value, value.clone())

    def _is_memory(self, value: Any) -> bool:
        if isinstance(value, type | types.ModuleType | nn.Module | enum.Enum):
            return False
        if isinstance(value, types.SimpleNamespace):
            return True
        kinds = [kind.__module__ for kind in type(value).__mro__]  # a pack's own kind of what is shared is shared too
        if any(module == name or module.startswith(f"{name}.") for module in kinds for name in self._shared):
            return False
        return not _is_library(kinds[0].partition(".")[0])

    def _object(self, value: Any) -> Any:
        try:
            made = copy.copy(value)
        except Exception:  # whatever its own way of copying raises: it cannot be had twice
            made = value
        self._keep(value, made)
        if made is not value:
            self._unfilled.append(lambda: self._fill_object(value, made))
        return made

    def _fill_object(self, value: Any, made: Any) -> None:
        names = {name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)}
        for name in {*getattr(value, "__dict__", ()), *names}:
            before = getattr(value, "__dict__", {}).get(name) if name not in names else getattr(value, name)
            part = self._of(before)
            if part is not before:
                object.__setattr__(made, name, part)


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    slots = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in slots if name not in ("__dict__", "__weakref__"))


@functools.cache
def _is_library(package: str) -> bool:
    """Whether a package is Python's own or an installed one."""
    if package in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.isdisjoint(PurePath(file).parts)
