"""The background is F's: where a concept's noun is drawn is found from F's own attention, and all around it is held.

Prompt-to-prompt's local blend (arXiv 2208.01626, section 3.2) on the two streams of Infusion (arXiv 2404.14007). F's
cross-attention maps say where the noun is: with A_F,i = softmax(Q_F K^T / sqrt(d)) in layer i, at every step so far,

    M = mean over layers and steps of sum over the noun's rows j of A_F,i[:, j]     resized to the latent
    region = grown(M > THRESHOLD max(M))                                            of several concepts: either's

and each denoised prediction of C is F's outside the region. Both streams begin with the same noise and draw the same
noise, so C's latent is F's there. Cells that were in the region once keep something of C; `held` on the finished
latents takes that too, and then C is F's outside the region to the bit, whatever the sampler was.

A concept with a region of the user's has that one in the place of M's: the user has said where.

Several concepts in one stream do not meet in the maps, which hardly overlap, but in C's self-attention and
convolutions, which carry one's look to the other (benchmarks/infusion_pairs.py). Apart, each noun k has an evaluation
of its own, with its residual alone, and sees of C its own share of the region alone: what it would see without the
others. With w_k = 1 where M_k / max M_k is the largest of the nouns' (Infusion combines concepts by maps that are
normalised between them), 0 elsewhere, and x the latent before the step,

    D_C = sum_k w_k D(x_k; delta_k),    x_k = x_F + w_k region (x_C - x_F)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .devices import area_means, smoothly_resized
from .infusion import ExtraOptions, Owners, Patches, Placement, PlacementsFor, chunks_in_order, layer_name, together
from .models.attention import attention_map

FREE, SOFTLY, HELD = "free", "held softly", "held"
BACKGROUNDS = (FREE, SOFTLY, HELD)
THRESHOLD = 0.35  # of the largest value of a noun's map
GROWN = 1  # cells of the latent around what is above it
TOGETHER, APART = "together", "each apart"
CONCEPTS = (TOGETHER, APART)
NOT_HELD = (
    "what is kept apart is found and put together by the regions of a held background: set background to 'held', or "
    "leave the concepts together"
)
NO_PICTURE = (
    "on a shared latent the foundation draws no picture of its own, so that the background cannot be held to it: take "
    "the foundation's own trajectory, or leave the background free"
)
_AT_ONCE = 2**23  # numbers of all heads' maps, 32 MiB: two rows of SDXL's largest layers at 1024 pixels
_FEATHER = 2  # cells of the latent in which a soft region falls to nothing


class Attention(Protocol):
    """A cross-attention of a UNet, here or in the host."""

    heads: int
    to_q: nn.Module
    to_k: nn.Module


def cross_attention(unet: nn.Module, layer: str) -> Attention:
    """The cross-attention that has this name among `infusion.cross_attention_layers`."""
    kind, block, index = layer.split(".")
    parts = [unet.middle_block] if kind == "middle" else [getattr(unet, f"{kind}_blocks")[int(block)]]
    (transformer,) = (part for blocks in parts for part in blocks if hasattr(part, "transformer_blocks"))
    return transformer.transformer_blocks[int(index)].attn2


def noun_map(attention: Attention, n: Tensor, context: Tensor, rows: Tensor) -> Tensor:
    """sum over j in rows of softmax(Q K^T / sqrt(d))[:, j], the mean of all heads: (B, T, C), (B, L, D) -> (B, T)."""
    return attention_probabilities(attention, n, context)[..., rows].sum(dim=-1)


def attention_probabilities(attention: Attention, n: Tensor, context: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)), the mean of all heads, float32: (B, T, C), (B, L, D) -> (B, T, L).

    In float32 whatever the model computes in, since half of the bits round a score by whole tenths and overflow at
    65504; and of a few rows at a time, since a map has a number for every head.
    """
    query, key = attention.to_q(n), attention.to_k(context)
    at_once = max(1, _AT_ONCE // (attention.heads * query.shape[1] * key.shape[1]))
    parts = zip(query.split(at_once), key.split(at_once), strict=True)
    return torch.cat([attention_map(q.float(), k.float(), attention.heads).mean(dim=1) for q, k in parts])


def region_of(maps: Tensor, threshold: float = THRESHOLD, grown: int = GROWN) -> Tensor:
    """Where maps (B, H, W) are above this share of their largest value, and so many cells around: (B, H, W), 0 or 1."""
    inside = (maps > threshold * maps.amax(dim=(1, 2), keepdim=True)).float()
    return F.max_pool2d(inside[:, None], 2 * grown + 1, stride=1, padding=grown)[:, 0]


def feathered(region: Tensor, cells: int = _FEATHER) -> Tensor:
    """A region (B, H, W) whose edge falls to 0 in as many further cells, in even steps; inside it stays what it is."""
    soft, reached = region, region
    for step in range(1, cells + 1):
        reached = F.max_pool2d(reached[:, None], 3, stride=1, padding=1)[:, 0]
        soft = torch.maximum(soft, reached * (1 - step / (cells + 1)))
    return soft


def winners(maps: Tensor, regions: Tensor) -> Tensor:
    """w_k: 1 for the noun whose map, normalised between the nouns, is the largest in a cell, and 0 for the others.

    maps, regions: (K, B, H, W) of all nouns -> (K, B, H, W), which sums to 1 over the nouns. In a noun's own region no
    noun comes before it that has the cell not in its own.
    """
    relative = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    first = (relative + 2 * (regions > 0)).argmax(dim=0)
    return F.one_hot(first, len(maps)).movedim(-1, 0).to(maps)


def held(customised: Tensor, foundation: Tensor, region: Tensor) -> Tensor:
    """C inside a region (B, H, W) in [0, 1], F outside, and both where it is soft; (B, C, H, W) or (B, C, 1, H, W).

    To the bit F's where the region is 0, and C's where it is 1.
    """
    region = region.to(customised).view(len(region), *[1] * (customised.ndim - 3), *region.shape[1:])
    mixed = torch.where(region >= 1, customised, foundation + region * (customised - foundation))
    return torch.where(region > 0, mixed, foundation)


@dataclass
class _Sum:
    """Maps (B, H, W) of one noun of one prompt, of how many they are the sum, and the user's region."""

    maps: Tensor
    counts: Tensor
    region: Tensor | None


@dataclass
class NounMaps:
    """The maps of a run's nouns so far. size: (height, width) of the latent; pictures: of the batch."""

    pictures: int
    size: tuple[int, int]
    _sums: dict[Hashable, _Sum] = field(default_factory=dict, init=False, repr=False)
    _latest: dict[Hashable, _Sum] = field(default_factory=dict, init=False, repr=False)  # of one evaluation

    def add(
        self,
        key: Hashable,
        maps: Tensor,
        region: Tensor | None = None,
        pictures: Sequence[int] | None = None,
        area: Sequence[int] | None = None,
    ) -> None:
        """One layer's maps (b, h, w) of a noun. key: the noun's, in its prompt. region: its concept's, if it has one.

        pictures: which of the batch they are of, if not of all. area: (height, width, top, left), in cells of the
        latent, that the layer saw, if not all of it.
        """
        part = self._part(area)
        resized = smoothly_resized(maps[:, None].float(), _size_of(part))[:, 0]
        index = torch.tensor(range(self.pictures) if pictures is None else pictures, device=maps.device)
        if key not in self._latest:
            whole = maps.new_zeros(self.pictures, *self.size, dtype=torch.float32)
            given = None if region is None else self._given(region, part, maps.device)
            self._latest[key] = _Sum(whole, whole.new_zeros(self.pictures, 1, 1), given)
        known = self._latest[key]
        known.maps[part].index_add_(0, index, resized)
        known.counts.index_add_(0, index, torch.ones_like(known.counts[index]))

    def latest(self) -> dict[Hashable, tuple[Tensor, Tensor]]:
        """What the last evaluation said of each noun: the sum of its maps (B, H, W), and of how many (B, 1, 1)."""
        return {key: (one.maps, one.counts) for key, one in self._latest.items()}

    def recall(
        self,
        key: Hashable,
        latest: tuple[Tensor, Tensor] | None,
        region: Tensor | None = None,
        area: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Have again what an evaluation said of a noun, as `latest` gave it; of one with a region nothing is needed."""
        given = None if region is None else self._given(region, self._part(area), device)
        if latest is None:
            latest = torch.zeros(self.pictures, *self.size), torch.zeros(self.pictures, 1, 1)
        self._latest[key] = _Sum(*(tensor.to(device, copy=True) for tensor in latest), given)

    def copy_latest(self, other: NounMaps) -> None:
        """Take what another's last evaluation said for this one's."""
        self._latest = {key: _Sum(one.maps, one.counts, one.region) for key, one in other._latest.items()}

    def settle(self) -> None:
        """Count the last evaluation among those before it. Each is summed apart, so that a kept one counts the same."""
        for key, one in self._latest.items():
            known = self._sums.setdefault(key, one)
            if known is not one:
                known.maps, known.counts = known.maps + one.maps, known.counts + one.counts
        self._latest = {}

    def put_in_order(self, keys: Sequence[Hashable]) -> None:
        """Let the last evaluation's nouns be in this order, whatever order its rows were evaluated in.

        Of nouns whose maps are alike the first one counts, so that a kept evaluation has to have them in the same.
        """
        ordered = [key for key in dict.fromkeys([*keys, *self._latest]) if key in self._latest]
        self._latest = {key: self._latest[key] for key in ordered}

    def maps(self, key: Hashable) -> Tensor:
        """A noun's map (B, H, W), the mean of all layers and steps so far. KeyError before the first of them."""
        self.settle()
        return self._mean(self._sums[key])

    def nouns(self) -> list[Hashable]:
        """The nouns of which there are maps: (what `where` told of the owner, place among the owner's placements)."""
        self.settle()
        return list(self._sums)

    def shares(self) -> dict[Hashable, Tensor]:
        """Each noun's share of the picture: (B, H, W), 0 or 1; see `winners`."""
        self.settle()
        sums = self._sums.values()
        found = winners(torch.stack([self._mean(one) for one in sums]), torch.stack([*map(self._region_of, sums)]))
        return dict(zip(self._sums, found, strict=True))

    def region(self) -> Tensor | None:
        """Where C may differ from F, after all maps so far: (B, H, W), 0 or 1; None before the first of them."""
        self.settle()
        found = [self._region_of(one) for one in self._sums.values()]
        return torch.stack(found).amax(dim=0) if found else None

    def _region_of(self, one: _Sum) -> Tensor:
        return region_of(self._mean(one)) if one.region is None else one.region

    @staticmethod
    def _mean(one: _Sum) -> Tensor:
        return one.maps / one.counts.clamp(min=1)

    def _part(self, area: Sequence[int] | None) -> tuple[slice, slice, slice]:
        """An area's place in (B, H, W), cut off at the latent's edges."""
        height, width, top, left = area or (*self.size, 0, 0)
        bottom, right = min(top + height, self.size[0]), min(left + width, self.size[1])
        return slice(None), slice(top, bottom), slice(left, right)

    def _given(self, region: Tensor, part: tuple[slice, slice, slice], device: torch.device) -> Tensor:
        """A user's region in the part of the latent that it is for: (B, H, W), 0 or 1."""
        given = torch.zeros(self.pictures, *self.size, device=device)
        masks = area_means(region.reshape(-1, 1, *region.shape[-2:]).to(given), _size_of(part))[:, 0]
        given[part] = (masks > 0).float()[torch.arange(self.pictures, device=masks.device) % len(masks)]
        return given


def _size_of(part: tuple[slice, slice, slice]) -> tuple[int, int]:
    return part[1].stop - part[1].start, part[2].stop - part[2].start


Where = Callable[[ExtraOptions, Hashable], tuple[Hashable, Sequence[int] | None, Sequence[int] | None]]
"""`where(extra_options, owner) -> (key, pictures, area)`: what `NounMaps.add` is told of an owner's rows."""


def of_noun(placements: Sequence[Placement], key: Hashable, noun: Hashable | None) -> list[Placement]:
    """An owner's placements, or of them the one at this noun; key: what `where` tells of the owner."""
    return [one for index, one in enumerate(placements) if noun is None or (key, index) == noun]


def map_patches(
    maps: NounMaps,
    attention_of: Callable[[str], Attention],
    placements_for: PlacementsFor,
    owners: Owners = chunks_in_order,
    where: Where = lambda _, owner: (owner, None, None),
    noun: Hashable | None = None,
) -> Patches:
    """Patches that add to `maps` what a stream's cross-attentions say of its nouns, or of one of them, and change
    nothing.

    They must see what `foundation_patches` sees: the UNet's own n and context, before other packs' patches.
    """

    def look(n: Tensor, context: Tensor, value: Tensor, extra_options: ExtraOptions):
        whose, size = owners(extra_options, len(n)), extra_options["activations_shape"][-2:]
        if size[0] * size[1] != n.shape[1]:
            return n, context, value  # merged tokens, say: where each is nobody can tell
        attention = attention_of(layer_name(extra_options))
        for owner, own_n, own_context in zip(whose, n.chunk(len(whose)), context.chunk(len(whose)), strict=True):
            placed = enumerate(placements_for(extra_options, owner))
            placements: dict[int, Placement] = {index: one for index, one in placed if one.adds()}
            if not placements:
                continue
            key, pictures, area = where(extra_options, owner)
            if noun is not None:
                placements = {index: one for index, one in placements.items() if (key, index) == noun}
            probabilities = attention_probabilities(attention, own_n, own_context)
            for index, placement in placements.items():
                found = probabilities[..., placement.rows_in(own_context)].sum(dim=-1).view(len(own_n), *size)
                maps.add((key, index), found, placement.region, pictures, area)
        return n, context, value

    return {"attn2_patch": [look]}


@dataclass(frozen=True)
class Noun:
    """A noun of a prompt that maps are of: its key among them, its concept's region and its prompt's area, if any."""

    key: Hashable
    region: Tensor | None
    area: Sequence[int] | None


Looking = Callable[..., Patches]
"""`looking(maps, placements_for, owners, where, noun=None)`: what `map_patches` makes, of a network that it knows."""


class Holding:
    """How one run of both streams holds the background. background: softly, or to the bit. looking: makes the patches
    that look for nouns in the network's attention.

    Softly, the region is F's and C's own together, by the map of the noun that each one's queries make, and its edge is
    soft: a shape that has to grow beyond F's outline may. Nothing is replaced at the end. apart: whether several
    concepts are drawn by an evaluation each.
    """

    def __init__(
        self,
        background: str,
        looking: Looking,
        pictures: int,
        size: Sequence[int],
        apart: bool = False,
    ):
        if background not in (SOFTLY, HELD):
            raise ValueError(f"background={background!r}: give {SOFTLY!r} or {HELD!r}")
        self.softly, self._apart = background == SOFTLY, apart
        self._looking = looking
        self._foundation, self._customised = (NounMaps(pictures, tuple(size)) for _ in range(2))

    def watching_foundation(self, patches: Patches, placements_for: PlacementsFor, *known) -> Patches:
        """F's patches, and what they leave of its nouns. known: `owners` and `where` of `map_patches`."""
        self._foundation.settle()
        return self._before(patches, self._looking(self._foundation, placements_for, *known))

    def watching_customised(
        self, patches: Patches, placements_for: PlacementsFor, *known, noun: Hashable | None = None
    ) -> Patches:
        """C's patches, and what its own queries say of its nouns, or of one of them, where that matters."""
        if not self.softly:
            return patches
        self._customised.settle()
        watching = self._looking(self._customised, placements_for, *known, noun=noun)
        return self._before(patches, watching)

    def latest(self) -> dict[Hashable, tuple[Tensor, Tensor]]:
        """What F's last evaluation said of each noun, until that is asked for; see `NounMaps.latest`."""
        return self._foundation.latest()

    def put_in_order(self, nouns: Sequence[Hashable]) -> None:
        """Let what F's last evaluation said of its nouns be in this order, as `recall` has it in that of its nouns."""
        self._foundation.put_in_order(nouns)

    def recall(self, nouns: Sequence[Noun], known: Mapping[Hashable, tuple[Tensor, Tensor]], device: torch.device):
        """Have what an evaluation of F said of these nouns, as `latest` gave it, in its place."""
        self._foundation.settle()
        for noun in nouns:
            self._foundation.recall(noun.key, known.get(noun.key), noun.region, noun.area, device)

    def alike(self) -> None:
        """C is F at this evaluation: its own queries say what F's do."""
        if self.softly:
            self._customised.settle()
            self._customised.copy_latest(self._foundation)

    @staticmethod
    def _before(patches: Patches, watching: Patches) -> Patches:
        return together(watching, patches)

    def region(self) -> Tensor | None:
        """Where C may differ from F: (B, H, W) in [0, 1]; None while nothing is known of the nouns."""
        region = self._foundation.region()
        if region is None or not self.softly:
            return region
        own = self._customised.region()
        return feathered(region if own is None else torch.maximum(region, own))

    def nouns(self) -> list[Hashable | None]:
        """What C is evaluated for, one after another: None is all of its nouns at once."""
        found = self._foundation.nouns()
        return found if self._apart and len(found) > 1 else [None]

    def seen_by(
        self, noun: Hashable | None, customised: Tensor, foundation: Tensor, pictures: Sequence[int] | None = None
    ) -> Tensor:
        """x_k: what a noun's evaluation looks at, of C's latent and of F's at the same level, (B, C, H, W) each."""
        if noun is None:
            return customised
        share = self._foundation.shares()[noun] * self.region()
        return held(customised, foundation, share if pictures is None else share[list(pictures)])

    def joined(self, predictions: Mapping[Hashable | None, Tensor], pictures: Sequence[int] | None = None) -> Tensor:
        """sum_k w_k D_k of the denoised predictions (B, C, H, W) for each of `nouns`."""
        (_, joined), *others = predictions.items()
        for noun, prediction in others:
            share = self._foundation.shares()[noun]
            joined = held(prediction, joined, share if pictures is None else share[list(pictures)])
        return joined

    def denoised(self, customised: Tensor, foundation: Tensor, pictures: Sequence[int] | None = None) -> Tensor:
        """C's denoised prediction with F's around the region: (B, C, H, W) each; pictures: which of the batch."""
        region = self.region()
        if region is None:
            return customised
        return held(customised, foundation, region if pictures is None else region[list(pictures)])

    def finished(self, customised: Tensor, foundation: Tensor) -> Tensor:
        """C's finished latent: held to the bit, F's own outside the region."""
        return customised if self.softly else self.denoised(customised, foundation)
