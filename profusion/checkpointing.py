"""Gradient checkpointing: evaluate parts of a network twice, so that nothing but their inputs waits for the way
back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.utils.checkpoint import checkpoint

from .text_attention import TEXT


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


@contextmanager
def blocks_checkpointed(
    blocks: Iterable[nn.Module], again: Callable[[], AbstractContextManager] = nullcontext
) -> Iterator[None]:
    """The same for a transformer's blocks, which write over what they are given and count their attentions with text.

    A block's tensors must be its arguments or constants; what it has in a closure and learns has its gradient too.
    Backward, each is computed once more from copies, at the place among the attentions that it had (`TextCall`).
    """
    with ExitStack() as undo:
        for block in blocks:
            undo.callback(_restore, block, vars(block).get("forward"))
            block.forward = _from_copies(block.forward, again)
        yield


def _from_copies(forward: Callable, again: Callable[[], AbstractContextManager]) -> Callable:
    def evaluate(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        given = {**dict(enumerate(inputs)), **named}
        names = [name for name, value in given.items() if isinstance(value, Tensor)]
        told = {name: _told(value) for name, value in given.items() if isinstance(value, dict)}

        def run(tensors: Sequence[Tensor], once_more: bool) -> Any:
            own = {**given, **dict(zip(names, tensors, strict=True))}
            if once_more:  # the model's own dict has gone on
                own |= {name: _told(value) for name, value in told.items()}
            return forward(*(own[index] for index in range(len(inputs))), **{name: own[name] for name in named})

        learns = torch.zeros((), requires_grad=True)  # else nothing would where no input has a gradient
        return _Block.apply(run, again, learns, *(given[name] for name in names))

    return evaluate


class _Block(torch.autograd.Function):
    """Computes without a graph, and once more with one on the way back."""

    @staticmethod
    def forward(ctx: Any, run: Callable, again: Callable, learns: Tensor, *tensors: Tensor) -> Any:
        ctx.run, ctx.again = run, again
        ctx.save_for_backward(*tensors)
        return run([tensor.clone() for tensor in tensors], False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True)
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in needed]
        with torch.enable_grad(), allow_mutation_on_saved_tensors(), ctx.again():
            outputs = ctx.run([tensor.clone() for tensor in inputs], True)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            wanted = [
                (output, gradient)
                for output, gradient in zip(outputs, gradients, strict=True)
                if gradient is not None and output.requires_grad
            ]
            if wanted:
                torch.autograd.backward(*map(list, zip(*wanted, strict=True)))
        return None, None, None, *(tensor.grad for tensor in inputs)


def _told(options: dict) -> dict:
    """A copy of what a block is told, with the attentions that have been counted."""
    return {**options, TEXT: replace(options[TEXT])} if TEXT in options else dict(options)


def _as_it_is(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _restore(module: nn.Module, forward: Callable | None) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward
