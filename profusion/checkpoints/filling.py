"""A network of known sizes, filled with a file's weights: each of its tensors has one, and each of theirs is used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .contents import Contents, Shapes, refusal
from .openclip import Sources


def fill(
    contents: Contents, build: Callable, config: object, sources: Sources, dtype: torch.dtype, what: str
) -> nn.Module:
    """A network of this configuration with the file's weights, frozen. Raises CheckpointError if they do not fit it."""
    with torch.device("meta"):  # shapes without memory
        network = build(config)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    _check_fit(contents, expected, sources, what)
    by_file: dict[str, list[str]] = {}
    for name, source in sources.items():
        by_file.setdefault(source.name, []).append(name)
    contents.check_types(by_file)
    state: dict[str, Tensor] = {}
    for in_file, tensor in contents.tensors(by_file):
        for name in by_file[in_file]:
            value = sources[name].take(tensor).reshape(expected[name])
            state[name] = value.to(dtype, copy=True).contiguous()
    network.load_state_dict(state, strict=True, assign=True)
    _positions_again(network)
    return network.eval().requires_grad_(False)


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
