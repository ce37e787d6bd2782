"""F's evaluations, kept for the next picture: of the same prompt and seed it has the same F, whatever is drawn into it.

An evaluation of F is a function of the model's state, the conditionings without their concepts, the latent and its
noise level. `fingerprint` takes all of it to the last bit, so that sampler, scheduler, seed, steps and guidance need no
comparison: where any of them makes another latent, or the model is another, the evaluation is done anew. What cannot be
told apart, as a function that another pack has put on the model, is never recalled (`UntoldError`).

Kept of each evaluation: the predictions, 0.5 MB for SDXL at 1024 pixels with a negative prompt; what it said of the
nouns, 64 KB each; and its queries, where they fit. C needs these where it is evaluated: they are 420 MB there, so that
F is evaluated anew at C's steps, and at none between (`profusion.stride`). At Toybox's size those of a run fit.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .infusion import CONCEPTS_KEY
from .problems import Explained
from .queries import OWN_MEMORY
from .rows import PICTURES, identity

KEPT = 60 * 10**6  # bytes for each picture of a batch, in main memory
_NOT_OF_F = ("uuid", CONCEPTS_KEY, PICTURES)  # in a conditioning: its name, what is drawn into it, and a label
_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)
# The host's packages, whose objects here are what their attributes are: a conditioning's entries, noise schedules.
_OBJECTS = "comfy", "comfy_extras"
_DO_MORE = ("control", "hooks", "gligen")  # in a conditioning: objects that do something, and may remember it
# Model options of what is around an evaluation, by how their names begin; and what hooks load, which are of `_DO_MORE`.
_OUTSIDE = "sampler_", "denoise_mask_function", "disable_cfg1_optimization", "to_load_options"
_OF_A_RUN = (CONCEPTS_KEY, "wrappers", "callbacks", "sample_sigmas", "sigmas", "cond_or_uncond", "uuids")


class UntoldError(Explained):
    """Something whose effect on an evaluation nobody can tell from what it holds."""


def fingerprint(*things: Any) -> bytes:
    """32 bytes that stand for these to the last bit: tensors, numbers, texts, containers of them, and the host's
    objects of these. Raises UntoldError where there is anything else among them, such as a function."""
    hasher = hashlib.blake2b(digest_size=32)
    _feed(hasher, things)
    return hasher.digest()


def _feed(hasher: Any, thing: Any) -> None:
    if thing is None or isinstance(thing, _PLAIN):
        hasher.update(f"{type(thing).__name__} {thing!r};".encode())
    elif type(thing) in (Tensor, torch.nn.Parameter):
        hasher.update(f"tensor {thing.dtype} {tuple(thing.shape)};".encode())
        flat = torch.empty(thing.numel(), dtype=thing.dtype).copy_(thing.detach().reshape(-1))
        hasher.update(flat.view(torch.uint8).numpy())
    elif isinstance(thing, Mapping):
        hasher.update(f"mapping {len(thing)};".encode())
        for name in sorted(thing, key=repr):
            _feed(hasher, name)
            _feed(hasher, thing[name])
    elif isinstance(thing, list | tuple):
        hasher.update(f"{len(thing)} things;".encode())
        for part in thing:
            _feed(hasher, part)
    elif isinstance(thing, set | frozenset):
        _feed(hasher, sorted(thing, key=repr))
    elif (
        not isinstance(thing, type)
        and type(thing).__module__.partition(".")[0] in _OBJECTS
        and hasattr(thing, "__dict__")
    ):
        hasher.update(" ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in type(thing).__mro__).encode())
        _feed(hasher, vars(thing))
    else:
        raise UntoldError(f"{type(thing).__module__}.{type(thing).__qualname__}")


def of_f(conds: Sequence[Sequence[Mapping] | None]) -> list:
    """What F's evaluation depends on of groups of conditionings."""
    return [
        group and [{name: part for name, part in cond.items() if name not in _NOT_OF_F} for cond in group]
        for group in conds
    ]


def state_key(state: bytes, conds: Sequence, options: Mapping[str, Any], *inputs: Tensor) -> bytes | None:
    """What an evaluation of F is known by; None where nobody can tell what it depends on.

    state: of the model. options: the host's model options. inputs: the latent and its noise levels.
    """
    for cond in (cond for group in conds for cond in group or ()):
        if any(cond.get(name) is not None for name in _DO_MORE):
            return None
    inner = options.get("transformer_options", {})
    for groups in (*inner.get("wrappers", {}).values(), *inner.get("callbacks", {}).values()):
        if any(group for key, group in groups.items() if key != CONCEPTS_KEY):
            return None
    inner = {name: part for name, part in inner.items() if name not in _OF_A_RUN}
    outer = {
        name: part for name, part in options.items() if name != "transformer_options" and not name.startswith(_OUTSIDE)
    }
    try:
        return fingerprint(state, of_f(conds), inner, outer, inputs)
    except UntoldError:
        return None


@dataclass
class Evaluated:
    """One evaluation of F. Conditionings are known by their place among `names`, whatever a run calls them.

    predicted: for each group of conditionings. turns: how often each conditioning was part of a call. maps: what it
    said of nouns, (sum of maps, how many), by the noun. queries: by layer and owner; None where they are not kept.
    """

    predicted: list[Tensor]
    turns: dict[int, int]
    maps: dict[Hashable, tuple[Tensor, Tensor]]
    queries: dict[tuple[str, tuple[int, int]], Tensor] | None = None

    def tensors(self) -> Iterator[Tensor]:
        yield from self.predicted
        for pair in self.maps.values():
            yield from pair
        yield from (self.queries or {}).values()

    @property
    def size(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def names(conds: Sequence[Sequence[Mapping] | None]) -> list[tuple[int, Any]]:
    """The conditionings' identities, in the order in which they stand there."""
    return list(dict.fromkeys(identity(index, cond) for index, group in enumerate(conds) for cond in group or ()))


def queries_by_place(
    queries: Mapping[tuple[str, tuple[Hashable, int]], Tensor], known: Sequence[Hashable]
) -> dict[tuple[str, tuple[int, int]], Tensor]:
    """F's queries by layer and (place of the conditioning among `known`, turn)."""
    places = {name: place for place, name in enumerate(known)}
    return {(layer, (places[name], turn)): rows for (layer, (name, turn)), rows in queries.items() if name in places}


def queries_by_name(
    queries: Mapping[tuple[str, tuple[int, int]], Tensor], known: Sequence[Hashable]
) -> dict[tuple[str, tuple[Hashable, int]], Tensor]:
    """The same under the names that this run has for its conditionings."""
    return {(layer, (known[place], turn)): rows for (layer, (place, turn)), rows in queries.items()}


def turns_by_place(turns: Counter, known: Sequence[Hashable]) -> dict[int, int]:
    return {place: turns[name] for place, name in enumerate(known)}


def turns_by_name(turns: Mapping[int, int], known: Sequence[Hashable]) -> Counter:
    return Counter({known[place]: turn for place, turn in turns.items()})


def own_copy(tensor: Tensor) -> Tensor:
    """In main memory, and nobody else's."""
    return tensor.detach().to("cpu", copy=True) if tensor.device.type in OWN_MEMORY else tensor.detach().clone()


class Foundations:
    """F's evaluations of the last runs, within `limit` bytes for each picture of the batch at hand.

    Where they are too many, those go first that the run at hand has not asked for, then its queries, from the last to
    the first, since C can have them again for an evaluation. Then no more are kept.
    """

    def __init__(self, limit: int = KEPT):
        self._limit = limit
        self._known: OrderedDict[bytes, Evaluated] = OrderedDict()
        self._in_use: set[bytes] = set()
        self._model: Callable[[], Any] = lambda: None
        self.size = 0  # bytes

    def begin(self, model: Any) -> None:
        """A run of this model begins. There is one model at a time, and nothing is kept of a model that is gone."""
        if self._model() is not model:
            self.clear()
            self._model = weakref.ref(model, self._gone)
        self._in_use.clear()

    def forget(self, model: Any) -> None:
        """Keep nothing of this model."""
        if self._model() is model:
            self.clear()

    def _gone(self, reference: Any) -> None:
        if reference is self._model:
            self.clear()

    def clear(self) -> None:
        self._known.clear()
        self._in_use.clear()
        self.size = 0

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: bytes) -> Evaluated | None:
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
            self._in_use.add(key)
        return found

    def keep(self, key: bytes, evaluated: Evaluated, pictures: int) -> None:
        """Keep copies of an evaluation's tensors, of so many pictures, as far as there is room."""
        before = self._known.pop(key, None)
        if before is not None:
            self.size -= before.size
            evaluated.maps = {**before.maps, **evaluated.maps}
            evaluated.queries = evaluated.queries or before.queries
        self._in_use.add(key)
        limit, queries = self._limit * pictures, evaluated.queries
        kept = Evaluated(evaluated.predicted, evaluated.turns, evaluated.maps)
        if not self._make_room(kept.size, limit):
            return
        if queries is not None:
            kept.queries = queries
            if not self._make_room(kept.size, limit, at_queries_cost=False):
                kept.queries = None
        kept.predicted = [own_copy(tensor) for tensor in kept.predicted]
        kept.maps = {name: tuple(map(own_copy, pair)) for name, pair in kept.maps.items()}
        kept.queries = kept.queries and {name: own_copy(rows) for name, rows in kept.queries.items()}
        self._known[key] = kept
        self.size += kept.size

    def _make_room(self, size: int, limit: int, at_queries_cost: bool = True) -> bool:
        if size > limit:
            return False
        for key in [key for key in self._known if key not in self._in_use]:
            if self.size + size <= limit:
                return True
            self.size -= self._known.pop(key).size
        for known in reversed(self._known.values()) if at_queries_cost else ():
            if self.size + size <= limit:
                return True
            self.size -= known.size
            known.queries = None
            self.size += known.size
        return self.size + size <= limit
