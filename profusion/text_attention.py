"""Attention that text takes part in, in transformers: seen through a host's one hook for every attention call.

In a joint attention text and picture stand in one sequence, which attends to itself; in a cross-attention the picture
asks and the text answers. Both reach `transformer_options["optimized_attention_override"]`, as
`override(function, q, k, v, heads, ...)`, and so do attentions that have nothing to do with text: a `Layout` tells them
apart. A layer is known by its place among a network call's attentions with text, which a `TextCall` counts.

Sizes in shape comments: B rows, L of the sequence, P of the picture, H heads, d numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import ceil, prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .problems import Explained

ATTENTION = "text_attention"  # among patches: a list of `AttentionPatch`
OVERRIDE = "optimized_attention_override"
TEXT = "profusion_text"  # among the attention's options: the `TextCall`
_POSITIONS = "mask", "attn_precision", "skip_reshape", "skip_output_reshape"


class UnknownAttentionError(Explained, RuntimeError):
    """A network whose attention is not as it is known to be."""


@dataclass(eq=False)
class TextCall:
    """One call of a network. text: rows of the prompt's context. size: (..., height, width) of the latents. beside:
    what else a host gives the network, by name."""

    text: int
    size: tuple[int, ...]
    beside: Mapping[str, Any] = field(default_factory=dict, repr=False)
    layers: int = 0
    """Attentions with text so far."""
    alike: int = field(default=0, repr=False)
    """Attentions so far whose lengths fit a cross-attention and a self-attention."""


@dataclass(frozen=True)
class Span:
    """Rows of a sequence that are the text's, among keys, and the picture's, among queries."""

    text: tuple[int, int]
    picture: tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Where text stands in a network's attention.

    joint: in one sequence with the picture, which it begins; otherwise it has the keys of a cross-attention.
    layers: attentions with text in a network call. patch: cells of the latent a side of a picture's token.
    multiple: text, and picture, are filled up to a multiple of so many rows. references: whether rows of other pictures
    may follow the picture's. text: tells how many rows the attention has of a prompt, where not as many as its context.
    name: what people call such a network.
    """

    joint: bool
    layers: int
    patch: int = 2
    multiple: int = 1
    references: bool = True
    text: Callable[[TextCall], int] = attrgetter("text")
    name: str = "the model"

    def grid(self, call: TextCall) -> tuple[int, ...]:
        """The picture's tokens: (..., rows, columns)."""
        *frames, height, width = call.size
        return *frames, ceil(height / self.patch), ceil(width / self.patch)

    def span(self, call: TextCall, queries: int, keys: int) -> Span | None:
        """Where text and picture are in an attention of so many queries and keys; None if text has no part in it."""
        picture, text = prod(self.grid(call)), _filled(self.text(call), self.multiple)
        if not self.joint:
            return Span((0, text), (0, queries)) if keys == text and self._crosses(call, queries, keys) else None
        whole = text + _filled(picture, self.multiple)
        if queries != keys or queries < whole:
            return None
        if queries > whole and not self.references:
            raise UnknownAttentionError(
                f"{self.name}'s attention has {queries} rows where the prompt and the picture are {whole}: leave out "
                "the reference pictures, with which nobody can tell where the noun is"
            )
        return Span((0, text), (text, text + picture))

    @staticmethod
    def _crosses(call: TextCall, queries: int, keys: int) -> bool:
        """Whether it is a cross-attention: of two of the same lengths the block's own comes first."""
        if queries != keys:
            return True
        call.alike += 1
        return call.alike % 2 == 0


def _filled(rows: int, multiple: int) -> int:
    return ceil(rows / multiple) * multiple


Rows = tuple[int, ...]


class TextAttention:
    """One attention call that text takes part in, of layer `layer`, as patches see it.

    `options` are the host's. Nothing is evaluated before it is asked for, nor twice.
    """

    def __init__(self, function: Callable, layout: Layout, call: TextCall, span: Span, tensors: Sequence, named: dict):
        self._function = function
        self.query, self.key, self.value, self.heads = tensors
        self.layer, self.span, self.layout, self.call = call.layers, span, layout, call
        self.options: Mapping[str, Any] = named.get("transformer_options") or {}
        self._named = named
        self._split = bool(named.get("skip_reshape"))  # (B, H, L, d); (B, L, H d) or, of SD3's k and v, (B, L, H, d)
        self._split_output = bool(named.get("skip_output_reshape"))  # (B, H, L, d); (B, L, H d)
        self._own: Tensor | None = None
        self._columns: dict[Hashable, Tensor] = {}

    @property
    def rows(self) -> int:
        """Of the batch."""
        return len(self.query)

    @property
    def name(self) -> str:
        return f"{'joint' if self.layout.joint else 'cross'}.{self.layer}"

    def output(self) -> Tensor:
        """What the attention gives without any patch."""
        if self._own is None:
            self._own = self.of(self.query, self.key, self.value)
        return self._own

    def of(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same attention of others, in the shapes of its own."""
        return self._function(query, key, value, self.heads, **self._named)

    def moved(self, value: Tensor, rows: Rows, residual: Tensor) -> Tensor:
        """Values, (N, ...) in the shape of its own, with a residual (1, kv_heads d) at each of these rows of the text.

        Every one of the value's heads has that of its group.
        """
        index = torch.tensor(rows, device=value.device) + self.span.text[0]
        heads = self._value_heads()
        added = spread(residual.to(value), heads, self._numbers()).expand(len(rows), -1, -1)  # (rows, Hv, d)
        if self._split:
            added = value.new_zeros(value.shape[1:]).index_add(1, index, added.transpose(0, 1))
        else:
            whole = value.new_zeros(value.shape[1], heads, added.shape[-1]).index_add(0, index, added)
            added = whole.view(value.shape[1:])
        return value + added

    def columns(self, part: slice, sets: Sequence[Rows], query: Tensor | None = None, key: Tensor | None = None):
        """sum over j in a set of A[:, j] at the picture's rows, for each of the sets of the text's rows: (N, P, H, S).

        A is the map of these rows of the batch, or that of another query (N, ...) and key. Attention is linear in its
        values, so that one whose values are 1 at a set's rows in a channel of its own gives its columns, for as many
        sets as a head has numbers.
        """
        own = query is None
        known = (part.start, part.stop, tuple(sets)) if own else None
        if known in self._columns:
            return self._columns[known]
        query, key = (self.query[part], self.key[part]) if own else (query, key)
        numbers, rows_axis = self._numbers(), 2 if self._split else 1
        first, last = self.span.picture
        asked = query.narrow(rows_axis, first, last - first)
        named = {**self._named, "skip_output_reshape": False}
        mask = named.get("mask")
        if mask is not None:
            mask = mask[part] if mask.ndim > 2 and len(mask) == self.rows > 1 else mask
            whole = mask.ndim > 1 and mask.shape[-2] == query.shape[rows_axis]
            named["mask"] = mask[..., first:last, :] if whole else mask
        found = []
        for start in range(0, len(sets), numbers):
            marked = self.value.new_zeros(self.value[part].shape)
            heads = marked if self._split else marked.view(*marked.shape[:2], -1, numbers)
            for channel, rows in enumerate(sets[start : start + numbers]):
                index = [row + self.span.text[0] for row in rows]
                if self._split:
                    heads[:, :, index, channel] = 1
                else:
                    heads[:, index, :, channel] = 1
            seen = self._function(asked, key, marked, self.heads, **named)  # (N, P, H d)
            found.append(seen.view(*seen.shape[:2], self._heads(), -1)[..., : len(sets) - start])
        columns = torch.cat(found, dim=-1)
        if own:
            self._columns[known] = columns
        return columns

    def picture(self, output: Tensor) -> Tensor:
        """The picture's rows of an output, a view: (N, P, H, d)."""
        return self._output_heads(output)[:, slice(*self.span.picture)]

    def text(self, output: Tensor) -> Tensor | None:
        """The text's rows of an output, a view: (N, T, H, d). A cross-attention has none."""
        return self._output_heads(output)[:, slice(*self.span.text)] if self.layout.joint else None

    def value_rows(self) -> Tensor:
        """All rows' values: (B, L, kv_heads d)."""
        return self.value.transpose(1, 2).flatten(2) if self._split else self.value.flatten(2)

    def _output_heads(self, output: Tensor) -> Tensor:
        if self._split_output:
            return output.transpose(1, 2)
        return output.view(*output.shape[:2], self._heads(), -1)

    def _heads(self) -> int:
        return self.query.shape[1] if self._split else self.heads

    def _numbers(self) -> int:
        return self.query.shape[-1] if self._split or self.query.ndim == 4 else self.query.shape[-1] // self.heads

    def _value_heads(self) -> int:
        return self.value.shape[1] if self._split else prod(self.value.shape[2:]) // self._numbers()


def spread(residual: Tensor, heads: int, numbers: int) -> Tensor:
    """A residual (n, kv_heads d) for so many heads, each with that of its group: (n, heads, d)."""
    groups = residual.shape[-1] // numbers
    if groups * numbers != residual.shape[-1] or heads % groups:
        raise UnknownAttentionError(
            f"a residual of {residual.shape[-1]} numbers a layer, and the model's attention has {heads} heads of "
            f"{numbers}: it is of another model"
        )
    return residual.view(len(residual), groups, numbers).repeat_interleave(heads // groups, dim=1)


@dataclass(frozen=True)
class AttentionPatch:
    """What is done at the attentions with text of a network that has them so. run: gives an output, or None for its
    own."""

    layout: Layout
    run: Callable[[TextAttention], Tensor | None]


_PROVED: set[Layout] = set()


class _Seen(Exception):
    """Ends an evaluation of which enough was seen."""


def check_layout(patches: Mapping[str, Sequence], context: Tensor, evaluate: Callable[[Tensor, Mapping], Any]) -> None:
    """Prove a host's layout, once for each: that a change in one row of a prompt's context (B, L, D) is one of the
    values of that row, in the first attention with text. Raises UnknownAttentionError where it is not.

    evaluate: the network with a context and patches. Where layers before the first have mixed the text, other rows of
    it change too, and less.
    """
    layout = next((patch.layout for patch in patches.get(ATTENTION, ())), None)
    if layout is None or layout in _PROVED:
        return

    def values(context: Tensor) -> tuple[Tensor, TextAttention]:
        found: list[tuple[Tensor, TextAttention]] = []

        def look(seen: TextAttention) -> None:
            found.append((seen.value_rows().detach(), seen))
            raise _Seen

        with suppress(_Seen):
            evaluate(context, {ATTENTION: [AttentionPatch(layout, look)]})
        if not found:
            raise UnknownAttentionError(f"{layout.name}'s attention with text was not seen: {_CHANGED}")
        return found[0]

    before, seen = values(context)
    row = min(layout.text(seen.call), context.shape[1]) // 2
    other = context.clone()
    other[:, row] = context[:, row].flip(-1) + 1
    moved = (values(other)[0] - before).float().abs().amax(dim=(0, 2))
    first, last = seen.span.text
    elsewhere = torch.cat([moved[:first], moved[last:]])
    if int(moved.argmax()) != first + row or (elsewhere > 1e-3 * moved.max()).any():
        raise UnknownAttentionError(f"{layout.name}'s text is not where it is known to stand: {_CHANGED}")
    _PROVED.add(layout)


_CHANGED = "another pack or this version of ComfyUI has changed its attention, and Infusion cannot act on it"


def check_layers(patches: Mapping[str, Sequence], call: TextCall) -> None:
    """Raise UnknownAttentionError where a network call had some of the attentions with text that its layout says, and
    not all. A step cache may have left out the network."""
    for patch in patches.get(ATTENTION, ())[:1]:
        if call.layers not in (0, patch.layout.layers):
            raise UnknownAttentionError(
                f"{patch.layout.name} is known to have {patch.layout.layers} attentions with text, and {call.layers} "
                "were seen: another pack leaves parts of it out, or this version of ComfyUI has changed it"
            )


def overridden(patches: Sequence[AttentionPatch], theirs: Callable | None) -> Callable:
    """A host's attention override: attentions with text are seen by these patches, of one layout, and all attentions by
    the override that was there. Of the patches' outputs the last one counts.
    """
    layout = patches[0].layout

    def override(function: Callable, query: Any, key: Any, value: Any, heads: int, *others: Any, **named: Any):
        function = function if theirs is None else partial(theirs, function)
        named = {**dict(zip(_POSITIONS, others, strict=False)), **named}
        call = (named.get("transformer_options") or {}).get(TEXT)
        span = None
        if call is not None:
            axis = 2 if named.get("skip_reshape") else 1
            span = layout.span(call, query.shape[axis], key.shape[axis])
        if span is None:
            return function(query, key, value, heads, **named)
        if call.layers >= layout.layers:
            raise UnknownAttentionError(
                f"{layout.name} is known to have {layout.layers} attentions with text, and here are more: another pack "
                "evaluates parts of it several times, or this version of ComfyUI has changed it"
            )
        seen = TextAttention(function, layout, call, span, (query, key, value, heads), named)
        call.layers += 1
        output = None
        for patch in patches:
            own = patch.run(seen)
            output = output if own is None else own
        return seen.output() if output is None else output

    return override
