"""Backbones of libraries that people may have installed: open_clip's CLIP models, and timm's, among them DINO.

Nothing else in the pack needs these libraries. They look for weights where they keep them, and may download them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..pictures import to_image
from .checks import MetricError

OPENAI = "openai"
CLIP_MODELS = {
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
    "RN50": "RN50",
    "RN101": "RN101",
    "RN50x4": "RN50x4",
    "RN50x16": "RN50x16",
    "RN50x64": "RN50x64",
}
"""The nine models of the ProFusion paper's table (arXiv 2305.13579), all that OpenAI released: their
names there -> in open_clip."""

DINO = "vit_small_patch16_224.dino"
"""The backbone of the papers' DINO column (arXiv 2208.12242, section 4): timm's name for DINO's ViT-S/16."""


class OpenClip:
    """A CLIP model of open_clip. name: "ViT-B/32" and the like, or open_clip's own;
    weights: the tag of its training."""

    measure = "CLIP-I"

    def __init__(self, name: str, weights: str | None = OPENAI):
        try:
            import open_clip
        except ImportError as error:
            raise MetricError("open_clip is not installed: pip install open_clip_torch, or choose toybox") from error
        model = CLIP_MODELS.get(name, name)
        try:
            # OpenAI trained with QuickGELU; open_clip's own configurations say so for some of its models only.
            self._model, _, self._preprocess = open_clip.create_model_and_transforms(
                model, pretrained=weights, force_quick_gelu=weights == OPENAI
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise MetricError(f"open_clip cannot make {name} with the weights {weights}: {error}") from error
        self._tokenize = open_clip.get_tokenizer(model)
        self._model.eval().requires_grad_(False)
        self.name = f"open_clip {name}, {weights}"

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        return self._model.encode_image(_preprocessed(self._preprocess, pictures)).float()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self._model.encode_text(self._tokenize(list(texts))).float()


class Timm:
    """An image model of timm, by its name there. weights: False for random ones."""

    def __init__(self, name: str = DINO, weights: bool = True):
        try:
            import timm
        except ImportError as error:
            raise MetricError("timm is not installed: pip install timm, or leave the further backbone out") from error
        try:
            self._model = timm.create_model(name, pretrained=weights, num_classes=0).eval().requires_grad_(False)
        except (RuntimeError, OSError) as error:
            raise MetricError(f"timm cannot make {name}: {error}") from error
        self._preprocess = timm.data.create_transform(**timm.data.resolve_data_config({}, model=self._model))
        self.name, self.measure = f"timm {name}", "DINO" if "dino" in name else "image similarity"

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        return self._model(_preprocessed(self._preprocess, pictures)).float()


def _preprocessed(preprocess: Any, pictures: Tensor) -> Tensor:
    """The libraries' own way from PIL to pixels: (B, H, W, 3) in [0, 1] -> (B, 3, size, size)."""
    return torch.stack([preprocess(to_image(picture)) for picture in pictures])
