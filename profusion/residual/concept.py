"""A residual: what Infusion (arXiv 2404.14007) learns of a concept.

delta_i, one vector of R^context_dim per cross-attention layer i, is added to the context row of the class noun before
W_V: V_bar = W_V (c + onehot(noun) * delta_i). Nothing else is trained, so a concept on SD 1.5 is 16 x 768 numbers. With
a capacity above 1 there are details besides, whose values differ by place (`details`).

Where text and picture attend to each other there is no context that all layers share, and delta is added after W_V:
V_bar = W_V c_i + onehot(noun) * delta_i. So a residual says what it is added to, and, of another network than a UNet,
which: two of them may have layers of the same names and widths.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..details import Details
from ..files import DTYPES
from ..infusion import CONTEXT, VALUE, architecture_name
from ..models.configs import MAX_WIDTH
from ..problems import Explained
from .origin import Origin

MAX_TEXT = 64
MAX_LAYERS = 1024  # SDXL has 70
MAX_STEPS = 2**63 - 1
MAX_SEED = 2**64 - 1

_LAYER_NAME = re.compile(r"((input|middle|output)\.[0-9]{1,4}|joint|cross)\.[0-9]{1,4}")
_NETWORK = re.compile(r"([a-z0-9][a-z0-9._-]{0,39})?")
_TRAINING_NAME = re.compile(r"[A-Za-z0-9_.]{1,80}")


class ResidualError(Explained, ValueError):
    """A residual, or the file of one, that cannot be used. The message says why and what to do."""


class LayerLike(Protocol):
    """What is needed of a layer here: `profusion.infusion.Layer` has it."""

    name: str
    context_dim: int
    width: int
    network: str
    adds_to: str


@dataclass(frozen=True, eq=False)
class Residual:
    """A learned concept.

    delta: (layers, 1, context_dim), a copy in float32 on the CPU; one row per layer.
    noun: the class noun at whose rows the delta is added, as it stands in a prompt.
    layers: the layers' names in forward order, such as "input.1.0".
    architecture: the base model's, in words, such as "SD 1.x".
    steps, seed: how it was trained.
    training_state: the optimizer's tensors by name, copied, where the training may be resumed.
    origin: what it was trained on, where that is known.
    details: what differs by place, copied likewise; None for a capacity of 1.
    network: the family of another network than a UNet, such as "flux"; empty for a UNet.
    adds_to: "context", the rows before W_V, or "value", what W_V makes of them.
    Raises ResidualError, which names the field, where one of them makes no sense.
    """

    delta: Tensor
    noun: str
    layers: tuple[str, ...]
    architecture: str
    steps: int = 0
    seed: int = 0
    training_state: Mapping[str, Tensor] | None = None
    origin: Origin | None = None
    details: Details | None = None
    network: str = ""
    adds_to: str = CONTEXT

    def __post_init__(self) -> None:
        checked = {
            "layers": checked_layers(self.layers),
            "delta": checked_delta(self.delta, self.layers),
            "noun": _checked_text("noun", self.noun),
            "architecture": _checked_text("architecture", self.architecture),
            "steps": _checked_integer("steps", self.steps, MAX_STEPS),
            "seed": _checked_integer("seed", self.seed, MAX_SEED),
            "training_state": checked_training_state(self.training_state),
            "network": checked_network(self.network),
            "adds_to": checked_adds_to(self.adds_to),
        }
        checked["details"] = checked_details(self.details, checked["delta"])
        for field, value in checked.items():
            object.__setattr__(self, field, value)

    @property
    def context_dim(self) -> int:
        """The width of a layer's vector: that of the context, or of the values, that it is added to."""
        return self.delta.shape[2]

    @property
    def capacity(self) -> int:
        """How many vectors a layer has."""
        return 1 if self.details is None else 1 + self.details.count

    def numbers(self) -> tuple[Tensor, ...]:
        """All that has been learned."""
        return (self.delta,) if self.details is None else (self.delta, self.details.values, self.details.gates)


def check_architecture(residual: Residual, layers: Iterable[LayerLike]) -> None:
    """Raise ResidualError, naming both architectures, unless the model has the layers it was trained on."""
    layers = list(layers)
    names, widths = tuple(layer.name for layer in layers), {layer.context_dim for layer in layers}
    if names == residual.layers and widths == {residual.context_dim}:
        _check_network(residual, layers[0])
        own = tuple(layer.width for layer in layers)
        if residual.details is None or own == residual.details.widths:
            return
        raise ResidualError(
            f"The residual of '{residual.noun}' has details for layers of {some(residual.details.widths)} numbers, and "
            f"the model's are of {some(own)}. Connect a model of the kind it was trained on, or train a residual on "
            f"this one."
        )
    kind = "layers" if residual.network else "cross-attention layers"
    trained_on = f"{residual.architecture}, {len(residual.layers)} {kind} of {residual.context_dim}"
    model = f"{architecture_name(layers)}, {len(layers)} of {some(sorted(widths))}" if layers else "one without any"
    pairs = zip(residual.layers, names, strict=False)
    differing = next((f" ({there} there is {here} here)" for there, here in pairs if there != here), "")
    raise ResidualError(
        f"The residual of '{residual.noun}' was trained on {trained_on}, but the model is {model}{differing}. "
        f"Connect a model of the kind it was trained on, or train a residual on this one."
    )


def _check_network(residual: Residual, layer: LayerLike) -> None:
    """Raise ResidualError where layers of the same names and widths are another network's, or take it elsewhere."""
    if residual.network != layer.network:
        of = [f"the network {name!r}" if name else "a UNet" for name in (residual.network, layer.network)]
        raise ResidualError(
            f"The residual of '{residual.noun}' was trained on {of[0]}, and the model is {of[1]} of the same sizes. "
            f"Connect a model of the kind it was trained on, or train a residual on this one."
        )
    if residual.adds_to != layer.adds_to:
        raise ResidualError(
            f"The residual of '{residual.noun}' is added to the {residual.adds_to}, and on this model Infusion adds "
            f"to the {layer.adds_to}: train a residual on it."
        )


def checked_network(network: str) -> str:
    """A family's name, or none; raises ResidualError for another text."""
    if not isinstance(network, str) or not _NETWORK.fullmatch(network):
        raise ResidualError(f"network must be a name such as 'flux', or empty for a UNet; found {network!r:.80}")
    return network


def checked_adds_to(adds_to: str) -> str:
    """CONTEXT or VALUE; raises ResidualError for anything else."""
    if adds_to not in (CONTEXT, VALUE):
        raise ResidualError(f"adds_to must be {CONTEXT!r} or {VALUE!r}; found {adds_to!r:.80}")
    return adds_to


def checked_layers(layers: Iterable[str]) -> tuple[str, ...]:
    """Layer names as a tuple; raises ResidualError unless they are different names, at least one."""
    layers = tuple(layers)
    if len(layers) > MAX_LAYERS:
        raise ResidualError(f"layers must be at most {MAX_LAYERS}; found {len(layers)}")
    wrong = [name for name in layers if not isinstance(name, str) or not _LAYER_NAME.fullmatch(name)]
    if wrong or not layers:
        raise ResidualError(f"layers must be names such as 'input.1.0', at least one; found {some(wrong)}")
    if len(set(layers)) < len(layers):
        twice = sorted(name for name, count in Counter(layers).items() if count > 1)
        raise ResidualError(f"layers must all differ; found twice: {some(twice)}")
    return layers


def checked_delta(delta: Tensor, layers: tuple[str, ...]) -> Tensor:
    """A float32 copy of a delta on the CPU; raises ResidualError unless it is (layers, 1, context_dim) and finite."""
    if not isinstance(delta, Tensor) or not delta.is_floating_point():
        raise ResidualError(f"delta must be a floating-point tensor; found {getattr(delta, 'dtype', type(delta))}")
    if delta.ndim != 3 or delta.shape[:2] != (len(layers), 1) or delta.shape[2] < 1:
        raise ResidualError(f"delta must have the shape ({len(layers)}, 1, context_dim); found {tuple(delta.shape)}")
    if delta.shape[2] > MAX_WIDTH:
        raise ResidualError(f"context_dim must be at most {MAX_WIDTH}; found {delta.shape[2]}")
    delta = _copy(delta, torch.float32)
    bad = [name for name, row in zip(layers, delta, strict=True) if not torch.isfinite(row).all()]
    if bad:
        raise ResidualError(f"delta must be finite; found NaN or infinity in {some(bad)}")
    return delta


def checked_details(details: Details | None, delta: Tensor) -> Details | None:
    """A copy of details like that of delta; raises ResidualError unless they are finite and of delta's layers."""
    if details is None:
        return None
    for name, tensor in (("details", details.values), ("gates", details.gates)):
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ResidualError(f"{name} must be finite floating-point numbers")
    if max(details.widths) > MAX_WIDTH:
        raise ResidualError(f"the widths of layers must be at most {MAX_WIDTH}; found {max(details.widths)}")
    if (len(details.values), details.values.shape[2]) != (len(delta), delta.shape[2]):
        raise ResidualError(
            f"details must have the shape ({len(delta)}, details, {delta.shape[2]}); found "
            f"{tuple(details.values.shape)}"
        )
    return Details(_copy(details.values, torch.float32), _copy(details.gates, torch.float32), details.widths)


def checked_training_state(state: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """A copy of an optimizer's tensors; raises ResidualError unless they have plain names and finite values."""
    if state is None:
        return None
    for name, tensor in state.items():
        if not isinstance(name, str) or not _TRAINING_NAME.fullmatch(name):
            raise ResidualError(f"training_state must have names of letters, digits, '_' and '.'; found {name!r:.80}")
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values() or not tensor.numel():
            raise ResidualError(f"training_state['{name}'] must be a tensor that is not empty, of {', '.join(DTYPES)}")
        if not torch.isfinite(tensor).all():
            raise ResidualError(f"training_state['{name}'] must be finite; found NaN or infinity")
    return {name: _copy(tensor, tensor.dtype) for name, tensor in state.items()}


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU, usable in training even if made in inference mode, as the host's nodes are run."""
    with torch.inference_mode(False):
        return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def _checked_text(field: str, text: str) -> str:
    if not isinstance(text, str) or text != text.strip() or not 0 < len(text) <= MAX_TEXT or not text.isprintable():
        raise ResidualError(f"{field} must be 1 to {MAX_TEXT} printable characters, trimmed; found {text!r:.80}")
    if "<" in text or ">" in text:  # no word has them, and a page could take them for a tag
        raise ResidualError(f"{field} must be a text without < or >; found {text!r:.80}")
    return text


def _checked_integer(field: str, value: int, largest: int) -> int:
    try:
        number = operator.index(value)
    except TypeError as problem:
        raise ResidualError(f"{field} must be a whole number; found {value!r:.80}") from problem
    if not 0 <= number <= largest:
        raise ResidualError(f"{field} must be from 0 to {largest}; found {number}")
    return number


def some(things: Iterable[Any], most: int = 3) -> str:
    """The first few of a list, for a message."""
    things = [f"{thing!s:.60}" for thing in things]
    if len(things) > most:
        return ", ".join(things[:most]) + f" and {len(things) - most} more"
    return ", ".join(things) or "none"
