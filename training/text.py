"""The text tower alone, before it learns to draw: each noun's row must say what it stands for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profusion.models.clip import TextModel
from profusion.models.configs import TOYBOX_TEXT
from profusion.models.tokenizer import END, tokenize
from profusion.toybox import world

from .data import Captions, DataSet
from .session import Session
from .stages import Stage


def _attributes(scene: world.Scene, caption: world.Caption) -> list[list[int]]:
    """For each object: noun, first colour, second colour, pattern as the caption names them (0 = unnamed)."""
    words = caption.text.split()
    colors, patterns = list(world.PALETTE), list(world.PATTERNS)
    rows = []
    for item, mentioned in zip(scene.objects, caption.attribute_words, strict=True):
        names = [words[i] for i in mentioned]
        named = [colors.index(name) + 1 for name in names if name in colors] + [0, 0]
        pattern = [patterns.index(name) + 1 for name in names if name in patterns] + [0]
        rows.append([world.NOUNS.index(item.noun), named[0], named[1], pattern[0]])
    return rows


def train_text(session: Session, data: DataSet) -> TextModel:
    """Text alone: each noun's row must say its noun and the attributes before it, so that the row carries appearance."""
    torch.manual_seed(session.recipe.seed + 1)
    text = TextModel(TOYBOX_TEXT)
    nn.init.normal_(text.text_model.embeddings.token_embedding.weight, std=0.05)
    nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.02)
    sizes = (len(world.NOUNS), len(world.PALETTE) + 1, len(world.PALETTE) + 1, len(world.PATTERNS) + 1)
    heads = nn.ModuleList([nn.Linear(TOYBOX_TEXT.width, size) for size in sizes])
    place = nn.Linear(TOYBOX_TEXT.width, len(world.BACKGROUNDS))
    modules = nn.ModuleDict({"text": text, "heads": heads, "place": place}).to(session.device)
    stage = Stage("text", modules, session, ema_decay=0.99, seed=1)

    def loss_of(step: int, generator: torch.Generator):
        rng = np.random.default_rng((1, step))
        indices = torch.randint(len(data), (64,), generator=generator).tolist()
        captions = [world.caption(data.scenes[i], rng) for i in indices]
        batch = Captions.of(captions, session)
        hidden = encode_text(text, batch.tokens, int(batch.lengths.max()) + 1).float()
        rows, targets, places, answers = [], [], [], []
        for b, (i, caption) in enumerate(zip(indices, captions, strict=True)):
            for k, labels in enumerate(_attributes(data.scenes[i], caption)):
                rows.append(hidden[b, batch.nouns[b, k]])
                targets.append(labels)
            if caption.background_words:
                places.append(hidden[b, caption.background_words[-1] + 1])
                answers.append(world.BACKGROUNDS.index(data.scenes[i].background))
        rows, targets = torch.stack(rows), session.put(torch.tensor(targets))
        loss = sum(F.cross_entropy(head(rows).float(), targets[:, k]) for k, head in enumerate(heads))
        loss = loss + F.cross_entropy(place(torch.stack(places)).float(), session.put(torch.tensor(answers)))
        return loss, {}

    stage.run(loss_of)
    return text


def encode_text(text: TextModel, tokens: Tensor, length: int) -> Tensor:
    """The first `length` rows only: the tower is causal, so later rows (padding) cannot change them."""
    embeddings = text.text_model.embeddings
    x = embeddings.token_embedding(tokens[:, :length]) + embeddings.position_embedding.weight[:length]
    return text.encode_embeddings(x)


def used_tokens(data: DataSet) -> Tensor:
    """Ids of every word the world can say; the file keeps the embedding rows of these alone."""
    rng = np.random.default_rng(0)
    texts = [world.caption(scene, rng).text for scene in data.scenes[:5000]]
    texts += [world.full_caption(scene).text for scene in data.scenes[:5000]]
    return torch.unique(torch.cat([tokenize(texts).flatten(), torch.tensor([END])]))
