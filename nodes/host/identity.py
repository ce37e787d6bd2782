"""Whether a model is the one it was, also after a restart: by its weights, and by the patches on them."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...profusion.keeping import digest


def model_digest(patcher: ModelPatcher) -> str:
    """16 hexadecimal digits of a model's own weights, as they are without patches, and of the patches.

    Functions that hang on a model are told apart by nothing here: what they do shows in the first loss of a training.
    """
    return digest({name: [_told(entry) for entry in entries] for name, entries in patcher.get_key_patches().items()})


def _told(thing: object) -> object:
    """A part of an entry, of tensors, numbers and names alone."""
    if isinstance(thing, Tensor):
        try:
            return digest(thing)
        except (RuntimeError, TypeError, NotImplementedError):  # some quantised forms cannot be taken apart
            return str((thing.dtype, tuple(thing.shape)))
    if isinstance(thing, (list, tuple)):
        return [_told(part) for part in thing]
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return thing
    return [type(thing).__name__, getattr(thing, "__qualname__", ""), _told(getattr(thing, "weights", None))]
