"""How two streams meet in a network's attention: what F leaves for C, what C does with it, and where F sees nouns.

Samplers of the two streams know no more of a network than this. UNets have cross-attentions whose inputs patches are
given (`infusion`); of transformers the attention itself is seen (`joint_attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

from torch import Tensor, nn

from . import holding, infusion, joint_attention
from .holding import NounMaps
from .infusion import ExtraOptions, Owners, Patches, PlacementsFor, QueryStore, chunks_in_order
from .queries import query_numbers
from .showing import map_patches
from .text_attention import Layout


class Attending(Protocol):
    """See `UNetAttention`, which is one."""

    patch: int

    def foundation(self, store: QueryStore, placements_for: PlacementsFor, owners: Owners) -> Patches: ...

    def customised(self, store: QueryStore, placements_for: PlacementsFor, owners: Owners) -> Patches: ...

    def looking(
        self, network: nn.Module, maps: NounMaps, placements_for: PlacementsFor, *known, **named
    ) -> Patches: ...

    def showing(self, rows: Sequence[int], see: Callable[[str, Tensor, Tensor], None]) -> Patches: ...

    def noting(self, note: Callable[[], None]) -> Patches: ...

    def left_for(self, nouns: Sequence[Hashable]) -> Hashable: ...

    def numbers_left(self, network: nn.Module, cells: int, text: int) -> list[float]: ...


@dataclass(frozen=True)
class UNetAttention:
    """The cross-attentions of a UNet, by ComfyUI's `attn2_patch`. patch: cells a side that the network takes as one."""

    patch: ClassVar[int] = 1

    def foundation(self, store: QueryStore, placements_for: PlacementsFor, owners: Owners = chunks_in_order) -> Patches:
        """F's patches: it stays the plain model, and `store` is left what C needs at these placements."""
        return infusion.foundation_patches(store, owners)

    def customised(self, store: QueryStore, placements_for: PlacementsFor, owners: Owners = chunks_in_order) -> Patches:
        """C's patches, after F's."""
        return infusion.customised_patches(store, placements_for, owners)

    def looking(self, network: nn.Module, maps: NounMaps, placements_for: PlacementsFor, *known, **named) -> Patches:
        """Patches that add to `maps` where a stream sees its nouns; the rest as in `holding.map_patches`."""
        attention_of = partial(holding.cross_attention, network)
        return holding.map_patches(maps, attention_of, placements_for, *known, **named)

    def showing(self, rows: Sequence[int], see: Callable[[str, Tensor, Tensor], None]) -> Patches:
        """Patches that show the noun's map at every layer; see `showing.map_patches`."""
        return map_patches(rows, see)

    def noting(self, note: Callable[[], None]) -> Patches:
        """Patches that call `note` at every attention with text, and change nothing."""

        def look(n: Tensor, context: Tensor, value: Tensor, extra_options: ExtraOptions):
            note()
            return n, context, value

        return {"attn2_patch": [look]}

    def left_for(self, nouns: Sequence[Hashable]) -> Hashable:
        """What F's leavings depend on besides F: they serve all runs in which it is the same. nouns: the run's."""
        return None

    def numbers_left(self, network: nn.Module, cells: int, text: int) -> list[float]:
        """How many numbers F leaves in each layer, for a picture and prompt, as a multiple of the latent's cells.

        cells: of the latent; text: rows of the prompt.
        """
        return query_numbers(dict(network.named_parameters()))


@dataclass(frozen=True)
class JointAttention:
    """A transformer's attentions with text, by ComfyUI's `optimized_attention_override`.

    lock: see `joint_attention`. heads and width: of a layer's attention, and so how much F leaves.
    """

    layout: Layout
    lock: str = joint_attention.COLUMN
    heads: int = 1
    width: int = 1

    @property
    def patch(self) -> int:
        return self.layout.patch

    def foundation(self, store: QueryStore, placements_for: PlacementsFor, owners: Owners = chunks_in_order) -> Patches:
        return joint_attention.foundation_patches(self.layout, self.lock, store, placements_for, owners)

    def customised(self, store: QueryStore, placements_for: PlacementsFor, owners: Owners = chunks_in_order) -> Patches:
        return joint_attention.customised_patches(self.layout, self.lock, store, placements_for, owners)

    def looking(self, network: nn.Module, maps: NounMaps, placements_for: PlacementsFor, *known, **named) -> Patches:
        return joint_attention.map_patches(self.layout, maps, placements_for, *known, **named)

    def showing(self, rows: Sequence[int], see: Callable[[str, Tensor, Tensor], None]) -> Patches:
        return joint_attention.showing_patches(self.layout, rows, see)

    def noting(self, note: Callable[[], None]) -> Patches:
        return joint_attention.noting(self.layout, note)

    def left_for(self, nouns: Sequence[Hashable]) -> Hashable:
        return self.lock, *nouns

    def numbers_left(self, network: nn.Module, cells: int, text: int) -> list[float]:
        rows, joint = cells / self.layout.patch**2, self.layout.joint
        if self.lock == joint_attention.COLUMN:
            left = self.heads * rows  # of a noun
        else:
            left = self.width * (1 + joint) * (rows + joint * text)  # Q, and K
        return [(left + joint * text * self.width) / cells] * self.layout.layers


UNET = UNetAttention()
