"""A network of known sizes, filled with a file's weights: each of its tensors has one, and each of theirs is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .contents import Contents, Shapes, refusal
from .openclip import Sources


@dataclass(frozen=True)
class Part:
    """A network to make of a file: its class and configuration, where each tensor of its state dict is, its name, and
    the type that its weights are to have."""

    build: Callable[[Any], nn.Module]
    config: object
    sources: Sources
    what: str
    dtype: torch.dtype


def fill(contents: Contents, parts: Sequence[Part]) -> list[nn.Module]:
    """Networks with the file's weights, frozen.

    Raises CheckpointError, before anything is read, where the weights of one of them do not fit it.
    """
    networks = []
    for part in parts:
        contents.check_types(source.name for source in part.sources.values())
        with torch.device("meta"):  # shapes without memory
            network = part.build(part.config)
        _check_fit(contents, _shapes(network), part.sources, part.what)
        networks.append(network)
    for network, part in zip(networks, parts, strict=True):
        network.load_state_dict(_state(contents, network, part), strict=True, assign=True)
        _positions_again(network)
        network.eval().requires_grad_(False)
    return networks


def _shapes(network: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _state(contents: Contents, network: nn.Module, part: Part) -> dict[str, Tensor]:
    """A network's state dict; a tensor of the file that has several of its is read once."""
    expected, by_file = _shapes(network), {}
    for name, source in part.sources.items():
        by_file.setdefault(source.name, []).append(name)
    state = {}
    for in_file, tensor in contents.tensors(by_file):
        for name in by_file[in_file]:
            value = part.sources[name].take(tensor).reshape(expected[name])
            state[name] = value.to(part.dtype, copy=True).contiguous()
    return state


def _check_fit(contents: Contents, expected: Shapes, sources: Sources, what: str) -> None:
    missing, strange = sorted(set(expected) - set(sources)), sorted(set(sources) - set(expected))
    if missing:
        raise refusal(contents.path, f"{len(missing)} tensors of its {what} are missing, such as '{missing[0]}'")
    if strange:
        raise refusal(
            contents.path,
            f"its {what} has {len(strange)} tensors more than one of its sizes has, such as '{strange[0]:.80}'",
        )
    for name, shape in expected.items():
        found = sources[name].shape(contents.shapes[sources[name].name])
        if found != shape and not _a_pointwise_convolution(found, shape):
            raise refusal(contents.path, f"'{name}' of its {what} has the shape {found} where {shape} fits the others")


def _a_pointwise_convolution(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether these are a matrix and a convolution of one cell with the same numbers, as tools exchange them."""
    short, long = sorted((one, other), key=len)
    return len(short) == 2 and long == (*short, 1, 1)


def _positions_again(network: nn.Module) -> None:
    """transformers keeps the numbers of the positions beside the weights, in no file: made on meta, they are none."""
    for module in network.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor):
            module.position_ids = torch.arange(ids.shape[-1]).expand(1, -1)
