"""Which conditioning and which picture each row of a UNet's batch belongs to: a label that goes with the rows says it,
however they are regrouped.

The host batches conditionings, and says so in `cond_or_uncond`. Packs that call the UNet several times in an
evaluation, or put tiles into a batch, make other rows of these. They treat all that goes with the rows alike, and so a
label too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import gcd
from typing import Any

import torch
from torch import Tensor

from .infusion import ExtraOptions, Owners, Patches, with_patches
from .patched import name_of
from .problems import Explained
from .text_attention import TEXT, TextCall, check_layers, check_layout

_CUSTOMISED, _APPLY_MODEL = "customised", "apply_model"
PICTURES = "profusion_pictures"  # in a conditioning: which of the batch it is evaluated for
ROWS = "profusion_rows"  # among what goes with the rows, and of a call among the attention's options


class UnknownRowsError(Explained, RuntimeError):
    """A batch in which nobody can tell whose the rows are."""


@dataclass(frozen=True)
class Call:
    """One call of the UNet within an evaluation.

    owners: whose its rows are, (conditioning, how many times it was there before); each has as many. pictures: for each
    owner, which of the batch its rows are. size: of the latents, which are tiles where a pack cuts them. options: with
    which the model is evaluated.
    """

    owners: tuple[tuple[Hashable, int], ...]
    pictures: Mapping[tuple[Hashable, int], tuple[int, ...]]
    rows: int
    size: tuple[int, ...]
    options: Mapping[str, Any]


def owners(extra_options: ExtraOptions, rows: int) -> Sequence[tuple[Hashable, int]]:
    """The kernel's `Owners`: whose the rows are that an attention layer sees."""
    call = extra_options[ROWS]
    if call.rows != rows:
        raise UnknownRowsError(
            f"the UNet is given {call.rows} rows and its attention {rows}, so that nobody can tell which are the "
            f"concept's: remove {_suspects(call.options)} from the model"
        )
    return call.owners


def owners_after(foundation: Counter) -> Owners:
    """`owners` for the customised stream, after a foundation stream with these turns.

    Raises UnknownRowsError where the customised one calls the UNet more often for a conditioning.
    """

    def known(extra_options: ExtraOptions, rows: int) -> Sequence[tuple[Hashable, int]]:
        found = owners(extra_options, rows)
        for name, turn in found:
            if foundation[name] <= turn:
                raise _unlike(foundation[name], f"at least {turn + 1}", extra_options[ROWS].options)
        return found

    return known


class Evaluation:
    """The conditionings that a host is to evaluate at once, labelled. `turns`: the calls that each was part of.

    batch: pictures. entry: makes of a tensor what the host batches with its rows.
    """

    def __init__(self, conds: Sequence[Sequence[dict] | None], batch: int, entry: Callable[[Tensor], Any]):
        self._batch, self._entry, self.turns = batch, entry, Counter()
        self._numbers: dict[Hashable, int] = {}
        self.conds = [group and [self._labelled(index, cond) for cond in group] for index, group in enumerate(conds)]
        self._names = list(self._numbers)

    def _labelled(self, index: int, cond: dict) -> dict:
        number = self._numbers.setdefault(identity(index, cond), len(self._numbers))
        told = cond.get(PICTURES)
        pictures = range(self._batch) if told is None or len(told) != self._batch else told.tolist()
        label = self._entry(torch.tensor([[number, picture] for picture in pictures], dtype=torch.int))
        return {**cond, "model_conds": {**cond["model_conds"], ROWS: label}}

    def options(self, model_options: Mapping[str, Any], patches: Patches) -> dict[str, Any]:
        """Model options with which the UNet has these patches, and its attention a `Call`."""
        options = {**model_options, "transformer_options": {**model_options.get("transformer_options", {})}}
        inner = options["transformer_options"]
        wrappers = inner.get("wrappers", {})
        ours = {ROWS: [self._wrapper(model_options, patches)]}  # the innermost: it sees the rows as the UNet does
        inner["wrappers"] = {**wrappers, _APPLY_MODEL: {**wrappers.get(_APPLY_MODEL, {}), **ours}}
        return options

    def _wrapper(self, model_options: Mapping[str, Any], patches: Patches) -> Callable:
        def call(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **others):
            labels, given = others.pop(ROWS, None), transformer_options or {}
            options = {**model_options, "transformer_options": given}
            whose, pictures = self._owners(labels, x, options)
            in_turn = self._in_turn(whose)
            rows = sum(map(len, pictures))
            noted = Call(in_turn, dict(zip(in_turn, pictures, strict=True)), rows, tuple(x.shape[2:]), options)
            seen = patched_network(patches, {ROWS: noted})
            return seen(executor, x, t, c_concat, c_crossattn, control, given, **others)

        return call

    def _owners(
        self, labels: Tensor | None, x: Tensor, model_options: Mapping[str, Any]
    ) -> tuple[list[Hashable], list[tuple[int, ...]]]:
        """Whose the rows of a call are, and which pictures' each has: all have as many."""
        if isinstance(labels, Tensor) and labels.shape == (len(x), 2):
            rows = labels.tolist()
            runs = [(number, len(list(run))) for number, run in groupby(number for number, _ in rows)]
            size = self._batch if all(count % self._batch == 0 for _, count in runs) else gcd(*(n for _, n in runs))
            whose = [self._names[number] for number, count in runs for _ in range(count // size)]
            pictures = [picture for _, picture in rows]
            return whose, [tuple(pictures[first : first + size]) for first in range(0, len(rows), size)]
        inner = model_options["transformer_options"]
        chunks = [self._named(*chunk) for chunk in zip(inner["cond_or_uncond"], inner["uuids"], strict=True)]
        if len(x) != len(chunks) * self._batch or None in chunks:
            raise UnknownRowsError(
                f"the UNet is given {len(x)} rows for {len(chunks)} conditionings of {self._batch} pictures, so that "
                f"nobody can tell which are the concept's: remove {_suspects(model_options)} from the model"
            )
        return chunks, [tuple(range(self._batch))] * len(chunks)

    def _named(self, index: int, uuid: Any) -> Hashable | None:
        """Who is meant by what the host says of a chunk, which packs may have changed."""
        name = identity(index, {"uuid": uuid})
        alike = [other for other in self._names if other[1] == name[1]]
        return name if name in alike else alike[0] if len(alike) == 1 else None

    def _in_turn(self, whose: Sequence[Hashable]) -> tuple[tuple[Hashable, int], ...]:
        found = []
        for name in whose:
            found.append((name, self.turns[name]))
            self.turns[name] += 1
        return tuple(found)


def patched_network(patches: Patches, told: Mapping[str, Any] | None = None) -> Callable:
    """A wrapper of a host's network calls, APPLY_MODEL, under which the network has these patches, and its attention
    is told where the text is, and of what else is given."""

    def call(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **others):
        given = {**(transformer_options or {}), **(told or {})}

        def evaluate(context: Tensor | None, patches: Patches) -> Tensor:
            text = TextCall(0 if context is None else context.shape[1], tuple(x.shape[2:]), others)
            patched = with_patches({"transformer_options": {**given, TEXT: text}}, patches)
            result = executor(x, t, c_concat, context, control, patched["transformer_options"], **others)
            check_layers(patches, text)
            return result

        check_layout(patches, c_crossattn, evaluate)
        return evaluate(c_crossattn, patches)

    return call


def with_network_patches(model_options: Mapping[str, Any], patches: Patches) -> dict[str, Any]:
    """A host's model options under which every network call has these patches."""
    inner = model_options["transformer_options"]
    wrappers = inner.get("wrappers", {})
    ours = {**wrappers.get(_APPLY_MODEL, {}), ROWS: [patched_network(patches)]}
    return {**model_options, "transformer_options": {**inner, "wrappers": {**wrappers, _APPLY_MODEL: ours}}}


def identity(index: int, cond: Mapping[str, Any]) -> tuple[int, Any]:
    """What a conditioning is known by in both streams: its place among the host's groups, and its id."""
    uuid = cond["uuid"]
    return index, uuid[1] if isinstance(uuid, tuple) and uuid[0] == _CUSTOMISED else uuid


def customised(conds: Sequence[Sequence[dict] | None]) -> list:
    """The same for C, under other ids: packs that keep something for each must not mistake C's for F's."""
    return [group and [{**cond, "uuid": (_CUSTOMISED, cond["uuid"])} for cond in group] for group in conds]


def check_turns(foundation: Counter, customised: Counter, model_options: Mapping[str, Any]) -> None:
    """Raise UnknownRowsError where the streams called the UNet for a conditioning more or less often."""
    for name in foundation.keys() & customised.keys():
        if foundation[name] != customised[name]:
            raise _unlike(foundation[name], str(customised[name]), model_options)


def _unlike(foundation: int, customised: str, model_options: Mapping[str, Any]) -> UnknownRowsError:
    return UnknownRowsError(
        f"the UNet was called {foundation} times for a conditioning in the foundation stream and {customised} times in "
        f"the customised one, so that their queries do not belong together: remove {_suspects(model_options)} from the "
        "model"
    )


_A_REGION = "a region is of the whole picture", "leave region unconnected"


def check_size(
    extra_options: ExtraOptions, size: Sequence[int], matters: bool, why: tuple[str, str] = _A_REGION
) -> None:
    """Raise UnknownRowsError where latents are not of this size, as tiles are not, and it matters.

    why: it matters, and what else to do, in words.
    """
    call = extra_options[ROWS]
    if matters and call.size[-2:] != tuple(size):
        raise UnknownRowsError(
            f"{why[0]}, and the UNet is given parts of it: {why[1]}, or remove {_suspects(call.options)} from the model"
        )


def _suspects(options: Mapping[str, Any]) -> str:
    """What on the model may regroup rows, by name."""
    inner = options.get("transformer_options", {})
    found = [options["model_function_wrapper"]] if "model_function_wrapper" in options else []
    for kind in (_APPLY_MODEL, "diffusion_model"):
        for key, wrappers in inner.get("wrappers", {}).get(kind, {}).items():
            found += wrappers if key != ROWS else []
    names = dict.fromkeys(name for name in map(name_of, found) if name)
    return " or ".join(names) or "what another pack has put"
