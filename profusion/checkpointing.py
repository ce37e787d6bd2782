"""Gradient checkpointing: evaluate parts of a network twice, so that nothing but their
inputs waits for the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed(
    modules: Iterable[nn.Module], again: Callable[[], AbstractContextManager] = nullcontext
) -> Iterator[None]:
    """For the time being, what is inside these modules is not kept for the way back but computed once more there.

    The gradient is the same but for the rounding of a network that is not deterministic. A module's inputs must not be
    written to afterwards; dicts among them may. again: makes what the second evaluation stands in, which may be in
    another thread.
    """
    with ExitStack() as undo:
        for module in modules:
            undo.callback(_restore, module, vars(module).get("forward"))
            module.forward = _twice(module.forward, again)
        yield


def _twice(forward: Callable, again: Callable[[], AbstractContextManager]) -> Callable:
    def evaluate(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        # A UNet tells its layers where they are in one dict, which has gone on when they are evaluated again.
        inputs, named = [_as_it_is(value) for value in inputs], {name: _as_it_is(named[name]) for name in named}
        return checkpoint(
            forward,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), again()),
            **named,
        )

    return evaluate


def _as_it_is(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _restore(module: nn.Module, forward: Callable | None) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward
