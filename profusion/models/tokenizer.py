"""CLIP's byte-pair tokenizer, built from the merges that ship with the pack (OpenAI CLIP, MIT licence)."""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

START, END, LENGTH = 49406, 49407, 77
MERGES = Path(__file__).with_name("clip_bpe_merges.txt.gz")
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    merges = [tuple(line.split()) for line in gzip.decompress(MERGES.read_bytes()).decode().splitlines()]
    letters = _byte_letters()
    words = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    model = models.BPE(
        vocab={word: index for index, word in enumerate(words)},
        merges=merges,
        end_of_word_suffix="</w>",
        unk_token="<|endoftext|>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in CLIP's vocabulary order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(hidden))]


def words_to_ids(text: str) -> list[int]:
    """The ids of a text, without start and end."""
    return _tokenizer().encode(text, add_special_tokens=False).ids


def id_to_text(token: int) -> str:
    """A token's text; it ends in "</w>" where the token ends a word."""
    return _tokenizer().id_to_token(token) or ""


def tokenize(texts: str | list[str]) -> Tensor:
    """Prompts -> ids (B, 77) with start, end and end-padding. Longer prompts are cut: the kernel has no chunks."""
    texts = [texts] if isinstance(texts, str) else texts
    rows = torch.full((len(texts), LENGTH), END, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        ids = [START, *words_to_ids(text)[: LENGTH - 2]]
        row[: len(ids)] = torch.tensor(ids)
    return rows
