"""Which model it is, also after a restart: by its weights, by the patches on them, and by the file it came from."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ...profusion import __version__
from ...profusion.files import sha256_of
from ...profusion.keeping import digest
from ...profusion.residual import Origin, Residual
from ...profusion.residual.origin import SAMPLED, Sample, other_base, sample_of
from ...profusion.residual.training import NOUN_PROMPTS

# The inputs by which the host's loaders, and those of others, name a model's file, and the folders it may be in.
_FILE_INPUTS = ("ckpt_name", "unet_name", "model_name", "diffusion_model")
_FOLDERS = ("checkpoints", "diffusion_models", "unet_gguf")
_MAX_NODES = 100  # between a loader and a trainer
_TOYBOX = "ProFusion_ToyboxLoader"
MOST_SECONDS, _SLICE = 5.0, 0.1  # that a finished training waits for its hash, and until it looks for Cancel again

_hashes: dict[tuple[str, int, int], str] = {}
"""The hashes of files that were trained on, by path, time and size."""


class BaseFile:
    """The file of the model that a node was given, as its graph names it; hashed beside a training, which takes longer.

    name: the file's name, "Toybox", or empty where the graph does not say.
    """

    def __init__(self, graph: Mapping[str, Any] | None, node: str | None, socket: str = "model"):
        self.name, self._hash, self._thread = "", "", None
        named = _named(graph or {}, str(node), socket)
        if named is None:
            return
        self.name = named.replace("\\", "/").rpartition("/")[2]
        path = next((found for kind in _FOLDERS if (found := _full_path(kind, named))), None)
        if path is not None:
            self._thread = threading.Thread(target=self._read, args=(Path(path),), daemon=True)
            self._thread.start()

    @classmethod
    def of_node(cls, node: type[io.ComfyNode]) -> BaseFile:
        """Of the model at the input `model` of a node that asks for the hidden prompt and unique_id."""
        hidden = node.hidden
        return cls(None, None) if hidden is None else cls(hidden.prompt, hidden.unique_id)

    def hash_so_far(self) -> str:
        """The first ten hexadecimal digits of its SHA-256, as model sites have it; empty while it is being read."""
        return self._hash[:10]

    def wait(self) -> None:
        """Until the file has been read, or MOST_SECONDS: disks are slow at times. Raises what the host raises at
        Cancel."""
        until = time.monotonic() + MOST_SECONDS
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < until:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self._thread.join(_SLICE)

    def _read(self, path: Path) -> None:
        try:
            state = path.stat()
            key = str(path), state.st_mtime_ns, state.st_size
            if key not in _hashes:
                _hashes[key] = sha256_of(path)
            self._hash = _hashes[key]
        except OSError:
            return  # it is told nothing of


def _named(graph: Mapping[str, Any], node: str, socket: str) -> str | None:
    """What the loader before a node names, along the inputs called `model`; None where there is none to be found.

    A node that takes a model itself may name a file of another kind, as loaders of motion modules do.
    """
    for _ in range(_MAX_NODES):
        link = _inputs(graph, node).get(socket)
        if not _is_link(link):
            return None
        node, socket = str(link[0]), "model"
        if isinstance(graph.get(node), Mapping) and graph[node].get("class_type") == _TOYBOX:
            return "Toybox"
        inputs = _inputs(graph, node)
        if any("model" in name and _is_link(value) for name, value in inputs.items()):
            continue
        return next((inputs[name] for name in _FILE_INPUTS if isinstance(inputs.get(name), str)), None)
    return None


def _is_link(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def _inputs(graph: Mapping[str, Any], node: str) -> Mapping[str, Any]:
    entry = graph.get(node)
    inputs = entry.get("inputs") if isinstance(entry, Mapping) else None
    return inputs if isinstance(inputs, Mapping) else {}


def _full_path(kind: str, name: str) -> str | None:
    try:
        return folder_paths.get_full_path(kind, name)
    except Exception:  # no such kind of folder on this host, or a name that is none
        return None


def origin_on(patcher: ModelPatcher, base: BaseFile, learning_rate: float = 0.0) -> Origin:
    """What is learned on a MODEL today comes from, but for the hash of its file, which may still be being read."""
    return Origin(
        base=base.name,
        sample=weights_sample(patcher),
        learning_rate=learning_rate,
        prompts=NOUN_PROMPTS,
        version=__version__,
        day=date.today().isoformat(),
        patched=sum(name.startswith("diffusion_model.") for name in patcher.patches),
    )


def weights_sample(patcher: ModelPatcher) -> Sample:
    """A sample of what a UNet's cross-attention reads of a prompt, as the weights are without patches; see `sample_of`.

    Empty where they cannot be read, as quantised forms cannot.
    """
    try:
        patches = patcher.get_key_patches("diffusion_model.")
        return sample_of([_weight(entries[0]) for name, entries in patches.items() if name.endswith(SAMPLED)])
    except Exception:  # whatever a form that we have never seen raises: no training may be lost to it
        return Sample()


def _weight(entry: Any) -> Tensor:
    """A weight of an entry of the host's. Raises ValueError where its values are stored in another form."""
    weight, convert = entry if isinstance(entry, tuple) else (entry, None)
    if convert is not None and convert(weight, inplace=False) is not weight:
        raise ValueError("stored in a form of its own")
    return weight


def other_bases(residuals: Sequence[Residual], patcher: ModelPatcher) -> list[str]:
    """A warning for each residual that was trained on other weights of the model's architecture; none for those that
    were on these, or of which nobody can tell."""
    told = [residual for residual in residuals if residual.origin is not None and residual.origin.sample.numbers]
    sample = weights_sample(patcher) if told else Sample()
    return [text for one in told if (text := other_base(one.noun, one.origin, sample)) is not None]


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
