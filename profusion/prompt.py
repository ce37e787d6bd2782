"""Find a class noun in a tokenised prompt.

CLIP's tokenizer lower-cases, splits a text into words and a word into sub-tokens; the last sub-token of a word says so
(its text ends in "</w>"). "snowball" is "snow", "ball</w>" and holds no word "ball"; a plural is another word, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .problems import Explained

OCCURRENCES = ("auto", "all", "first", "second", "third", "fourth", "last")

_IRREGULAR = (
    ("man", "men"),
    ("woman", "women"),
    ("person", "people"),
    ("child", "children"),
    ("mouse", "mice"),
    ("goose", "geese"),
    ("foot", "feet"),
    ("tooth", "teeth"),
    ("ox", "oxen"),
    ("cactus", "cacti"),
)

Span = tuple[int, ...]
Chunk = Sequence[tuple[Any, int]]


@dataclass(frozen=True)
class Wanted:
    """A concept that is to have a place in a prompt. name: what a message calls it. occurrence: one of OCCURRENCES."""

    name: str
    noun: str
    occurrence: str = "auto"


class NounError(Explained, ValueError):
    """A prompt has no place for a concept."""


def find_noun(chunks: Sequence[Chunk], noun: Sequence[int], ends_word: Callable[[int], bool]) -> list[Span]:
    """All places at which a prompt has a noun as whole words.

    chunks: the prompt as (token, word id) pairs, chunk by chunk as the text encoder takes them. Word id 0 marks the
    start token, the end token and padding. A token may be an embedding instead of an id.
    noun: the noun's token ids. `ends_word(token)`: whether a token's text ends a word.

    Returns the context rows of each occurrence, in order, none overlapping; a word may be split between chunks.
    """
    entries = [entry for chunk in chunks for entry in chunk]
    words = [(row, token) for row, (token, word) in enumerate(entries) if word != 0]
    # Embeddings match nothing and are words of their own.
    tokens = [token if isinstance(token, int) else None for _, token in words]
    spans, index, noun = [], 0, list(noun)
    while noun and index + len(noun) <= len(words):
        end = index + len(noun)
        starts_word = index == 0 or tokens[index - 1] is None or ends_word(tokens[index - 1])
        found = tokens[index:end] == noun and starts_word and ends_word(noun[-1])
        if found:
            spans.append(tuple(row for row, _ in words[index:end]))
        index = end if found else index + 1
    return spans


def form_to_write(text: str, noun: str) -> str:
    """What to change in a prompt that lacks a noun as a word of its own, where it has another form of it; else "".

    Found are plurals, the singular of a plural, words that are joined, hyphenated or apart, and longer words.
    """
    words = [word for word in re.split(r"[-_\s]+", noun) if word]
    if not words:
        return ""
    *first, last = map(re.escape, words)
    forms = "|".join(re.escape(form) for form in sorted(_numbers(words[-1]), key=len, reverse=True))
    pattern = "[-_\\s]*".join([*first, f"(?:{forms})"])
    found = re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)
    if found and found[0].lower() != noun.lower():
        return f"Write {noun!r} where it has {found[0]!r}."
    inside = re.search("[-_ ]*".join([*first, last]), text, re.IGNORECASE)
    if inside is None:
        return ""
    return f"Write {noun!r} as a word of its own: it is only a part of {_to_blanks(text, *inside.span())!r}."


def _to_blanks(text: str, start: int, end: int) -> str:
    """A part of a text, widened to the blanks around it."""
    while start and not text[start - 1].isspace():
        start -= 1
    while end < len(text) and not text[end].isspace():
        end += 1
    return text[start:end]


def _numbers(word: str) -> set[str]:
    """A noun, and what its plural or its singular may be: English, and roughly."""
    word = word.lower()
    forms = {word, f"{word}s", f"{word}es", word.removesuffix("s"), word.removesuffix("es")}
    forms |= {re.sub("y$", "ies", word), re.sub("ies$", "y", word), re.sub("fe?$", "ves", word)}
    forms |= {re.sub("ves$", end, word) for end in ("f", "fe")}
    forms |= {other for pair in _IRREGULAR if word in pair for other in pair}
    return {form for form in forms if form}


def choose_spans(spans: Sequence[Span], occurrence: str, turn: int = 0, sharing: int = 1) -> list[Span]:
    """The occurrences of a noun that one concept takes.

    "auto": every one, but where `sharing` concepts have the same noun, they take one each in order, this concept the
    one whose `turn` it is (0, 1, ...). "all", "last", or "first" to "fourth": just that. Raises NounError if there is
    no such occurrence.
    """
    if occurrence not in OCCURRENCES:
        raise ValueError(f"occurrence={occurrence!r}; choose one of {', '.join(OCCURRENCES)}")
    chosen = list(spans)
    if occurrence == "auto" and sharing > 1:
        chosen = chosen[turn : turn + 1]
        occurrence = f"number {turn + 1}"
    elif occurrence == "last":
        chosen = chosen[-1:]
    elif occurrence not in ("auto", "all"):
        index = OCCURRENCES.index(occurrence) - OCCURRENCES.index("first")
        chosen = chosen[index : index + 1]
    if not chosen:
        raise NounError(f"occurrence {occurrence} was asked for, and there are {len(spans)}")
    return chosen


def rows_of(wanted: Sequence[Wanted], index: int, text: str, spans_of: Callable[[str], Sequence[Span]]) -> Span:
    """The context rows that one of several concepts takes in a prompt; see `choose_spans`.

    spans_of: the places of a noun in this prompt, as `find_noun` gives them. Raises NounError, which names the concept,
    quotes the prompt and says what to write where it has another form of the noun.
    """
    one = wanted[index]
    sharing = [number for number, other in enumerate(wanted) if other.occurrence == "auto" and _same_noun(other, one)]
    spans = spans_of(one.noun)
    if not spans:
        advice = form_to_write(text, one.noun)
        raise NounError(
            f"{one.name} is of the noun {one.noun!r}, which is not a word of the prompt {text!r}"
            + (f". {advice}" if advice else "")
        )
    turn = sharing.index(index) if index in sharing else 0
    try:
        chosen = choose_spans(spans, one.occurrence, turn, len(sharing))
    except NounError as error:
        raise NounError(f"{one.name}: {error} of the noun {one.noun!r} in the prompt {text!r}") from error
    return tuple(row for span in chosen for row in span)


def _same_noun(one: Wanted, other: Wanted) -> bool:
    return one.noun.lower().split() == other.noun.lower().split()
