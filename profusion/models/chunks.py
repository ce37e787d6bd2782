"""A prompt as the host's CLIP takes it: brackets weigh words, and long prompts go on in further chunks of 77 tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from ..problems import Explained
from .tokenizer import END, LENGTH, START, words_to_ids

ROOM = LENGTH - 2  # tokens of a chunk between its start and its end
BRACKET = 1.1  # times the weight around it, where a bracket gives no weight of its own
_KEPT_WHOLE = 8  # a part of a prompt with fewer tokens is not divided between two chunks
_HIDDEN = (("\\)", "\0\1", ")"), ("\\(", "\0\2", "("))  # written, meanwhile, and what they stand for
_EMBEDDING = re.compile(r"(?:^|\s)embedding:(\S*)")


class PromptError(Explained, ValueError):
    """A prompt that cannot be encoded as it is meant."""


class Token(NamedTuple):
    """A token's id, its weight, and which part of the prompt it is of, counted from 1; 0: start, end or padding."""

    id: int
    weight: float
    part: int


def weighted_parts(text: str) -> list[tuple[str, float]]:
    """A prompt's parts and their weights, as the host reads `(cat:1.2)`, `(cat)` and `\\(`.

    Raises PromptError for a weight that is not finite, and for brackets within brackets beyond all measure.
    """
    for written, meanwhile, _ in _HIDDEN:
        text = text.replace(written, meanwhile)
    try:
        parts = list(_weighted(text, 1.0))
    except RecursionError as problem:
        raise PromptError("the prompt has hundreds of brackets within each other: take some of them away") from problem
    for _, meanwhile, meant in _HIDDEN:
        parts = [(part.replace(meanwhile, meant), weight) for part, weight in parts]
    return parts


def _weighted(text: str, weight: float) -> Iterator[tuple[str, float]]:
    for part in _bracketed(text):
        if len(part) < 2 or part[0] != "(" or part[-1] != ")":
            yield part, weight
            continue
        inner, own = part[1:-1], BRACKET * weight
        before, _, number = inner.rpartition(":")
        if before and (given := _number(number)) is not None:
            inner, own = before, given
        yield from _weighted(inner, own)


def _number(text: str) -> float | None:
    """What follows a colon, if it is a weight."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        raise PromptError(f"the prompt has the weight {text.strip()}: give a finite one, such as 1.2")
    return number


def _bracketed(text: str) -> Iterator[str]:
    """The text in order: what is in outermost brackets, with them, and what is between."""
    start = depth = 0
    for index, letter in enumerate(text):
        if letter == "(":
            if depth == 0 and index > start:
                yield text[start:index]
                start = index
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                yield text[start : index + 1]
                start = index + 1
    if start < len(text):
        yield text[start:]


def chunks(text: str, pad: int | None = None, weights: bool = True) -> list[list[Token]]:
    """A prompt's tokens, 77 a chunk, with start, end and padding; at least one chunk.

    pad: what follows the end, None for the end token again. weights: whether brackets weigh; else they are letters.
    Raises PromptError, also where the prompt names an embedding: there is no folder of them here.
    """
    contents: list[list[Token]] = [[]]
    for number, (part, weight) in enumerate(weighted_parts(text) if weights else [(text, 1.0)], start=1):
        _check_embedding(part)
        tokens = [Token(token, weight, number) for token in words_to_ids(part)]
        divided = len(tokens) >= _KEPT_WHOLE
        while len(tokens) > (room := ROOM - len(contents[-1])):
            if divided:
                contents[-1] += tokens[:room]
                tokens = tokens[room:]
            contents.append([])
        contents[-1] += tokens
    return [_filled(content, END if pad is None else pad) for content in contents]


def _check_embedding(part: str) -> None:
    named = _EMBEDDING.search(part)
    if named is not None:
        raise PromptError(
            f"the prompt has the embedding {named[1]!r:.80}: embeddings are read in ComfyUI alone. Leave it out"
        )


def empty_chunk(pad: int | None = None) -> list[Token]:
    """The chunk of an empty prompt, from which weights are counted."""
    return _filled([], END if pad is None else pad)


def _filled(content: list[Token], pad: int) -> list[Token]:
    row = [Token(START, 1.0, 0), *content, Token(END, 1.0, 0)]
    return row + [Token(pad, 1.0, 0)] * (LENGTH - len(row))
