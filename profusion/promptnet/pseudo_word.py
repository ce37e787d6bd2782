"""How S* enters a prompt: as an embedding in the place of a word, beside the token embeddings of the other words.

CLIP's tokenizer would cut "S*" into "s" and "*", so it is taken out as text before tokenising: a word that the prompt
does not have stands in for it, once for each pseudo-word, and its tokens are then exchanged for the embeddings. That
keeps everything else as any tokenizer has it: weights such as (S*:1.2), chunks, padding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models.tokenizer import LENGTH, tokenize, words_to_ids
from ..problems import Explained

if TYPE_CHECKING:
    from ..models.clip import TextModel

PLACEHOLDER = "S*"
ALONE = f"a photo of {PLACEHOLDER}"  # the prompt that has S* and says nothing else
WORD_KEY = "profusion_word"  # under which a host's conditioning carries the S* it was made with
_PLACE = re.compile(r"(?<!\w)S\*")
_STAND_INS = ("zebra", "accordion", "volcano", "tulip", "saxophone", "lantern", "giraffe", "cactus")  # one token each


class PlaceholderError(Explained, ValueError):
    """A prompt does not have exactly one place for S*. The message quotes it."""


def split_prompt(prompt: str) -> tuple[str, str]:
    """What stands before and after the placeholder S* (a capital S: "cats*" has none). Raises PlaceholderError."""
    found = list(_PLACE.finditer(prompt))
    if not found:
        raise PlaceholderError(
            f"there is no {PLACEHOLDER} in the prompt {_quoted(prompt)}: write it where the thing from the picture "
            f'belongs, as in "a photo of {PLACEHOLDER} on a beach"'
        )
    if len(found) > 1:
        raise PlaceholderError(
            f"{PLACEHOLDER} is {len(found)} times in the prompt {_quoted(prompt)}: write it once. A second thing needs "
            "a conditioning of its own"
        )
    return prompt[: found[0].start()], prompt[found[0].end() :]


def with_noun(prompt: str, noun: str) -> str:
    """The same prompt in plain words: the class noun in the place of S*. Raises PlaceholderError."""
    if not noun.strip():
        raise PlaceholderError(
            f"no class noun for the place of {PLACEHOLDER} in the prompt {_quoted(prompt)}: say what it is"
        )
    before, after = split_prompt(prompt)
    return f"{before}{noun.strip()}{after}"


def with_stand_in(prompt: str, tokens: int = 1) -> tuple[str, int]:
    """The prompt with a word that it does not have, `tokens` times in the place of S*, and that word's token id.

    Exchange the tokens of this id for the embeddings (`placed`). Raises PlaceholderError.
    """
    before, after = split_prompt(prompt)
    used = {*words_to_ids(before), *words_to_ids(after)}
    free = [(word, words_to_ids(word)[0]) for word in _STAND_INS if words_to_ids(word)[0] not in used]
    if not free:
        raise PlaceholderError(
            f"the prompt {_quoted(prompt)} has all of {', '.join(_STAND_INS)}: leave one of them out"
        )
    word, token = free[0]
    return f"{before} {' '.join([word] * tokens)} {after}", token


def placed(
    chunks: Sequence[Sequence[tuple[Any, ...]]], stand_in: int, pseudo_word: Tensor
) -> tuple[list[list[tuple[Any, ...]]], list[tuple[int, int]]]:
    """A host's token lists with S* (tokens, width) in the place of its stand-in, and where it is: (chunk, row) of each.

    chunks: (token, weight, ...) tuples as the text encoder takes them, of `with_stand_in`'s text; they are not changed.
    Raises PlaceholderError where the stand-in is not there as often as S* has pseudo-words.
    """
    places = [(i, j) for i, chunk in enumerate(chunks) for j, entry in enumerate(chunk) if _is(entry[0], stand_in)]
    if len(places) != len(pseudo_word):
        raise PlaceholderError(
            f"{len(places)} places for the {len(pseudo_word)} pseudo-words of {PLACEHOLDER} in the prompt"
        )
    changed = [list(chunk) for chunk in chunks]
    for (chunk, row), embedding in zip(places, pseudo_word, strict=True):
        changed[chunk][row] = (embedding, *changed[chunk][row][1:])
    return changed, places


def _is(token: Any, stand_in: int) -> bool:
    return isinstance(token, int) and token == stand_in  # a token may be an embedding, too


def prompt_tokens(prompt: str, tokens: int = 1, pad: int | None = None) -> tuple[Tensor, tuple[int, ...]]:
    """The kernel's ids of a prompt (77,) with stand-ins, and the rows at which S* belongs. pad: as `tokenize` takes it.
    Raises PlaceholderError."""
    text, stand_in = with_stand_in(prompt, tokens)
    ids = tokenize(text, pad)[0]
    rows = tuple((ids == stand_in).nonzero().flatten().tolist())
    if len(rows) != tokens:
        raise PlaceholderError(
            f"{PLACEHOLDER} is too far back in the prompt {_quoted(prompt)}: it must be among the first {LENGTH - 2} "
            "tokens"
        )
    return ids, rows


def encode(
    text: TextModel, prompt: str, pseudo_word: Tensor, gamma: float = 1.0, holds_position: bool = False
) -> Tensor:
    """Context of a prompt with S*: pseudo_word (B, tokens, width) -> (B, 77, width).

    gamma: scale of S* in the context, see `scaled`. holds_position: see `PromptNetConfig`. Raises PlaceholderError.
    """
    ids, rows = prompt_tokens(prompt, pseudo_word.shape[1])
    return encode_tokens(text, ids, rows, pseudo_word, gamma, holds_position)


def encode_tokens(
    text: TextModel,
    ids: Tensor,
    rows: Sequence[int],
    pseudo_word: Tensor,
    gamma: float = 1.0,
    holds_position: bool = False,
) -> Tensor:
    """`encode` for what `prompt_tokens` returned: ids (77,), rows of S*."""
    return scaled(_with_word(text, ids, rows, pseudo_word, holds_position)[0], rows, gamma)


def tower_tokens(towers: Sequence[TextModel], prompt: str, tokens: int = 1) -> list[tuple[Tensor, tuple[int, ...]]]:
    """`prompt_tokens` for each text tower, whose paddings differ. Raises PlaceholderError."""
    return [prompt_tokens(prompt, tokens, tower.sizes.pad) for tower in towers]


def encode_in_towers(
    towers: Sequence[TextModel],
    tokens: Sequence[tuple[Tensor, Sequence[int]]],
    pseudo_word: Tensor,
    gamma: float = 1.0,
    holds_position: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A prompt with S* in one text tower, or in SDXL's two, between which S* (B, tokens, width of all) is cut.

    tokens: of `tower_tokens`. Returns the contexts side by side (B, 77, width of all) and, of two towers, the second's
    projected pooled state (B, width), which S* is also part of. gamma and holds_position: as `encode`.
    """
    widths = [tower.text_model.embeddings.token_embedding.weight.shape[1] for tower in towers]
    if pseudo_word.shape[-1] != sum(widths):
        raise ValueError(_other_width(pseudo_word.shape[-1], sum(widths)))
    contexts, pooled = [], None
    for tower, (ids, rows), part in zip(towers, tokens, pseudo_word.split(widths, dim=-1), strict=True):
        context, last = _with_word(tower, ids, rows, part, holds_position)
        contexts.append(scaled(context, rows, gamma))
    if len(towers) > 1:
        pooled = tower.project(last, ids.to(last.device).expand(len(last), -1))
    return torch.cat(contexts, dim=-1), pooled


def _with_word(
    text: TextModel, ids: Tensor, rows: Sequence[int], pseudo_word: Tensor, holds_position: bool
) -> tuple[Tensor, Tensor]:
    """A tower's context with S* (B, tokens, width) at these rows, and its last hidden state, (B, 77, width) each."""
    table = text.text_model.embeddings
    width = table.token_embedding.weight.shape[1]
    if pseudo_word.shape[-1] != width:
        raise ValueError(_other_width(pseudo_word.shape[-1], width))
    positions = table.position_embedding.weight
    if holds_position:
        pseudo_word = without_position(pseudo_word, positions, rows)
    words = table.token_embedding(ids.to(positions.device)).expand(len(pseudo_word), -1, -1)
    places = torch.tensor(rows, device=words.device)
    words = words.index_copy(1, places, pseudo_word.to(words))
    return text.encode_with_last(words + positions)


def _other_width(word: int, tower: int) -> str:
    return (
        f"S* has the width {word} and the text encoder's words {tower}: "
        "load the CLIP of the model that the PromptNet was trained on"
    )


def without_position(pseudo_word: Tensor, positions: Tensor, rows: Sequence[int]) -> Tensor:
    """S* (..., tokens, width) less the position embeddings (77, width) that a text encoder adds at these rows.

    For a PromptNet that `holds_position`: the authors put S* into the prompt after the positions were added.
    """
    return pseudo_word - positions[list(rows)].to(pseudo_word)


def scaled(context: Tensor, rows: Sequence[int], gamma: float) -> Tensor:
    """The context (B, L, D) with S*'s rows times gamma (arXiv 2305.13579; the authors take 0.8 in the fusion stage).

    It is the encoder's *output* that is scaled, after its last norm. What other rows took from S* inside the encoder,
    and the end token above all, stays.
    """
    factors = context.new_ones(context.shape[1])
    factors[list(rows)] = gamma
    return context * factors[:, None]


def _quoted(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 200 else prompt[:200] + "...")
