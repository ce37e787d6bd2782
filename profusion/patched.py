"""What others have put on a host's model: named for people, left out where a training cannot use it, and made fit for
autograd.

Hosts and packs hang functions and objects on a model: patches of a network's blocks, wrappers around its evaluation,
adapters inside of its layers. They are written for sampling, in inference mode and without gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

_CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}  # by the keys of their wrappers
_WINDOWS = "context_handler", "Context Windows"
_OWN = __name__.split(".")[0] if __name__.count(".") < 2 else __name__.rsplit(".", 2)[0]
_PACK = re.compile(r"custom_nodes[./\\]([^./\\]+)")

Options = Mapping[str, Any]


# Names


def names_on(model: Any) -> list[str]:
    """What is on a host's model beside the patches of its weights, as people know it; this pack's own left out."""
    injected = {str(key).replace("_", " ") for key in getattr(model, "injections", {})}
    return sorted(injected | names_in(model.model_options, getattr(model, "wrappers", {})), key=str.lower)


def names_in(options: Options, *wrappers: Mapping[str, Mapping[str, Iterable]]) -> set[str]:
    """As `names_on`, of a host's model options, as a sampling has them, and of these wrappers beside theirs."""
    transformer, found = options.get("transformer_options", {}), []
    for key, thing in _wrappers(transformer.get("wrappers", {}), *wrappers):
        found.append(_CACHES.get(key) or name_of(thing))
    for functions in transformer.get("patches", {}).values():
        found += map(name_of, functions)
    for replaced in transformer.get("patches_replace", {}).values():
        found += map(name_of, replaced.values())
    single = options.get("model_function_wrapper"), transformer.get("optimized_attention_override")
    found += [name_of(thing) for thing in single if thing is not None]
    if options.get(_WINDOWS[0]) is not None:
        found.append(_WINDOWS[1])
    return {name for name in found if name}


def _wrappers(*groups: Mapping[str, Mapping[str, Iterable]]) -> Iterator[tuple[str, Any]]:
    for group in groups:
        for kept in group.values():
            for key, things in kept.items():
                if "ContextWindows" not in str(key):  # which its handler stands for
                    yield from ((key, thing) for thing in things)


def name_of(thing: Any) -> str | None:
    """A function's or an object's name: of the class or the outermost function it is made in, and of its pack."""
    while isinstance(thing, partial):
        thing = thing.func
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    module = str(getattr(kind, "__module__", None))
    if module.startswith(f"{_OWN}."):
        return None
    name, pack = kind.__qualname__.split(".")[0], _PACK.search(module)
    return f"{name} ({pack[1]})" if pack else name


# What a training leaves out


def without_shortcuts(options: Options) -> tuple[dict[str, Any], list[str]]:
    """A host's model options without what only a whole sampling can use, and its names.

    Step caches take a step's result for that of the one before; context windows cut a latent apart.
    """
    transformer, found = dict(options.get("transformer_options", {})), set()
    wrappers = transformer.get("wrappers", {})
    for kept in wrappers.values():
        found |= {_CACHES[key] for key in kept if key in _CACHES}
    transformer["wrappers"] = {
        kind: {key: things for key, things in kept.items() if key not in _CACHES} for kind, kept in wrappers.items()
    }
    rest = {name: value for name, value in options.items() if name != _WINDOWS[0]}
    if options.get(_WINDOWS[0]) is not None:
        found.add(_WINDOWS[1])
    return {**rest, "transformer_options": transformer}, sorted(found)


# Autograd


def differentiable_patches(options: Options) -> dict[str, Any]:
    """A host's model options whose patches may write into what they are given, as FreeU does, and still have a
    gradient."""
    transformer = dict(options.get("transformer_options", {}))
    patches = transformer.get("patches", {})
    transformer["patches"] = {name: [_of_copies(one) for one in functions] for name, functions in patches.items()}
    return {**options, "transformer_options": transformer}


def _of_copies(patch: Callable) -> Callable:
    """A patch that is given copies, and of which autograd keeps copies."""

    def patched(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return patch(*inputs, **named)
        given = [_copy(value) if isinstance(value, Tensor) and value.requires_grad else value for value in inputs]
        with saved_tensors_hooks(_copy, _as_it_is):
            return patch(*given, **named)

    return patched


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class SavableWeights(TorchFunctionMode):
    """While it is on, autograd saves what was made in inference mode, as the weights of adapters are: another tensor
    over the same memory."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and any(one.requires_grad for one in _tensors((*args, *kwargs.values()))):
            args = tuple(map(_savable, args))
            kwargs = {name: _savable(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)


def _tensors(values: Iterable) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (one for one in value if isinstance(one, Tensor))


def _savable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return same_memory(value) if is_inference(value) else value
    if type(value) in (list, tuple):
        return type(value)(map(_savable, value))
    return value


def is_inference(tensor: Tensor | None) -> bool:
    """Whether this is a tensor that autograd refuses to save."""
    # Quantised kinds, which are subclasses, are computed with in another form and never saved themselves.
    return tensor is not None and type(tensor) in (Tensor, nn.Parameter) and tensor.is_inference()


def same_memory(tensor: Tensor) -> Tensor:
    """Another tensor over the same memory, which autograd may save."""
    with torch.inference_mode(False):
        place = tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        found = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*place)
        return nn.Parameter(found, requires_grad=False) if isinstance(tensor, nn.Parameter) else found
