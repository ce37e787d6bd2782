"""open_clip's names and layouts of CLIP's towers, and their transformers' equals.

A tensor there may be three here (query, key and value in one), or lie on its other side (projections).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from .contents import Shape, Shapes

_PARTS = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}
_TEXT = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection.weight": "text_projection.weight",
}
_VISION = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' own spelling
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}


@dataclass(frozen=True)
class Source:
    """Where a network's tensor comes from: a tensor of the file, the third of it that is meant, if it is turned."""

    name: str
    third: int | None = None
    turned: bool = False

    def shape(self, whole: Shape) -> Shape:
        """The shape of what is taken from a tensor of this shape."""
        if self.turned:
            return whole[::-1]
        parted = self.third is not None and whole and whole[0] % 3 == 0
        return (whole[0] // 3, *whole[1:]) if parted else whole

    def take(self, whole: Tensor) -> Tensor:
        """What is meant of the file's tensor."""
        if self.turned:
            return whole.T
        return whole if self.third is None else whole.chunk(3)[self.third]


Sources = dict[str, Source]
"""By the names of a network's state dict."""


def named_alike(names: Iterable[str]) -> Sources:
    """Sources of a file that has the network's own names."""
    return {name: Source(name) for name in names}


def text_sources(shapes: Shapes) -> Sources:
    """transformers' names of a text tower in open_clip's layout."""
    return _sources(shapes, _TEXT, "text_model", {"text_projection": "text_projection.weight"})


def vision_sources(shapes: Shapes) -> Sources:
    """transformers' names of an image tower in open_clip's layout, its prefix `visual.` taken off."""
    return _sources(shapes, _VISION, "vision_model", {"proj": "visual_projection.weight"})


def _sources(shapes: Shapes, plain: dict[str, str], tower: str, turned: dict[str, str]) -> Sources:
    """What is not a name of open_clip's keeps its own, so that it is found to be unknown later."""
    found: Sources = {}
    for name, shape in shapes.items():
        layer = _in_layer(name)
        if name in turned:
            found[turned[name]] = Source(name, turned=len(shape) == 2)
        elif layer is None:
            found[plain.get(name, name)] = Source(name)
        else:
            found |= {f"{tower}.encoder.layers.{inner}": source for inner, source in layer.items()}
    return found


def _in_layer(name: str) -> Sources | None:
    match = re.fullmatch(r"transformer\.resblocks\.(\d{1,4})\.(.*?)(in_proj_)?(weight|bias)", name)
    if match is None:
        return None
    number, part, joined, kind = match.groups()
    if joined:
        return {f"{number}.self_attn.{x}_proj.{kind}": Source(name, third) for third, x in enumerate("qkv")}
    return {f"{number}.{_PARTS[part]}{kind}": Source(name)} if part in _PARTS else None
