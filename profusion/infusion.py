"""Infusion (arXiv 2404.14007): a concept moves what is drawn at its noun, and nothing decides anew where.

Two streams of one frozen UNet see the same prompt. F, the foundation, is the plain model. C, the customised stream,
has in every cross-attention layer i (Eq. 5-6, and Eq. 9 for several concepts)

    out_C = softmax(Q_F K^T / sqrt(d)) V_bar        the map is F's: "where" is locked
    V_bar = W_V (c + sum_k onehot(noun_k) delta_ki) only the nouns' values move: "what" is free

A residual of a larger capacity adds details, whose values differ by place (`details`). K comes from the same prompt in
both streams. Q is linear in the layer's input n, so giving C's rows F's n locks the
map without ever holding one. Symbols: c context (L rows of D numbers), n the normed hidden state (T cells), delta_ki
the residual of concept k in layer i.

The patches have ComfyUI's signatures, `attn2_patch(n, context, value, extra_options) -> (n, context, value)` and
`attn2_output_patch(n, extra_options) -> n`, and run unchanged in the host and in `profusion.models.unet`. They come
before other packs' patches, where the rows still are the UNet's own, and whose each row is, `owners` say: without a
host, that a batch is a row of equal chunks, one for each entry of `extra_options["cond_or_uncond"]`.

The streams are evaluated one after the other: F with `foundation_patches`, then C with `customised_patches`. In one
batch, a matrix product of 2N rows would have to give the bits that N rows give, and it does not (on a CPU the output
of a small UNet moves by 5e-6 at N = 1, 2 and 3). In two, F is the plain run, and memory is that of one and of F's
queries while they wait (`profusion.queries`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from .details import Details, openings
from .devices import area_means, smoothly_resized
from .problems import Explained
from .text_attention import ATTENTION, OVERRIDE, overridden

_TO_VALUE = re.compile(
    r"(input|middle|output)_blocks?\.(\d+)\.(?:\d+\.)?transformer_blocks\.(\d+)\.attn2\.to_v\.weight"
)
_KINDS = ("input", "middle", "output")
CONTEXT, VALUE = "context", "value"  # what a residual is added to: the rows before W_V, or what W_V makes of them
# By (cross-attentions, context width): names for people, which saved files have too. Toybox's is a row like the others:
# were it filled in by Toybox's own module, what a file says would depend on what had been imported before.
_ARCHITECTURES = {(16, 768): "SD 1.x", (16, 1024): "SD 2.x", (70, 2048): "SDXL", (10, 128): "Toybox"}

ExtraOptions = MutableMapping[str, Any]
# Among a layer's options: C's own n, and how many rows there were, with the weights of those that were added.
_OWN, _GROWN = "profusion_own", "profusion_grown"
Patches = dict[str, list[Callable]]
QueryStore = MutableMapping[Hashable, Tensor]


class UnsupportedModelError(Explained, ValueError):
    """A model on which Infusion has nothing to act."""


@dataclass(frozen=True)
class Layer:
    """What a residual has a vector for.

    A UNet's cross-attention: its name ("input.1.0": block kind, block id, transformer index) and the context's width.
    A transformer's attention with text: "joint.3" or "cross.3", and the width of its values.
    width: C of a UNet's hidden state there, 0 where that is not known.
    network: the family of another network than a UNet, such as "flux". adds_to: see CONTEXT.
    """

    name: str
    context_dim: int
    width: int = field(default=0, compare=False)
    network: str = ""
    adds_to: str = CONTEXT


def cross_attention_layers(parameters: Mapping[str, Tensor]) -> list[Layer]:
    """Find a UNet's cross-attention layers, in forward order, from its named parameters (only shapes are read).

    Raises UnsupportedModelError where there are none, as in transformers that attend to text and picture jointly.
    """
    found = []
    for name, weight in parameters.items():
        match = _TO_VALUE.search(name)
        if match:
            kind, block, index = match[1], int(match[2]), int(match[3])
            # The middle block counts its parts where the others count blocks; at run time it is ("middle", 0).
            block = 0 if kind == "middle" else block
            query = parameters.get(name.replace(".to_v.weight", ".to_q.weight"))
            width = 0 if query is None else query.shape[1]
            found.append((_KINDS.index(kind), block, index, weight.shape[1], width))
    if not found:
        raise UnsupportedModelError(
            "the model has none of a UNet's cross-attentions from picture to text, as SD 1.x, SD 2.x and SDXL have "
            "them, and of no other attention is it known where text stands in it"
        )
    return [Layer(f"{_KINDS[kind]}.{block}.{index}", *widths) for kind, block, index, *widths in sorted(found)]


def architecture_name(layers: Sequence[Layer]) -> str:
    """What people call a network with these layers."""
    width = max((layer.context_dim for layer in layers), default=0)
    kind = next((layer.name.split(".")[0] for layer in layers), "")
    if kind in ("joint", "cross"):
        return f"transformer with {len(layers)} {kind} attentions of {width}"
    return name_of_unet(len(layers), width)


def name_of_unet(cross_attentions: int, context_dim: int) -> str:
    """What people call a UNet with so many cross-attention layers over a context of this width."""
    return _ARCHITECTURES.get(
        (cross_attentions, context_dim), f"UNet with {cross_attentions} cross-attentions of {context_dim}"
    )


@dataclass(frozen=True)
class Placement:
    """One concept at one noun of one prompt.

    delta: (layers, tokens, D), tokens being 1 or the number of `rows`; it may require grad.
    layers: the name of each of delta's layers. Layers of the UNet that are not named stay as they are.
    rows: the noun's rows in the prompt's context.
    context_length: rows of the prompt's context; a longer one at run time repeats it (the host pads so). None: no
    repeats.
    sigma_start, sigma_end: the residual is added while sigma_end <= sigma <= sigma_start.
    region: (H, W) or (B, H, W) in [0, 1] and of any size, where the concept may appear; None is everywhere.
    details: what differs from place to place, for the same layers.

    What a layer adds is made once and kept, so neither delta, region nor details may be written to; what requires grad
    may, since what is made of it is not kept.
    """

    delta: Tensor
    layers: tuple[str, ...]
    rows: tuple[int, ...]
    strength: float = 1.0
    sigma_start: float = math.inf
    sigma_end: float = 0.0
    context_length: int | None = None
    region: Tensor | None = None
    details: Details | None = None
    _kept: dict[Hashable, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.delta.ndim != 3 or len(self.delta) != len(self.layers):
            raise ValueError(
                f"delta has shape {tuple(self.delta.shape)} for {len(self.layers)} layers; give (layers, tokens, width)"
            )
        if not self.rows or min(self.rows) < 0:
            raise ValueError(f"rows={self.rows}; give at least one row of the context, counted from 0")
        if self.delta.shape[1] not in (1, len(self.rows)):
            raise ValueError(
                f"delta has {self.delta.shape[1]} tokens for {len(self.rows)} rows; give 1 or one for each row"
            )
        if not math.isfinite(self.strength):
            raise ValueError(f"strength={self.strength} is not a finite number")
        if math.isnan(self.sigma_start) or math.isnan(self.sigma_end):
            raise ValueError(f"sigma_start={self.sigma_start} and sigma_end={self.sigma_end} must be numbers")
        if self.region is not None and self.region.ndim not in (2, 3):
            raise ValueError(f"region has shape {tuple(self.region.shape)}; give (H, W) or (B, H, W)")
        if self.details is not None and len(self.details.values) != len(self.layers):
            raise ValueError(f"details of {len(self.details.values)} layers for {len(self.layers)}; give as many")

    def is_active(self, sigma: float) -> bool:
        return self.sigma_end <= sigma <= self.sigma_start

    def adds(self) -> bool:
        """Whether there is anything to add, or something learns what to."""
        if self.strength and self.delta.requires_grad:
            return True
        if "adds" not in self._kept:  # asked of the device once
            self._kept["adds"] = torch.tensor(bool(self.strength and self.delta.any()) or self._has_details())
        return bool(self._kept["adds"])

    def _has_details(self) -> bool:
        """Whether a detail changes anything, or is to learn to."""
        if self.details is None:
            return False
        if self.details.values.requires_grad:
            return True
        if "details" not in self._kept:
            self._kept["details"] = torch.tensor(bool(self.strength and self.details.values.any()))
        return bool(self._kept["details"])

    def apart(self, layer: str) -> Sequence[int]:
        """What is evaluated in rows of its own in a layer: 0 is the residual, where it has a region, and r > 0 the r-th
        detail."""
        details = self.details.count if layer in self.layers and self._has_details() else 0
        return range(0 if self.region is not None else 1, 1 + details)

    def add_to(self, value: Tensor, layer: str, part: int = 0) -> Tensor:
        """V_bar's input in a layer: value (N, L, D) with the residual at the noun, in every repeat of the prompt, or
        with a detail alone; part: see `apart`."""
        if layer not in self.layers:
            return value
        key = layer, part, value.shape[-2:], value.dtype, value.device
        addend = self._kept.get(key)
        if addend is None:
            index = self.layers.index(layer)
            residual = self.strength * (self.details.values[index, part - 1 : part] if part else self.delta[index])
            addend = residual_rows(residual, self.rows_in(value), value)
            if not residual.requires_grad and not self.delta.requires_grad:  # it has none where gradients are off
                self._kept[key] = addend
        return value + addend

    def weights(self, layer: str, n: Tensor, size: Sequence[int]) -> list[Tensor]:
        """How much of what is evaluated apart counts, each (N, T, 1).

        n: C's own normed hidden state (N, T, C). size: (height, width) of T.
        """
        parts = self.apart(layer)
        region = None if self.region is None else self.weights_of(len(n), size, n.device)
        opened = openings(self._gates(layer, n), n).split(1, dim=-1) if parts and parts[-1] else ()
        if region is None:
            return list(opened)
        return [region, *(region.to(one) * one for one in opened)]

    def _gates(self, layer: str, like: Tensor) -> Tensor:
        """u_r of a layer (n - 1, C), on the device and in the type of another tensor."""
        key = "gates", layer, like.dtype, like.device
        if key in self._kept:
            return self._kept[key]
        gates = self.details.gates_of(self.layers.index(layer)).to(like)
        if not self.details.gates.requires_grad:
            self._kept[key] = gates
        return gates

    def weights_of(self, rows: int, size: Sequence[int], device: torch.device) -> Tensor:
        """`region_weights` of the region on a device, made once."""
        key = rows, tuple(size), device
        if key not in self._kept:
            self._kept[key] = region_weights(self.region.to(device), rows, size)
        return self._kept[key]

    def rows_in(self, value: Tensor) -> Tensor:
        """The noun's rows in every repeat of the prompt in `value`, on its device: moved
        there once, since that waits."""
        length = value.shape[-2]
        key = length, value.device
        if key not in self._kept:
            once = self.context_length or length
            if length % once:
                raise UnsupportedModelError(
                    f"attention sees {length} rows of text and the prompt has {once}, so that nobody can tell where "
                    "its noun is: remove the node that adds rows to the prompt while it is sampled"
                )
            starts = range(0, length, once)
            rows = [start + row for start in starts for row in self.rows]
            with torch.inference_mode(False):  # autograd keeps it, and keeps no inference tensors
                self._kept[key] = torch.tensor(rows, device=value.device)
        return self._kept[key]


Owners = Callable[[ExtraOptions, int], Sequence[Hashable]]
"""`owners(extra_options, rows) -> whose`: whose the rows of a batch are, from the first on; each owner has as many."""
PlacementsFor = Callable[[ExtraOptions, Hashable], Sequence[Placement]]
"""`placements_for(extra_options, owner)`: what is added to an owner's rows."""


def add_residual(value: Tensor, residual: Tensor, rows: Sequence[int]) -> Tensor:
    """c + onehot(noun) * delta (Eq. 6): value (..., L, D), residual (1 or len(rows), D) -> value's shape and dtype.

    Differentiable in the residual; `value` is not written to.
    """
    return value + residual_rows(residual, torch.tensor(rows, device=value.device), value)


def residual_rows(residual: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """onehot(noun) * delta (Eq. 6), the rows that are added to `value` (..., L, D): (L, D), of its dtype and device.

    residual (1 or len(index), D); index: the noun's rows.
    """
    residual = residual.to(value).repeat(len(index) // len(residual), 1)
    return value.new_zeros(value.shape[-2:]).index_add(0, index, residual)


def region_weights(region: Tensor, rows: int, size: Sequence[int]) -> Tensor:
    """A region as weights of a layer's cells: (H, W) or (B, H, W) -> (rows, h * w, 1); row i takes mask i modulo B."""
    masks = region.reshape(-1, 1, *region.shape[-2:]).float()
    masks = rearrange(area_means(masks, size), "b 1 h w -> b (h w) 1")
    return masks[torch.arange(rows, device=masks.device) % len(masks)]


def crop_region(region: Tensor, size: Sequence[int], area: Sequence[int]) -> Tensor:
    """The part of a region that an area sees: (..., H, W) -> (B, h, w).

    size: (height, width) of the whole latent. area: (height, width, top, left) in latent cells, cut off at its edges.
    """
    masks = region.reshape(-1, 1, *region.shape[-2:]).float()
    masks = smoothly_resized(masks, size)[:, 0]
    height, width, top, left = area
    return masks[:, top : top + height, left : left + width]


def fold_regions(base: Tensor, alone: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """out_C = base + sum_k m_k (out_k - base): each concept changes the output inside its own region only.

    base (N, T, C) without the concepts, `alone` (N, T, C) with each of them, `weights` (N, T, 1) of each.
    """
    return base + sum((weight.to(base) * (out - base) for out, weight in zip(alone, weights, strict=True)), start=0.0)


def layer_name(extra_options: ExtraOptions) -> str:
    """The name of the layer that is being evaluated."""
    kind, block = extra_options["block"]
    return f"{kind}.{block}.{extra_options['block_index']}"


def chunks_in_order(extra_options: ExtraOptions, rows: int) -> Sequence[int]:
    """The simplest owners: the chunks of a batch, known by their place in it."""
    return range(len(extra_options["cond_or_uncond"]))


def on_conditional(placements: Sequence[Placement]) -> PlacementsFor:
    """These placements for the chunks of the positive prompt (0 in `cond_or_uncond`), none for others."""

    def placements_for(extra_options: ExtraOptions, chunk: int) -> Sequence[Placement]:
        return placements if extra_options["cond_or_uncond"][chunk] == 0 else ()

    return placements_for


def foundation_patches(store: QueryStore, owners: Owners = chunks_in_order) -> Patches:
    """Patches for F's evaluation: F computes as it always does, and `store` remembers its n for C."""

    def record(n: Tensor, context: Tensor, value: Tensor, extra_options: ExtraOptions):
        layer, whose = layer_name(extra_options), owners(extra_options, len(n))
        for owner, rows in zip(whose, n.chunk(len(whose)), strict=True):
            store[layer, owner] = rows.detach()
        return n, context, value

    return {"attn2_patch": [record]}


def customised_patches(store: QueryStore, placements_for: PlacementsFor, owners: Owners = chunks_in_order) -> Patches:
    """Patches for C's evaluation: F's recorded n for the queries, the placements' residuals on the values."""

    def replay(n: Tensor, context: Tensor, value: Tensor, extra_options: ExtraOptions):
        layer = layer_name(extra_options)
        recorded = [store.get((layer, owner)) for owner in owners(extra_options, len(n))]
        if any(rows is None for rows in recorded):
            raise RuntimeError(
                f"the foundation stream left no queries for layer {layer}: was it evaluated before this one?"
            )
        extra_options[_OWN] = n
        locked = _joined(recorded, n)
        if locked.shape != n.shape:
            raise RuntimeError(
                f"layer {layer} has shape {tuple(n.shape)} in this stream and {tuple(locked.shape)} in the foundation "
                "stream: another patch treats them differently"
            )
        return locked, context, value

    residuals = _residual_patches(placements_for, owners)
    return {**residuals, "attn2_patch": [replay, *residuals["attn2_patch"]]}


def _joined(chunks: Sequence[Tensor], like: Tensor) -> Tensor:
    """Chunks (N, T, D), which may wait in main memory, as one batch on the device and in the type of another."""
    if len(chunks) == 1:
        return chunks[0].to(like, non_blocking=chunks[0].device.type == "cpu")
    joined = like.new_empty(sum(map(len, chunks)), *chunks[0].shape[1:])
    for place, chunk in zip(joined.split([len(chunk) for chunk in chunks]), chunks, strict=True):
        place.copy_(chunk, non_blocking=chunk.device.type == "cpu")
    return joined


def _residual_patches(placements_for: PlacementsFor, owners: Owners) -> Patches:
    """Add the residuals to each owner's N rows.

    A concept with a region, and each detail, is evaluated in N rows of its own, within the cross-attention only: base +
    what it adds. So that other packs still see equal chunks, all rows grow by as many such sets as those with the most.
    """

    def place(n: Tensor, context: Tensor, value: Tensor, extra_options: ExtraOptions):
        own, layer = extra_options.pop(_OWN, n), layer_name(extra_options)
        whose = [placements_for(extra_options, owner) for owner in owners(extra_options, len(n))]
        apart = [[(one, part) for one in placements for part in one.apart(layer)] for placements in whose]
        extra = max(map(len, apart))
        if extra:
            size = extra_options["activations_shape"][-2:]
            weights = [
                [weight for placement in placements for weight in placement.weights(layer, rows, size)]
                for placements, rows in zip(whose, own.chunk(len(whose)), strict=True)
            ]
            extra_options[_GROWN] = len(n), weights  # for `fold`: one layer's patches have one dict
        if not any(one.region is None for placements in whose for one in placements) and not extra:
            return n, context, value
        values = []
        for base, placements, parts in zip(value.chunk(len(whose)), whose, apart, strict=True):
            for placement in placements:
                if placement.region is None:
                    base = placement.add_to(base, layer)
            alone = [placement.add_to(base, layer, part) for placement, part in parts]
            values += [base, *alone, *[base] * (extra - len(alone))]
        n, context = (_repeat_chunks(x, len(whose), 1 + extra) for x in (n, context))
        return n, context, torch.cat(values)

    def fold(out: Tensor, extra_options: ExtraOptions):
        rows, weights = extra_options.pop(_GROWN, (len(out), ()))
        if not weights:
            return out
        extra = max(map(len, weights))
        places = next(weight.shape[1] for of_owner in weights for weight in of_owner)
        if len(out) != rows * (1 + extra):
            raise RuntimeError(
                f"layer {layer_name(extra_options)} has {len(out)} rows where {rows * (1 + extra)} went in, so that "
                "nothing can be confined to a region, or to where a detail is: remove the other attention patch, or "
                "the region, or take a residual whose capacity is 1"
            )
        if out.shape[1] != places:
            raise RuntimeError(
                f"layer {layer_name(extra_options)} has {out.shape[1]} places where {places} went in, so that nobody "
                "can tell where a region or a detail is: remove what merges tokens from the model"
            )
        folded = []
        for chunk, of_owner in zip(out.chunk(len(weights)), weights, strict=True):
            base, *alone = chunk.chunk(1 + extra)
            folded.append(fold_regions(base, alone[: len(of_owner)], of_owner))
        return torch.cat(folded)

    return {"attn2_patch": [place], "attn2_output_patch": [fold]}


def _repeat_chunks(x: Tensor, chunks: int, times: int) -> Tensor:
    """Repeat every chunk's rows: (chunks * N, ...) -> (chunks * times * N, ...)."""
    return repeat(x, "(chunks n) ... -> (chunks times n) ...", chunks=chunks, times=times) if times > 1 else x


CONCEPTS_KEY = "profusion_infusion"
"""The name under which a host's conditioning carries its placed concepts."""


@dataclass(frozen=True)
class PlacedConcept:
    """A placement before the model is known that samples it: the shares of sampling in which
    it acts become sigmas then."""

    placement: Placement
    start_percent: float = 0.0
    end_percent: float = 1.0


def check_context_width(width: int, layers: Sequence[Layer]) -> None:
    """Raise ValueError unless a text encoder's contexts, of this width, are what these layers take.

    Of a transformer's nobody can tell: what it attends to it has made of them.
    """
    if layers[0].name.startswith(("joint", "cross")):
        return
    if width != layers[0].context_dim:
        raise ValueError(
            f"the text encoder makes a context of width {width} and the model takes {layers[0].context_dim}: "
            "use the clip that belongs to the model"
        )


def together(*patches: Patches) -> Patches:
    """All of these patches, in their order."""
    return {
        kind: [one for own in patches for one in own.get(kind, ())]
        for kind in dict.fromkeys(k for own in patches for k in own)
    }


def with_patches(model_options: Mapping[str, Any], patches: Patches) -> dict[str, Any]:
    """A host's model options with these patches around other packs': before them the rows are the network's own."""
    options = {**model_options, "transformer_options": {**model_options["transformer_options"]}}
    theirs = options["transformer_options"].get("patches", {})
    options["transformer_options"]["patches"] = {
        **theirs,
        "attn2_patch": [*patches.get("attn2_patch", ()), *theirs.get("attn2_patch", ())],
        "attn2_output_patch": [*theirs.get("attn2_output_patch", ()), *patches.get("attn2_output_patch", ())],
    }
    attention = patches.get(ATTENTION)
    if attention:
        inner = options["transformer_options"]
        inner[OVERRIDE] = overridden(attention, inner.get(OVERRIDE))
    return options
