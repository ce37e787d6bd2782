"""The host's CLIP and CLIP_VISION as backbones of the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.image_encoders.dino2
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from torch import Tensor

from ...profusion.metrics import MetricError
from ...profusion.metrics.encoders import ImageEncoder, PairedEncoder

_NAMES = {
    ("CLIPVisionModelProjection", 24, 224): "CLIP ViT-L/14",
    ("CLIPVisionModelProjection", 24, 336): "CLIP ViT-L/14@336px",
    ("CLIPVisionModelProjection", 32, 224): "CLIP ViT-H/14",
    ("CLIPVisionModelProjection", 48, 224): "CLIP ViT-bigG/14",
    ("CLIPVisionModelProjection", 27, 384): "SigLIP SO400M/14@384px",
    ("CLIPVisionModelProjection", 27, 512): "SigLIP 2 SO400M/16@512px",
    ("Dinov2Model", 24, 224): "DINOv2 ViT-L/14",
    ("Dinov2Model", 24, 518): "DINOv2 ViT-L/14",
    ("Dinov2Model", 40, 224): "DINOv2 ViT-g/14",
    ("Dinov2Model", 40, 518): "DINOv2 ViT-g/14",
}


class VisionEncoder:
    """A CLIP_VISION: CLIP, SigLIP or DINOv2, as Load CLIP Vision gives it."""

    def __init__(self, vision: ClipVisionModel):
        self._vision = vision
        network = vision.model
        dino = isinstance(network, comfy.image_encoders.dino2.Dinov2Model)
        layers = len(network.encoder.layer if dino else network.vision_model.encoder.layers)
        kind = type(network).__name__
        self.name = _NAMES.get(
            (kind, layers, vision.image_size), f"{kind}, {layers} layers, {vision.image_size} pixels"
        )
        self.measure = "DINO" if dino else "CLIP-I"

    def images(self, pictures: Tensor) -> Tensor:
        features = self._vision.encode_image(pictures)["image_embeds"].float()
        return features.mean(dim=1) if features.ndim == 3 else features  # SigLIP's are those of its patches


class ClipPair(VisionEncoder):
    """A CLIP_VISION with the text encoder of a CLIP that was trained with it, projections included."""

    def __init__(self, clip: CLIP, vision: ClipVisionModel):
        super().__init__(vision)
        projection = getattr(vision.model, "visual_projection", None)
        width = projection.weight.shape[0] if isinstance(projection, torch.nn.Module) else None
        towers = {name: getattr(clip.cond_stage_model, f"clip_{name}", None) for name in clip.tokenize("")}
        widths = {
            name: tower.transformer.text_projection.weight.shape[0]
            for name, tower in towers.items()
            if hasattr(getattr(tower, "transformer", None), "text_projection")
        }
        fitting = [name for name, found in widths.items() if found == width]
        if not fitting:
            raise MetricError(
                "clip and clip_vision were not trained together: the text encoders make features of "
                f"{list(widths.values())} numbers and {self.name} of {width}. Connect the CLIP that goes with it "
                "(ViT-L: CLIP Loader with clip_l; ViT-H: that of an SD 2.x checkpoint; ViT-bigG: that of SDXL), or "
                "leave clip out"
            )
        self._clip, self._tower, self._encoder = clip, towers[fitting[0]], fitting[0]

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.cat([self._text(text) for text in texts])

    def _text(self, text: str) -> Tensor:
        """(1, D), of the first 75 tokens. The host gives SD 1.x's without its projection, which images have, too."""
        self._clip.load_model()
        tokens = self._clip.tokenize(text, disable_weights=True)[self._encoder]
        self._tower.reset_clip_options()
        self._tower.set_clip_options({"projected_pooled": True})
        try:
            return self._tower.encode_token_weights(tokens)[1].float()
        finally:
            self._tower.reset_clip_options()


class _Watched:
    """A backbone that tells of each batch of pictures, so that there is a progress bar, and Cancel."""

    def __init__(self, encoder: ImageEncoder, tell: Callable[[], None]):
        self.name, self.measure, self._encoder, self._tell = encoder.name, encoder.measure, encoder, tell

    def images(self, pictures: Tensor) -> Tensor:
        features = self._encoder.images(pictures)
        self._tell()
        return features


class _WatchedPair(_Watched):
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self._encoder.texts(texts)


def watched(encoder: ImageEncoder, tell: Callable[[], None]) -> ImageEncoder:
    """An encoder that calls `tell` after each batch of pictures."""
    return (_WatchedPair if isinstance(encoder, PairedEncoder) else _Watched)(encoder, tell)
