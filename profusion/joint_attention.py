"""Infusion (arXiv 2404.14007) where text and picture attend to each other, as in today's transformers.

Two streams of one frozen network see the same prompt, as in `infusion`. In layer l, N are the noun's rows, T the text's
and I the picture's, A = softmax(Q K^T / sqrt(d)) over all rows. The text's own rows change from layer to layer, so what
is learned is added behind W_V, where the paper's Eq. 6 adds it before: V_bar = V + onehot(N) delta_l. C's attention is
one of

    whole    out_C = A_F V_bar_C                        all of the map is F's, also where the picture looks at itself
    column   out_C[I] = A_C V_C + A_F[I, N] delta_l     C attends as it likes; where the residual lands is F's

A picture's attention to itself decides much of how a thing looks, and *whole* freezes that: it keeps the layout best,
and most of what a concept would change. In a cross-attention, where the picture asks the text alone, *whole* is the
paper's. A concept with a region m has m A_F[I, N] delta_l in either.

The text's rows see the picture and so would learn of the concept, and tell it to all of the picture. F's are put back
in their place in every layer's output, so that the prompt is the same in both streams, as it is in a UNet.

Kept of F for each layer: *column* A_F[I, N], a number a head and picture row; *whole* Q and, of a joint attention, K;
and the text's rows. Without a residual both locks are the plain run to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from .holding import NounMaps, Where
from .infusion import Owners, Patches, Placement, PlacementsFor, QueryStore, chunks_in_order
from .text_attention import ATTENTION, AttentionPatch, Layout, Rows, TextAttention, spread

COLUMN, WHOLE = "column", "whole"
LOCKS = COLUMN, WHOLE


def landed(columns: Tensor, residuals: Tensor) -> Tensor:
    """sum over s of A_F[I, N_s] delta_s: columns (N, P, H, S), residuals (S, H, d) -> (N, P, H, d)."""
    return torch.einsum("nphs,shd->nphd", columns, residuals.to(columns))


def row_sets(placement: Placement) -> list[Rows]:
    """The rows that each of a residual's tokens goes to."""
    return [placement.rows] if placement.delta.shape[1] == 1 else [(row,) for row in placement.rows]


def foundation_patches(
    layout: Layout,
    lock: str,
    store: QueryStore,
    placements_for: PlacementsFor,
    owners: Owners = chunks_in_order,
) -> Patches:
    """Patches for F's evaluation, which stays what it is: `store` is left what C's with this lock needs."""

    def record(seen: TextAttention) -> None:
        output = seen.output()
        for owner, part in _parts(seen, owners):
            if lock == WHOLE:
                store[(seen.name, "query"), owner] = seen.query[part].detach()
                if layout.joint:
                    store[(seen.name, "key"), owner] = seen.key[part].detach()
            else:
                sets = _sets(placements_for(seen.options, owner))
                columns = seen.columns(part, sets).detach() if sets else ()
                for index, rows in enumerate(sets):
                    store[(seen.name, "column", rows), owner] = columns[..., index]
            text = seen.text(output[part])
            if text is not None:
                store[(seen.name, "text"), owner] = text.detach().clone()  # the network may write over its own

    return {ATTENTION: [AttentionPatch(layout, record)]}


def customised_patches(
    layout: Layout,
    lock: str,
    store: QueryStore,
    placements_for: PlacementsFor,
    owners: Owners = chunks_in_order,
) -> Patches:
    """Patches for C's evaluation, after F's with the same lock."""

    def draw(seen: TextAttention) -> Tensor:
        parts = [
            (owner, part, _acting(placements_for(seen.options, owner), seen)) for owner, part in _parts(seen, owners)
        ]
        if lock == WHOLE:
            output, queries, keys = _whole(layout, seen, store, parts)
        else:
            output = seen.output()
        output = output.clone()  # autograd keeps the attention's own
        for owner, part, placements in parts:
            own = output[part]
            for placement in placements:
                if lock == WHOLE and placement.region is None:
                    continue  # in V_bar
                sets = row_sets(placement)
                if lock == WHOLE:
                    columns = seen.columns(part, sets, queries[part], keys[part])
                else:
                    kept = [_kept(store, (seen.name, "column", rows), owner, seen) for rows in sets]
                    columns = torch.stack(kept, dim=-1)
                added = landed(columns.to(own), _residual(placement, seen, own))
                if placement.region is not None:
                    added = added * _weights(placement, layout, seen, own)
                seen.picture(own).add_(added)
            text = seen.text(own)
            if text is not None:
                text.copy_(_kept(store, (seen.name, "text"), owner, seen))
        return output

    return {ATTENTION: [AttentionPatch(layout, draw)]}


def _whole(layout: Layout, seen: TextAttention, store: QueryStore, parts: Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """A_F V_bar_C, and the queries and keys of A_F."""

    def recall(kind: str) -> Tensor:
        return torch.cat([_kept(store, (seen.name, kind), owner, seen) for owner, _, _ in parts])

    queries, keys = recall("query"), recall("key") if layout.joint else seen.key
    if queries.shape != seen.query.shape or keys.shape != seen.key.shape:
        raise RuntimeError(
            f"layer {seen.name} has other shapes in this stream than in the foundation stream: another patch treats "
            "them differently"
        )
    values, moved = [], False
    for _, part, placements in parts:
        value = seen.value[part]
        for placement in placements:
            if placement.region is None:
                for token, rows in enumerate(row_sets(placement)):
                    delta = placement.strength * placement.delta[placement.layers.index(seen.name)]
                    value, moved = seen.moved(value, rows, delta[token : token + 1]), True
        values.append(value)
    return seen.of(queries, keys, torch.cat(values) if moved else seen.value), queries, keys


def map_patches(
    layout: Layout,
    maps: NounMaps,
    placements_for: PlacementsFor,
    owners: Owners = chunks_in_order,
    where: Where = lambda _, owner: (owner, None, None),
    noun: Hashable | None = None,
) -> Patches:
    """Patches that add to `maps` what a stream's own attention says of its nouns, as `holding.map_patches` do: the mean
    of all heads' A[I, N], and of several frames'."""

    def look(seen: TextAttention) -> None:
        for owner, part in _parts(seen, owners):
            placed = [(index, one) for index, one in enumerate(placements_for(seen.options, owner)) if one.adds()]
            if not placed:
                continue
            key, pictures, area = where(seen.options, owner)
            sets = _sets([one for _, one in placed])
            columns = seen.columns(part, sets)
            *frames, height, width = layout.grid(seen.call)
            for index, placement in placed:
                if noun is not None and (key, index) != noun:
                    continue
                own = [sets.index(rows) for rows in row_sets(placement)]
                found = columns[..., own].float().sum(dim=-1).mean(dim=-1)  # (N, P)
                found = found.view(len(found), prod(frames), height, width).mean(dim=1)
                maps.add((key, index), found, placement.region, pictures, area)

    return {ATTENTION: [AttentionPatch(layout, look)]}


def showing_patches(layout: Layout, rows: Sequence[int], see: Callable[[str, Tensor, Tensor], None]) -> Patches:
    """Patches that leave the model as it is and show the noun's map at every layer, as `showing.map_patches` do.

    see: told the layer's name, the mean of all heads' A[I, N] (B, h, w), and the noun's own values (B, kv_heads d).
    """

    def look(seen: TextAttention) -> None:
        columns = seen.columns(slice(0, seen.rows), [tuple(rows)])
        *frames, height, width = layout.grid(seen.call)
        found = columns[..., 0].float().mean(dim=-1).view(seen.rows, prod(frames), height, width).mean(dim=1)
        own = seen.value_rows()[:, [seen.span.text[0] + row for row in rows]]
        see(seen.name, found, own.mean(dim=1))

    return {ATTENTION: [AttentionPatch(layout, look)]}


def noting(layout: Layout, note: Callable[[], None]) -> Patches:
    """Patches that tell of every attention with text, and change nothing."""
    return {ATTENTION: [AttentionPatch(layout, lambda seen: note())]}


def _parts(seen: TextAttention, owners: Owners) -> Iterator[tuple[Hashable, slice]]:
    """Each owner and its rows of the batch."""
    whose = owners(seen.options, seen.rows)
    count = seen.rows // len(whose)
    for place, owner in enumerate(whose):
        yield owner, slice(place * count, (place + 1) * count)


def _sets(placements: Sequence[Placement]) -> list[Rows]:
    """All sets of rows that placements add to, each once."""
    return list(dict.fromkeys(rows for placement in placements if placement.adds() for rows in row_sets(placement)))


def _acting(placements: Sequence[Placement], seen: TextAttention) -> list[Placement]:
    """Those that add something in this layer."""
    return [placement for placement in placements if seen.name in placement.layers and placement.adds()]


def _residual(placement: Placement, seen: TextAttention, output: Tensor) -> Tensor:
    """A placement's residual in a layer, with its strength, for the output's heads: (tokens, H, d)."""
    heads, numbers = seen.picture(output).shape[-2:]
    return spread(placement.strength * placement.delta[placement.layers.index(seen.name)], heads, numbers)


def _weights(placement: Placement, layout: Layout, seen: TextAttention, output: Tensor) -> Tensor:
    """A placement's region as weights of the picture's rows: (N, P, 1, 1)."""
    *frames, height, width = layout.grid(seen.call)
    weights = placement.weights_of(len(output), (height, width), output.device)
    return weights.repeat(1, prod(frames), 1)[..., None].to(output)


def _kept(store: QueryStore, kind: Hashable, owner: Hashable, seen: TextAttention) -> Tensor:
    """What F left for C."""
    found = store.get((kind, owner))
    if found is None:
        raise RuntimeError(
            f"the foundation stream left nothing for layer {seen.name}: was it evaluated before this one?"
        )
    return found.to(seen.query, non_blocking=found.device.type == "cpu")
