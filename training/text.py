"""The text tower, before anything is drawn from it: each noun's row must say what it stands for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profusion.models.clip import TextModel
from profusion.models.tokenizer import END, tokenize
from profusion.toybox import world
from profusion.toybox.configs import TOYBOX_TEXT

from .data import Captions, DataSet
from .session import Session
from .stages import TrainingStage

TABLE = "text_model.embeddings.token_embedding.weight"


@cache
def vocabulary() -> Tensor:
    """Ids of every token that a caption of the world may hold, rising; the tower is trained with these alone."""
    words = ("a an and", *world.NOUNS, *world.PALETTE, *world.PATTERNS, *world.BACKGROUND_PHRASES.values())
    return torch.unique(tokenize([*words, *world.OPENINGS]))


def compact(tokens: Tensor) -> Tensor:
    """Ids of the world's tokens as places in `vocabulary`."""
    return torch.searchsorted(vocabulary().to(tokens.device), tokens.contiguous())


def whole(text: TextModel) -> TextModel:
    """The tower with CLIP's whole table, on the same device; words that the world does not have are zero."""
    state = text.state_dict()
    table = state[TABLE].new_zeros(TOYBOX_TEXT.vocabulary, TOYBOX_TEXT.width)
    table[vocabulary().to(table.device)] = state[TABLE]
    full = TextModel(TOYBOX_TEXT).to(table.device)
    full.load_state_dict(state | {TABLE: table})
    return full.eval().requires_grad_(False)


def check_vocabulary() -> None:
    """Every word the world uses must be one token, or `Captions` would point at the wrong rows; and all must be
    known."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        text = world.caption(world.sample_scene(rng), rng).text
        tokens = tokenize(text)[0]
        if int((tokens == END).int().argmax()) != len(text.split()) + 1:
            raise ValueError(f"a word of {text!r} is more than one token")
        if not torch.isin(tokens, vocabulary()).all():
            raise ValueError(f"a word of {text!r} is not in the vocabulary")


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
    """Text alone: each noun's row must say its noun and the attributes before it, so that the row carries
    appearance."""
    torch.manual_seed(session.recipe.seed + 1)
    text = TextModel(replace(TOYBOX_TEXT, vocabulary=len(vocabulary())))
    nn.init.normal_(text.text_model.embeddings.token_embedding.weight, std=0.05)
    nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.02)
    sizes = (len(world.NOUNS), len(world.PALETTE) + 1, len(world.PALETTE) + 1, len(world.PATTERNS) + 1)
    heads = nn.ModuleList([nn.Linear(TOYBOX_TEXT.width, size) for size in sizes])
    place = nn.Linear(TOYBOX_TEXT.width, len(world.BACKGROUNDS))
    modules = nn.ModuleDict({"text": text, "heads": heads, "place": place}).to(session.device)
    stage = TrainingStage("text", modules, session, ema_decay=0.99, seed=1)

    def loss_of(step: int, generator: torch.Generator):
        rng = np.random.default_rng((1, step))
        indices = torch.randint(len(data), (64,), generator=generator).tolist()
        captions = [world.caption(data.scenes[i], rng) for i in indices]
        batch = Captions.of(captions, session)
        hidden = encode_text(text, batch.tokens, int(batch.lengths.max()) + 1).float()
        rows, targets, places, answers = [], [], [], []
        for b, (i, caption) in enumerate(zip(indices, captions, strict=True)):
            for k, labels in enumerate(_attributes(data.scenes[i], caption)):
                rows.append(hidden[b, caption.noun_words[k] + 1])
                targets.append(labels)
            if caption.background_words:
                places.append(hidden[b, caption.background_words[-1] + 1])
                answers.append(world.BACKGROUNDS.index(data.scenes[i].background))
        rows, targets = torch.stack(rows), session.put(torch.tensor(targets))
        said = [head(rows).float() for head in heads]
        loss = sum(F.cross_entropy(logits, targets[:, k]) for k, logits in enumerate(said))
        loss = loss + F.cross_entropy(place(torch.stack(places)).float(), session.put(torch.tensor(answers)))
        right = torch.stack([logits.argmax(dim=1) == targets[:, k] for k, logits in enumerate(said)]).all(dim=0)
        return loss, {"right": right.float().mean()}

    stage.run(loss_of)
    return text


def encode_text(text: TextModel, tokens: Tensor, length: int) -> Tensor:
    """The first `length` rows only: the tower is causal, so later rows (padding) cannot change them. tokens (B, 77):
    ids."""
    embeddings = text.text_model.embeddings
    x = embeddings.token_embedding(compact(tokens[:, :length])) + embeddings.position_embedding.weight[:length]
    return text.encode_embeddings(x)
