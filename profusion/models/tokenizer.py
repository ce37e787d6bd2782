"""CLIP's byte-pair tokenizer: transformers' own, with the vocabulary that ships with the
pack (OpenAI CLIP, MIT licence).

transformers is imported once a text is tokenised, not with this module.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END, LENGTH = 49406, 49407, 77
FOLDER = Path(__file__).with_name("clip_tokenizer")


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(str(FOLDER), local_files_only=True).backend_tokenizer


def words_to_ids(text: str) -> list[int]:
    """The ids of a text, without start and end."""
    return _tokenizer().encode(text, add_special_tokens=False).ids


def id_to_text(token: int) -> str:
    """A token's text; it ends in "</w>" where the token ends a word."""
    return _tokenizer().id_to_token(token) or ""


def tokenize(texts: str | list[str], pad: int | None = None) -> Tensor:
    """Texts -> ids (B, 77) with start, end and padding. Longer ones are cut; `chunks` goes on, and reads weights.

    pad: what follows the end, None for the end token again.
    """
    texts = [texts] if isinstance(texts, str) else texts
    rows = torch.full((len(texts), LENGTH), END if pad is None else pad, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        ids = [START, *words_to_ids(text)[: LENGTH - 2], END]
        row[: len(ids)] = torch.tensor(ids)
    return rows
