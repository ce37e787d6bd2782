"""What PyTorch keeps for each thread, carried from one to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.overrides import _pop_mode as _pop_function_mode
from torch.overrides import _push_mode as _push_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode

AUTOCAST = ("cpu", "cuda", "mps", "xpu")


def state_of_this_thread() -> Callable[[], ExitStack]:
    """Take a thread's modes; whoever enters the result elsewhere computes under them, until it leaves.

    They are: inference and gradient mode, autocast, the modes that see each function or operator (a default device is
    one), and the accelerator's current device and stream.
    """
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    cached = torch.is_autocast_cache_enabled()
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in AUTOCAST if torch.is_autocast_enabled(kind)]
    functions, operators = _get_current_function_mode_stack(), _get_current_dispatch_mode_stack()
    streams = [
        (kind, kind.current_stream())
        for kind in (torch.cuda, getattr(torch, "xpu", torch.cuda))
        if kind.is_available() and kind.is_initialized()
    ]

    def entered() -> ExitStack:
        modes = ExitStack()
        modes.enter_context(torch.inference_mode(inference))
        modes.enter_context(torch.set_grad_enabled(grad))
        for kind, stream in streams:
            modes.enter_context(kind.stream(stream))
        for kind, dtype in casts:
            modes.enter_context(torch.autocast(kind, dtype, cache_enabled=cached))
        modes.enter_context(_pushed(functions, _push_function_mode, _pop_function_mode))
        modes.enter_context(_pushed(operators, _push_dispatch_mode, _pop_dispatch_mode))
        return modes

    return entered


@contextmanager
def _pushed(stack: list, push: Callable, pop: Callable) -> Iterator[None]:
    """The modes themselves, not entered anew: they remember what was before, and that is the other thread's affair."""
    for mode in stack:
        push(mode)
    try:
        yield
    finally:
        for _ in stack:
            pop()
