"""Which rows of a context are the tokens of a prompt: told from how many of both there are.

A model attends to rows that one text encoder makes of its tokens, or to those of several, one behind the other. An
encoder may leave out the first of them, which are a template's, and others give no rows at all, only a pooled vector.
None of this is written anywhere but in the host's code for each model, and all of it follows from the numbers: rows of
the context, tokens of each encoder, and how many of these stand before the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .infusion import UnsupportedModelError
from .prompt import Span

ADAPTED = "t5xxl_ids"
"""Among a host's CONDITIONING: tokens of which the model itself makes the rows that it attends to, as Anima does."""


@dataclass(frozen=True)
class Encoder:
    """What a text encoder reads of a prompt.

    tokens: how many. before: how many of them are its template's, before the prompt. is_clip: whether its tokens are
    CLIP's; several such encoders read the same ones, and give one set of rows.
    """

    tokens: int
    before: int = 0
    is_clip: bool = False


def first_rows(encoders: Mapping[str, Encoder], rows: int) -> dict[str, int]:
    """The context's row of each encoder's first token, by the encoder's name, of those that give it rows.

    A token that was left out would be at a row below 0. rows: how many the context has. Raises UnsupportedModelError
    where the numbers do not say which rows are whose.
    """
    clips = {name: encoder for name, encoder in encoders.items() if encoder.is_clip}
    others = {name: encoder for name, encoder in encoders.items() if not encoder.is_clip}
    clip_rows = min((encoder.tokens for encoder in clips.values()), default=0)
    # CLIP's rows come first where there are any.
    fits = [
        {**dict.fromkeys(clips if ahead else (), 0), name: rows - encoder.tokens}
        for ahead in sorted({0, clip_rows})
        for name, encoder in others.items()
        if 0 <= encoder.tokens + ahead - rows <= (0 if ahead else encoder.before)
    ]
    if not others and clip_rows == rows:
        fits = [dict.fromkeys(clips, 0)]
    if len(fits) != 1:
        read = ", ".join(f"{encoder.tokens} of {name}" for name, encoder in encoders.items())
        raise UnsupportedModelError(
            f"the clip makes {rows} rows of a prompt's tokens ({read}), so that nobody can tell which are the noun's: "
            "connect the clip that belongs to the model, without a pack that changes its encoding"
        )
    return fits[0]


def rows_of_nouns(found: Mapping[str, Sequence[Span]], first: Mapping[str, int], noun: str, text: str) -> list[Span]:
    """The context's rows of each occurrence of a noun: those of all encoders that give it rows.

    found: the noun's places among each encoder's tokens. first: see `first_rows`. Raises ValueError where encoders
    disagree on how often the noun is there.
    """
    counts = {name: len(found[name]) for name in first}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the text encoders {', '.join(counts)} disagree on where {noun!r} is in the prompt {text!r}")
    occurrences = zip(*(found[name] for name in first), strict=True)
    return [
        tuple(sorted({row + first[name] for name, span in zip(first, spans, strict=True) for row in span}))
        for spans in occurrences
    ]
