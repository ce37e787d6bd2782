"""Which models Infusion acts on, and what is to be known of each: where text stands in its attention, and how wide it
is.

A family is a few facts. ComfyUI's own tests hold none of them, and a version may change any, so that the first
evaluation of each proves them by a probe (`text_attention.check_layout`), and a model of which they are not true is
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_base
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...profusion.attending import UNET, Attending, JointAttention
from ...profusion.infusion import (
    VALUE,
    Layer,
    UnsupportedModelError,
    architecture_name,
    cross_attention_layers,
)
from ...profusion.joint_attention import COLUMN
from ...profusion.references import NATIVE
from ...profusion.text_attention import Layout, TextCall


@dataclass(frozen=True)
class Shape:
    """Of a network's attentions with text: how many there are, their heads, the numbers of a head, the heads of keys
    and values, and the cells a side of a picture's token."""

    layers: int
    heads: int
    numbers: int
    value_heads: int
    patch: int


@dataclass(frozen=True)
class Family:
    """One kind of transformer, as this host has it.

    name: what people call it. shape: of a network of it. joint, multiple, references, text: see `Layout`, the last two
    told of a network.
    """

    name: str
    shape: Callable[[Any], Shape]
    joint: bool = True
    multiple: Callable[[Any], int] = lambda network: 1
    references: bool = True
    text: Callable[[Any], Callable[[TextCall], int] | None] = lambda network: None

    def layout(self, network: Any) -> Layout:
        """Raises AttributeError where the host's network has other parts than it had."""
        shape, text = self.shape(network), self.text(network)
        told = {} if text is None else {"text": text}
        return Layout(
            self.joint, shape.layers, shape.patch, self.multiple(network), self.references, name=self.name, **told
        )


def _flux(network: Any) -> Shape:
    layers, heads = len(network.double_blocks) + len(network.single_blocks), network.num_heads
    return Shape(layers, heads, network.hidden_size // heads, heads, network.patch_size)


def _mmdit(network: Any) -> Shape:
    heads = network.num_heads
    return Shape(
        len(network.joint_blocks), heads, network.joint_blocks[0].x_block.attn.head_dim, heads, network.patch_size
    )


def _qwen(network: Any) -> Shape:
    attention = network.transformer_blocks[0].attn
    heads = attention.heads
    return Shape(len(network.transformer_blocks), heads, attention.inner_dim // heads, heads, network.patch_size)


def _lumina(network: Any) -> Shape:
    attention = network.layers[0].attention
    numbers = attention.head_dim
    return Shape(len(network.layers), attention.n_local_heads, numbers, attention.n_local_kv_heads, network.patch_size)


def _cosmos(network: Any) -> Shape:
    attention = network.blocks[0].cross_attn
    heads = attention.n_heads
    return Shape(len(network.blocks), heads, attention.head_dim, heads, network.patch_spatial)


def _wan(network: Any) -> Shape:
    heads = network.num_heads
    return Shape(len(network.blocks), heads, network.dim // heads, heads, network.patch_size[1])


def _lumina_text(network: Any) -> Callable[[TextCall], int] | None:
    """Older hosts leave out what the prompt's mask does; newer ones take all rows."""
    return None if hasattr(network, "embed_cap") else _told_tokens


def _told_tokens(call: TextCall) -> int:
    return int(call.beside.get("num_tokens", call.text))


def _anima_text(network: Any) -> Callable[[TextCall], int]:
    return _adapted_rows


def _adapted_rows(call: TextCall) -> int:
    """Outside of inference mode the network itself makes the rows, of T5's tokens."""
    ids = call.beside.get("t5xxl_ids")
    return call.text if ids is None else max(512, ids.shape[1])


def _multiple(network: Any) -> int:
    return getattr(network, "pad_tokens_multiple", None) or 1


_LUMINA = Family("Lumina 2 or Z-Image", _lumina, multiple=_multiple, references=False, text=_lumina_text)
_COSMOS = Family("Cosmos-Predict2", _cosmos, joint=False)
_WAN = Family("Wan", _wan, joint=False)

FAMILIES = {
    "SD3": Family("SD3", _mmdit),
    "Flux": Family("Flux.1", _flux),
    "Flux2": Family("Flux.2", _flux),
    "Chroma": Family("Chroma", _flux),
    "QwenImage": Family("Qwen-Image", _qwen),
    "Lumina2": _LUMINA,
    "CosmosPredict2": _COSMOS,
    "Anima": Family("Anima", _cosmos, joint=False, text=_anima_text),
    "WAN21": _WAN,
    "WAN22": _WAN,
}
"""By the class of `comfy.model_base` itself: those that descend from it may do otherwise."""

_CLOSED = {
    "PixArt": "cross-attention",
    "HunyuanDiT": "cross-attention",
    "ErnieImage": "joint attention",
    "StableAudio1": "cross-attention",
}
"""Models whose attention ComfyUI lets nobody see: it is called without transformer_options."""


@dataclass(frozen=True)
class Acting:
    """What Infusion needs to know of a MODEL."""

    layers: list[Layer]
    attending: Attending = UNET
    blocks_of: Callable[[nn.Module], list[nn.Module]] | None = None

    @property
    def family(self) -> str | None:
        """What people call a transformer; None for a UNet."""
        return self.attending.layout.name if isinstance(self.attending, JointAttention) else None


def family_of(model: ModelPatcher) -> Family | None:
    """The family of a MODEL; None for a UNet, and for what is of no known one."""
    kind = type(model.model)
    known = FAMILIES.get(kind.__name__)
    return known if known is not None and kind is getattr(comfy.model_base, kind.__name__, None) else None


def acting_on(model: ModelPatcher, lock: str = COLUMN) -> Acting:
    """How Infusion acts on a MODEL. Raises UnsupportedModelError, by name and with what is true of it, where it
    cannot."""
    network, family = model.get_model_object("diffusion_model"), family_of(model)
    if family is None or _is_unet(network):
        return Acting(model_layers(model))
    try:
        layout, shape = family.layout(network), family.shape(network)
    except (AttributeError, IndexError, TypeError) as error:
        raise UnsupportedModelError(
            f"{_name_of(model)} is not supported: it is not as {family.name} is known to be ({error}). Another pack "
            "or this version of ComfyUI has changed it"
        ) from error
    kind = "joint" if layout.joint else "cross"
    width = shape.value_heads * shape.numbers
    network_name = type(model.model).__name__.lower()  # the host's, and known: see `family_of`
    layers = [Layer(f"{kind}.{index}", width, network=network_name, adds_to=VALUE) for index in range(shape.layers)]
    return Acting(layers, JointAttention(layout, lock, shape.heads, shape.heads * shape.numbers), blocks_of)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """A transformer's blocks, which have one attention with text each, in forward order."""
    return [block for name in _BLOCKS for block in getattr(network, name, ())]


_BLOCKS = "double_blocks", "single_blocks", "joint_blocks", "transformer_blocks", "layers", "blocks"


def _is_unet(network: nn.Module) -> bool:
    return hasattr(network, "input_blocks")


def model_layers(model: ModelPatcher) -> list[Layer]:
    """The cross-attention layers of a MODEL that is a UNet. Others are refused by name, and with what they are."""
    network = model.get_model_object("diffusion_model")
    try:
        return cross_attention_layers(dict(network.named_parameters()))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{_name_of(model)} is not supported: {_why_not(model, error)}. Connect an SD 1.x, SD 2.x or SDXL "
            "model, or Toybox Loader's whose base is UNet"
        ) from error


def promptnet_layers(model: ModelPatcher) -> list[Layer]:
    """`model_layers`, for what works with a PromptNet: of others it is said that they have none, and what to do."""
    try:
        return model_layers(model)
    except UnsupportedModelError as error:
        family = family_of(model)
        raise UnsupportedModelError(
            f"{_name_of(model)} is not supported: there is no PromptNet for {family.name if family else 'it'}, since "
            "one looks at a picture with a UNet's encoder. Show it the picture by what is made for it, such as Redux, "
            "reference latents or its own IPAdapter, or connect an SD 1.x, SD 2.x or SDXL model, or Toybox Loader's "
            "whose base is UNet"
        ) from error


def _name_of(model: ModelPatcher) -> str:
    return f"{type(model.model).__name__} ({type(model.get_model_object('diffusion_model')).__name__})"


def _why_not(model: ModelPatcher, error: UnsupportedModelError) -> str:
    family, closed = family_of(model), _CLOSED.get(type(model.model).__name__)
    if family is not None:
        kind = "joint attention over text and picture" if family.joint else "cross-attention in a transformer"
        return f"{family.name} is drawn with by {kind}, on which Infusion Attention Patch acts, and this takes a UNet"
    if closed is not None:
        return f"it has {closed} between picture and text, and ComfyUI lets no pack see what happens in it"
    return str(error)


def native_size(model: ModelPatcher) -> int | None:
    """Pixels a side of the pictures that a MODEL was trained on; None where that is not known."""
    try:
        name = architecture_name(model_layers(model))
    except UnsupportedModelError:
        return None
    wide = name == "SD 2.x" and model.model.model_type == ModelType.V_PREDICTION
    return 768 if wide else NATIVE.get(name)
