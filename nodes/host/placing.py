"""Where a noun is in the host's prompts, and the concepts that a CONDITIONING carries there into sampling."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...profusion.infusion import (
    CONCEPTS_KEY,
    Layer,
    PlacedConcept,
    Placement,
    UnsupportedModelError,
    check_context_width,
)
from ...profusion.pieces import WORD_START, Pieces
from ...profusion.prompt import NounError, Span, Wanted, find_noun, rows_of
from ...profusion.promptnet.pseudo_word import WORD_KEY, with_stand_in
from ...profusion.residual import Residual, check_architecture
from ...profusion.residual.training import NOUN_PROMPTS
from ...profusion.text_rows import ADAPTED, Encoder, first_rows, rows_of_nouns

if TYPE_CHECKING:
    from comfy.sd import CLIP

MORE_CONCEPTS = ("_2", "_3", "_4")


def noun_spans(
    clip: CLIP, text: str, noun: str, pseudo_words: int = 0, encoded: Callable[[], list] | None = None
) -> list[Span]:
    """The context rows of each occurrence of a noun in a prompt, as this CLIP tokenises both.

    pseudo_words: tokens of the S* that the prompt has, if it has one. encoded: gives the prompt's CONDITIONING, for
    whoever has it; it is asked where a text encoder is not CLIP.
    """
    if pseudo_words:
        text, _ = with_stand_in(text, pseudo_words)
    if not reads_as_clip(clip):
        return _spans_of_text(clip, text, noun, encoded)

    def ends_word(token: int) -> bool:
        return clip.tokenizer.untokenize([(token, 1.0)])[0][1].endswith("</w>")

    prompt = clip.tokenize(text, return_word_ids=True)
    nouns = clip.tokenize(noun, return_word_ids=True, disable_weights=True)
    found = []
    for encoder, chunks in prompt.items():
        words = [[(token, word) for token, _, word in chunk] for chunk in chunks]
        noun_tokens = [token for chunk in nouns[encoder] for token, _, word in chunk if word != 0]
        if not noun_tokens:
            raise NounError(
                f"noun={noun!r} has no word in it that the text encoder {encoder!r} reads: give one such as cat"
                + (", and no embedding" if "embedding:" in noun else "")
            )
        if not all(isinstance(token, int) for token in noun_tokens):
            raise NounError(
                f"noun={noun!r} is an embedding, and Infusion acts at a word. Give the class of what it shows, "
                f"such as cat, and put {noun!r} into the prompt beside it"
            )
        if not ends_word(noun_tokens[-1]):
            raise UnsupportedModelError(
                f"Infusion finds nouns in CLIP's tokens, and text encoder {encoder!r} is not CLIP"
            )
        found.append(find_noun(words, noun_tokens, ends_word))
    if any(spans != found[0] for spans in found):
        raise ValueError(f"the text encoders {', '.join(prompt)} disagree on where {noun!r} is in the prompt {text!r}")
    return found[0]


def _spans_of_text(clip: CLIP, text: str, noun: str, encoded: Callable[[], list] | None) -> list[Span]:
    """`noun_spans` where T5 or a language model reads the prompt, alone or beside CLIP."""
    if "embedding:" in noun:
        raise NounError(
            f"noun={noun!r} is an embedding, and Infusion acts at a word. Give the class of what it shows, "
            f"such as cat, and put {noun!r} into the prompt beside it"
        )
    reading = read_by_encoders(clip, text)
    found = {name: read.pieces.find(noun) for name, read in reading.items()}
    if not any(found.values()):
        _check_readable(clip, noun, [name for name, read in reading.items() if not read.encoder.is_clip])
        return []
    context, extras = (encode_prompt(clip, text, ()) if encoded is None else encoded())[0]
    if ADAPTED in extras:
        # The model makes the rows that it attends to of these tokens, one of each.
        first = dict.fromkeys((name for name in reading if ADAPTED.startswith(name)), 0)
    else:
        first = first_rows({name: read.encoder for name, read in reading.items()}, context.shape[1])
    _check_readable(clip, noun, [name for name in first if not found[name]])
    return rows_of_nouns(found, first, noun, text)


def _check_readable(clip: CLIP, noun: str, encoders: Sequence[str]) -> None:
    """Raise NounError for a noun that one of these text encoders would not find in its own text."""
    alone = read_by_encoders(clip, re.sub(r"([()])", r"\\\1", noun)) if encoders else {}
    for name in encoders:
        if not alone[name].pieces.find(noun):
            raise NounError(
                f"noun={noun!r} has no word in it that the text encoder {name!r} reads: give one such as cat"
            )


def reads_as_clip(clip: CLIP) -> bool:
    """Whether each of its text encoders reads as CLIP's tokenizer writes, as far as anybody can tell."""
    tokenizers = [tokenizer_of(clip, name) for name in clip.tokenize("")]
    return all(tokenizer is None or _is_clip(tokenizer) for tokenizer in tokenizers)


def tokenizer_of(clip: CLIP, name: str) -> Any:
    """The tokenizer of one text encoder, by the name that its tokens have; None where there is none of that name."""
    named = (getattr(clip.tokenizer, attribute, None) for attribute in (name, f"clip_{name}"))
    return next((one for one in named if hasattr(one, "inv_vocab")), None)


def _is_clip(tokenizer: Any) -> bool:
    return any(piece.endswith("</w>") for piece in tokenizer.inv_vocab.values())


@dataclass(frozen=True)
class Read:
    """A prompt as one text encoder reads it."""

    pieces: Pieces
    encoder: Encoder


def read_by_encoders(clip: CLIP, text: str) -> dict[str, Read]:
    """A text as each text encoder reads it, by name: those that are loaded.

    One that reads not the prompt but what is in quotation marks in it, as the host has one, is left out.
    """
    empty = clip.tokenize("", return_word_ids=True)
    return {
        name: _read(tokenizer_of(clip, name), chunks, empty[name])
        for name, chunks in clip.tokenize(text, return_word_ids=True).items()
        if name in empty and _is_loaded(clip, name)
    }


def _is_loaded(clip: CLIP, name: str) -> bool:
    """The host's SD3 goes without those encoders that its files lack, and has None for each."""
    stage = clip.cond_stage_model
    return not any(hasattr(stage, own) and getattr(stage, own) is None for own in (name, f"clip_{name}"))


def _read(tokenizer: Any, chunks: list, empty: list) -> Read:
    is_clip = _is_clip(tokenizer)
    in_bytes = is_clip or not any(WORD_START in piece for piece in tokenizer.inv_vocab.values())
    pieces = Pieces(_pieces(tokenizer, chunks), _pieces(tokenizer, empty), in_bytes=in_bytes)
    return Read(pieces, Encoder(sum(map(len, chunks)), pieces.before, is_clip))


def _pieces(tokenizer: Any, chunks: list) -> list[str | None]:
    """What the vocabulary has for each token; None for those that are no text (special ones, padding, embeddings)."""
    return [
        tokenizer.inv_vocab.get(token) if word != 0 and isinstance(token, int) else None
        for chunk in chunks
        for token, _, word in chunk
    ]


def encode_prompt(
    clip: CLIP, text: str, concepts: Sequence[PlacedConcept], encoded: Callable[[], list] | None = None
) -> list:
    """A CONDITIONING of the prompt that carries these concepts. encoded: see `noun_spans`."""
    tokens = clip.tokenize(text)
    conditioning = clip.encode_from_tokens_scheduled(tokens) if encoded is None else encoded()
    times = _rows_of_token(clip, tokens, conditioning) if concepts else 1
    return carrying(conditioning, [_with_rows_of_token(concept, times) for concept in concepts])


def _rows_of_token(clip: CLIP, tokens: dict, conditioning: list) -> int:
    """How many rows of its context a CLIP makes of a token: packs that part keys from values have two.

    1 where T5 or a language model reads the prompt, and rows have been counted in the context.
    """
    if not reads_as_clip(clip):
        return 1
    count = min(sum(map(len, chunks)) for chunks in tokens.values())
    times, rest = divmod(conditioning[0][0].shape[1], count)
    if rest or not times:
        raise UnsupportedModelError(
            f"the clip makes {conditioning[0][0].shape[1]} rows of {count} tokens, so that nobody can tell which are "
            "the noun's: connect a clip without the pack that changes its encoding"
        )
    return times


def _at_rows_of_token(span: Span, times: int) -> Span:
    return tuple(times * row + part for row in span for part in range(times))


def _with_rows_of_token(concept: PlacedConcept, times: int) -> PlacedConcept:
    """A concept at all rows of its tokens: only values are moved, and a pack takes those of its value rows."""
    if times == 1:
        return concept
    placement = concept.placement
    delta = placement.delta.repeat_interleave(times, 1) if placement.delta.shape[1] > 1 else placement.delta
    rows = _at_rows_of_token(placement.rows, times)
    return replace(concept, placement=replace(placement, delta=delta, rows=rows))


def carrying(conditioning: list, concepts: Sequence[PlacedConcept]) -> list:
    """The CONDITIONING with these concepts beside those that it carries already."""
    return [
        [context, {**extras, CONCEPTS_KEY: (*extras.get(CONCEPTS_KEY, ()), *concepts)}]
        for context, extras in conditioning
    ]


def placed_in(
    clip: CLIP,
    text: str,
    conditioning: list,
    concepts: Sequence[PlacedConcept],
    encoded: Callable[[], list] | None = None,
) -> list:
    """A CONDITIONING that is encoded already, with these concepts in each entry that is of this text.

    An entry with S* knows its own prompt; any other one must be what this CLIP makes of the text, at whichever of its
    last layers, and however scaled. encoded: see `noun_spans`. Raises ValueError where none is: the concepts might be
    put on other words.
    """
    own = encode_prompt(clip, text, (), encoded)
    fits = [WORD_KEY in entry[1] or _is_one_of(entry, own) for entry in conditioning]
    for layer in _LAYERS if reads_as_clip(clip) else ():  # as CLIP Set Last Layer sets it
        if not any(fits):
            skipping = clip.clone()
            skipping.clip_layer(layer)
            fits = [_is_one_of(entry, encode_prompt(skipping, text, ())) for entry in conditioning]
    if not any(fits):
        rows, expected = conditioning[0][0].shape[1], own[0][0].shape[1]
        why = (
            f"nouns stand elsewhere in it. It has {rows} rows, and the text makes {expected}"
            if rows != expected
            else "nouns may stand elsewhere in it: it is encoded otherwise than this clip encodes the text"
        )
        raise ValueError(
            f"conditioning is not of the prompt in text, {text!r}: {why}. Encode this text with the same clip and "
            "connect that, or leave conditioning unconnected"
        )
    times = _rows_of_token(clip, clip.tokenize(text), own)
    concepts = [_with_rows_of_token(concept, times) for concept in concepts]
    return [carrying([entry], concepts)[0] if fit else entry for entry, fit in zip(conditioning, fits, strict=True)]


_LAYERS = (-1, -2, -3)
_ALIKE = 0.995  # a cosine: devices and precisions leave more of it, another word less


def _is_one_of(entry: list, own: list) -> bool:
    """Whether each row of an entry's context has the direction that it has in one of these: a pack may scale it."""
    return any(entry[0].shape == other.shape and _least_cosine(entry[0], other) >= _ALIKE for other, _ in own)


def _least_cosine(context: Tensor, other: Tensor) -> float:
    """Of two contexts (B, L, D), the cosine of those rows that differ most; padding may be zero in both."""
    one, other = context.float(), other.to(context.device).float()
    norms = one.norm(dim=-1) * other.norm(dim=-1)
    cosines = (one * other).sum(dim=-1) / norms.clamp_min(1e-12)
    return float(cosines.where(one.any(dim=-1) | other.any(dim=-1), cosines.new_tensor(1.0)).min())


def encode_training_prompts(clip: CLIP, noun: str, layers: Sequence[Layer]) -> tuple[list[list], list[Span]]:
    """The training prompts of a noun: their CONDITIONINGs, and the noun's rows in each."""
    if not any(character.isalnum() for character in noun):
        raise NounError(f"noun={noun!r}: give the class of what the pictures show, such as cat")
    prompts = [prompt.format(noun) for prompt in NOUN_PROMPTS]
    encoded = [cache(partial(encode_prompt, clip, prompt, ())) for prompt in prompts]
    spans = [noun_spans(clip, prompt, noun, encoded=own) for prompt, own in zip(prompts, encoded, strict=True)]
    if not all(spans):
        raise NounError(f"noun={noun!r} is not found in the prompt {prompts[0]!r}: give a plain word, without brackets")
    conditionings = [own() for own in encoded]
    check_context_width(conditionings[0][0][0].shape[-1], layers)
    times = _rows_of_token(clip, clip.tokenize(prompts[0]), conditionings[0])
    # The last of each: the noun may be "photo".
    return conditionings, [_at_rows_of_token(places[-1], times) for places in spans]


@dataclass(frozen=True)
class ConceptInput:
    """One residual as it comes in, and where its place in the node is (for error messages)."""

    slot: str
    residual: Residual
    strength: float
    occurrence: str
    region: Tensor | None = None


def place_concepts(
    clip: CLIP,
    text: str,
    layers: Sequence[Layer],
    concepts: Sequence[ConceptInput],
    start_percent: float,
    end_percent: float,
    pseudo_words: int = 0,
    encoded: Callable[[], list] | None = None,
) -> list[PlacedConcept]:
    """Find each concept's noun in the prompt. Errors say what is wrong with which input and quote the prompt.

    pseudo_words: tokens of the S* that the prompt has, if it has one. encoded: see `noun_spans`; each concept asks it.
    """
    if not text.strip():
        raise NounError("the prompt is empty: write one that has the noun of each residual")
    if start_percent > end_percent:
        raise ValueError(
            f"start_percent={start_percent} is after end_percent={end_percent}: the concepts would never be active"
        )
    wanted = [Wanted(f"residual{one.slot}", one.residual.noun, one.occurrence) for one in concepts]
    placed = []
    for index, concept in enumerate(concepts):
        check_architecture(concept.residual, layers)
        rows = rows_of(wanted, index, text, lambda noun: noun_spans(clip, text, noun, pseudo_words, encoded))
        residual, region = concept.residual, concept.region
        if region is not None and not region.any():
            raise ValueError(f"region{concept.slot} is all black: {residual.noun!r} could appear nowhere")
        delta, details = residual.delta, residual.details
        placement = Placement(delta, residual.layers, rows, concept.strength, region=region, details=details)
        placed.append(PlacedConcept(placement, start_percent, end_percent))
    return placed
