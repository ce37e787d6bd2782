"""The image tower, by CLIP's contrastive loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from profusion.models.clip import TextModel, VisionModel
from profusion.models.tokenizer import tokenize
from profusion.toybox import world
from profusion.toybox.configs import TOYBOX_VISION

from .data import DataSet
from .session import Session
from .stages import TrainingStage
from .text import encode_text


def train_vision(session: Session, data: DataSet, text: TextModel) -> VisionModel:
    """CLIP's contrastive loss against the finished text tower, of which only the projection still moves."""
    torch.manual_seed(session.recipe.seed + 3)
    vision = VisionModel(TOYBOX_VISION)
    text.requires_grad_(False)
    text.text_projection.requires_grad_(True)
    scale = nn.ParameterDict({"log": nn.Parameter(torch.tensor(2.7))})
    modules = nn.ModuleDict({"vision": vision, "projection": text.text_projection, "scale": scale}).to(session.device)
    stage = TrainingStage("vision", modules, session, ema_decay=0.99, seed=3)

    def loss_of(step: int, generator: torch.Generator):
        rng = np.random.default_rng((3, step))
        indices = torch.randint(len(data), (64,), generator=generator)
        scenes = [data.scenes[i] for i in indices.tolist()]
        captions = [world.full_caption(s) if rng.random() < 0.7 else world.caption(s, rng) for s in scenes]
        tokens = session.put(tokenize([caption.text for caption in captions]))
        length = max(len(caption.text.split()) for caption in captions) + 2
        with torch.no_grad():
            hidden = encode_text(text, tokens, length)
        pooled_rows = text.pool(hidden, tokens[:, :length])
        words = F.normalize(text.text_projection(pooled_rows), dim=-1)
        images = vision.embed(vision.preprocess((session.put(data.pixels(indices)) + 1).movedim(1, -1) / 2))
        logits = (images.float() @ words.float().T) * scale["log"].exp().clamp(max=100)
        same = (tokens[:, None] == tokens[None]).all(dim=-1).float()  # equal captions are no negatives of each other
        target, target_t = same / same.sum(dim=1, keepdim=True), same / same.sum(dim=0, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target_t.T)) / 2
        right = (target.gather(1, logits.argmax(dim=1, keepdim=True)) > 0).float().mean()
        return loss, {"top1": right}

    stage.run(loss_of)
    return vision.eval()


def write_host_config(folder: Path) -> None:
    """The tower's sizes in the file from which the host reads them, beside the weights."""
    config = TOYBOX_VISION
    sizes = {
        "model_type": "clip_vision_model",
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate,
        "hidden_act": "quick_gelu",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "projection_dim": config.projection,
    }
    (folder / "clip_vision_config.json").write_text(json.dumps(sizes, indent=2) + "\n")
