"""The file of a residual: safetensors, less than 11,000 bytes for SD 1.5 in the default precision.

metadata            format, format_version, architecture, layers (names), width (of each), noun, steps, seed,
                    precision, checksum; what the residual was trained on, see origin.py
int6                codes (layers, bytes) U8 and scales (layers, groups) BF16, see packing.py
float16, float32    delta (layers, 1, width)
float32 only        training.<name>: the optimizer's tensors, for a resume that continues bit for bit

That is version 1, and what can be said in it is. Version 2 is the same with parts, which the metadata's `parts` names,
a space between them. Each has metadata and tensors of its own. A reader refuses a part that it does not know.

network             network, the family of another network than a UNet, and adds_to, "context" or "value": what delta is
                    added to, the rows before W_V or what it makes of them. No tensors
details             capacity (n), gate_widths (of each layer). int6: detail_codes and detail_scales (layers * (n - 1),
                    ...) in DETAIL_BITS, gate_codes and gate_scales (n - 1, ...) in GATE_BITS. float16, float32: details
                    (layers, n - 1, width), gates (n - 1, sum of gate_widths)
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import files
from ..details import MAX_CAPACITY, Details
from ..infusion import CONTEXT
from ..kinds import RESIDUAL, another_kind
from ..problems import why
from . import packing
from .concept import (
    Residual,
    ResidualError,
    checked_delta,
    checked_details,
    checked_layers,
    checked_training_state,
    some,
)
from .origin import Origin

if TYPE_CHECKING:
    from PIL.Image import Image

PRECISIONS = ("int6", "float16", "float32")
SUFFIX = ".safetensors"
PREVIEW_SUFFIX = ".png"
PREVIEW_SIDE = 256
MAX_FILE_BYTES = 64 << 20

_FORMAT = "profusion.residual"
_WITHOUT_PARTS, _WITH_PARTS = "1", "2"  # format versions
_FIELDS = ("format", "format_version", "architecture", "layers", "width", "noun", "steps", "seed", "precision")
_TRAINING = "training."
_DETAILS, _NETWORK = "details", "network"
# Of version 2, and the metadata that each has.
_PARTS = {_DETAILS: ("capacity", "gate_widths"), _NETWORK: ("network", "adds_to")}
# What 50,000 bytes on SD 1.5 have room for with a capacity of 4. Of what a residual makes better on two concepts of
# Toybox, 1.6 and 1.9 % is lost; with 4 and 3 bits 1.5 and 3.3 %, with 5 and 2 3.5 and 13 %, with 6 and 1 8 and 26 %.
DETAIL_BITS, GATE_BITS = 3, 4

_TYPES = {"float16": torch.float16, "float32": torch.float32}
_Expected = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class SavedResidual:
    """What `save_residual` wrote: the file, its size in bytes, the preview picture, or a warning why there is none."""

    path: Path
    size: int
    preview: Path | None = None
    warning: str | None = None


def save_residual(
    residual: Residual,
    path: str | Path,
    precision: str = "int6",
    preview: Image | None = None,
    keep_training_state: bool = True,
    overwrite: bool = True,
) -> SavedResidual:
    """Write a residual, and beside it `<stem>.png` where a preview is given; missing folders are made.

    precision: "int6" (the smallest), "float16", or "float32", which is exact and alone keeps the training state, unless
    keep_training_state is false. A file already at `path` is replaced as a whole, or untouched where anything fails;
    without `overwrite` it and a picture beside it stay, and files.NameTaken is raised.
    The preview is written last and cannot cost the residual: where it fails, the result carries a warning.
    Raises ResidualError, which says what to do.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ResidualError(f"The residual cannot be saved as '{path}': give it a name that ends in {SUFFIX}.")
    data = _encode(residual, precision, keep_training_state)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, data, overwrite)
    except (OSError, ValueError) as problem:
        raise ResidualError(
            f"The residual could not be saved as '{path}': {files.why_not_written(problem)}"
        ) from problem
    if preview is None:
        return SavedResidual(path, len(data))
    try:
        return SavedResidual(
            path, len(data), preview=_write_preview(preview, path.with_suffix(PREVIEW_SUFFIX), overwrite)
        )
    except files.NameTaken as problem:
        return SavedResidual(path, len(data), warning=f"No preview picture could be saved: {problem}")
    except (OSError, ValueError) as problem:
        return SavedResidual(
            path, len(data), warning=f"No preview picture could be saved: {files.why_not_written(problem)}"
        )


def load_residual(path: str | Path) -> Residual:
    """Read a residual of any precision. Raises ResidualError, which names the file, what is wrong and what to do."""
    path = Path(path)
    try:
        return _decode(_read(path))
    except OSError as problem:
        raise ResidualError(f"The residual file '{path}' cannot be read: {files.why_not_read(problem)}") from problem
    except Exception as problem:  # whatever a damaged file makes of a library
        advice = "Choose a file that the residual saver wrote, copy it once more, or train the residual again."
        reason = another_kind(path, RESIDUAL) or f"{why(problem)}. {advice}"
        raise ResidualError(f"The residual file '{path}' cannot be loaded: {reason}") from problem


def _encode(residual: Residual, precision: str, keep_training_state: bool) -> bytes:
    """The bytes of a residual's file."""
    if precision not in PRECISIONS:
        raise ResidualError(f"There is no precision '{precision}': choose one of {', '.join(PRECISIONS)}.")
    # Checked once more, since freezing a dataclass does not freeze its tensors.
    delta = checked_delta(residual.delta, residual.layers)
    tensors, parts = _encode_delta(delta, precision), {}
    if residual.details is not None:
        details = checked_details(residual.details, delta)
        tensors |= _encode_details(details, precision)
        widths = " ".join(map(str, details.widths))
        parts[_DETAILS] = {"capacity": str(residual.capacity), "gate_widths": widths}
    if residual.network or residual.adds_to != CONTEXT:
        parts[_NETWORK] = {"network": residual.network, "adds_to": residual.adds_to}
    if precision == "float32" and keep_training_state:
        state = checked_training_state(residual.training_state) or {}
        tensors |= {_TRAINING + name: tensor for name, tensor in state.items()}
    metadata = {
        "format": _FORMAT,
        "format_version": _WITH_PARTS if parts else _WITHOUT_PARTS,
        "architecture": residual.architecture,
        "layers": " ".join(residual.layers),
        "width": str(residual.context_dim),
        "noun": residual.noun,
        "steps": str(residual.steps),
        "seed": str(residual.seed),
        "precision": precision,
    }
    if parts:
        metadata |= {"parts": " ".join(parts)} | {
            field: value for part in parts.values() for field, value in part.items()
        }
    origin = {} if residual.origin is None else residual.origin.as_metadata(residual.noun, residual.architecture)
    data = b"".join(files.tensor_pieces(tensors, metadata, origin))
    if len(data) > MAX_FILE_BYTES:
        raise ResidualError(
            f"The residual takes {len(data)} bytes, more than the {MAX_FILE_BYTES} that can be loaded "
            f"again: save it without its training state."
        )
    return data


def _encode_delta(delta: Tensor, precision: str) -> dict[str, Tensor]:
    """The tensors that keep a delta (layers, 1, width) in a file."""
    if precision == "int6":
        codes, scales = packing.quantise(delta[:, 0])
        return {"codes": codes, "scales": scales}
    return {"delta": _stored(delta, precision)}


def _encode_details(details: Details, precision: str) -> dict[str, Tensor]:
    """The tensors that keep details in a file."""
    if precision == "int6":
        codes, scales = packing.quantise(details.values.flatten(0, 1), DETAIL_BITS)
        gate_codes, gate_scales = packing.quantise(details.gates, GATE_BITS)
        return {"detail_codes": codes, "detail_scales": scales, "gate_codes": gate_codes, "gate_scales": gate_scales}
    return {"details": _stored(details.values, precision), "gates": _stored(details.gates, precision)}


def _stored(values: Tensor, precision: str) -> Tensor:
    stored = values.to(torch.float16 if precision == "float16" else torch.float32)
    if not torch.isfinite(stored).all():
        raise ResidualError(
            f"The residual has values up to {values.abs().max():.3g}, too large for {precision}: "
            f"save it as int6 or float32."
        )
    return stored


def _read(path: Path) -> bytes:
    """All of a file, unless it is a device or far too large for a residual."""
    if path.exists() and not path.is_file():
        raise ResidualError("it is a folder or a device, not a file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ResidualError(f"it is larger than {MAX_FILE_BYTES >> 20} MiB, so it must be another kind of model")
    return path.read_bytes()


def _decode(data: bytes) -> Residual:
    """The residual in a file's bytes. Raises ResidualError or FileFormatError, with the reason alone."""
    contents, metadata = files.parse(data)
    if metadata.get("format") != _FORMAT:
        raise ResidualError(f"it holds something else than a residual (its tensors: {some(contents)})")
    parts = _parts_of(metadata)
    fields = (*_FIELDS, *(("parts",) if parts else ()), *(field for part in parts for field in _PARTS[part]))
    files.check_integrity(contents, metadata, fields)
    missing = [field for field in fields if field not in metadata]
    if missing:
        raise ResidualError(f"it lacks the metadata {some(missing)}")
    tensors = files.to_tensors(contents)
    state = {name.removeprefix(_TRAINING): tensors.pop(name) for name in list(tensors) if name.startswith(_TRAINING)}
    layers = checked_layers(metadata["layers"].split(" "))  # before anything is made of the tensors
    width, precision = _number(metadata, "width"), metadata["precision"]
    expected = _expected_delta(precision, len(layers), width)
    if _DETAILS in parts:
        count, widths = _details_of(metadata, len(layers))
        expected |= _expected_details(precision, len(layers), width, count, sum(widths))
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != expected:
        raise ResidualError(
            f"its tensors ({some(found)}) do not fit {len(layers)} layers of {width} as '{precision:.20}'"
        )
    told = {field: metadata[field] for field in _PARTS[_NETWORK]} if _NETWORK in parts else {}
    return Residual(
        delta=_decode_delta(tensors, precision, width),
        noun=metadata["noun"],
        layers=layers,
        architecture=metadata["architecture"],
        steps=_number(metadata, "steps"),
        seed=_number(metadata, "seed"),
        training_state=state or None,
        origin=Origin.of_metadata(metadata),
        details=_decode_details(tensors, precision, width, widths) if _DETAILS in parts else None,
        **told,
    )


def _parts_of(metadata: Mapping[str, str]) -> list[str]:
    """The parts that a file has besides a delta. Raises ResidualError, which names what is unknown here."""
    version = metadata.get("format_version", "none")
    advice = "either ProFusion needs an update, or the file is damaged"
    if version not in (_WITHOUT_PARTS, _WITH_PARTS):
        raise ResidualError(
            f"it has the format version {version:.20}, and this ProFusion reads {_WITHOUT_PARTS} and {_WITH_PARTS}: "
            f"{advice}"
        )
    parts = metadata.get("parts", "").split(" ") if version == _WITH_PARTS else []
    unknown = [part for part in parts if part not in _PARTS]
    if unknown:
        raise ResidualError(f"it has the part {unknown[0]!r:.40}, which this ProFusion does not know: {advice}")
    return parts


def _details_of(metadata: Mapping[str, str], layers: int) -> tuple[int, tuple[int, ...]]:
    """How many details a file has, and the widths of the layers."""
    capacity, widths = _number(metadata, "capacity"), metadata["gate_widths"].split(" ")
    if not 2 <= capacity <= MAX_CAPACITY:
        raise ResidualError(f"capacity must be from 2 to {MAX_CAPACITY}; found {capacity}")
    if len(widths) != layers or not all(re.fullmatch(r"[1-9][0-9]{0,5}", width) for width in widths):
        raise ResidualError(f"gate_widths must be {layers} whole numbers; found {some(widths)}")
    return capacity - 1, tuple(map(int, widths))


def _expected_delta(precision: str, layers: int, width: int) -> _Expected:
    """What the tensors of a delta are in a file; nothing in a precision that there is not."""
    if precision == "int6":
        return _expected_codes("", layers, width, packing.BITS)
    return {"delta": (_TYPES[precision], (layers, 1, width))} if precision in _TYPES else {}


def _expected_details(precision: str, layers: int, width: int, count: int, gates: int) -> _Expected:
    """What the tensors of details are in a file."""
    if precision == "int6":
        values = _expected_codes("detail_", layers * count, width, DETAIL_BITS)
        return values | _expected_codes("gate_", count, gates, GATE_BITS)
    if precision not in _TYPES:
        return {}
    return {"details": (_TYPES[precision], (layers, count, width)), "gates": (_TYPES[precision], (count, gates))}


def _expected_codes(prefix: str, rows: int, width: int, bits: int) -> _Expected:
    groups = packing.groups_per_row(width)
    return {
        f"{prefix}codes": (torch.uint8, (rows, groups * packing.bytes_per_group(bits))),
        f"{prefix}scales": (torch.bfloat16, (rows, groups)),
    }


def _decode_delta(tensors: Mapping[str, Tensor], precision: str, width: int) -> Tensor:
    """delta (layers, 1, width) float32 from the tensors that keep it in a file."""
    if precision == "int6":
        return packing.dequantise(tensors["codes"], tensors["scales"], width)[:, None]
    return tensors["delta"].float()


def _decode_details(tensors: Mapping[str, Tensor], precision: str, width: int, widths: tuple[int, ...]) -> Details:
    """Details from the tensors that keep them in a file."""
    if precision != "int6":
        return Details(tensors["details"].float(), tensors["gates"].float(), widths)
    values = packing.dequantise(tensors["detail_codes"], tensors["detail_scales"], width, DETAIL_BITS)
    gates = packing.dequantise(tensors["gate_codes"], tensors["gate_scales"], sum(widths), GATE_BITS)
    return Details(values.unflatten(0, (len(widths), -1)), gates, widths)


def _number(metadata: Mapping[str, str], field: str) -> int:
    """A metadata entry as a number of at most 20 digits: enough for a seed, and no work for a hostile one."""
    if not re.fullmatch(r"[0-9]{1,20}", metadata[field]):
        raise ResidualError(f"{field} must be a whole number; found {metadata[field]!r:.80}")
    return int(metadata[field])


def _write_preview(preview: Image, path: Path, overwrite: bool) -> Path:
    """Write a picture of at most PREVIEW_SIDE pixels a side where the host's model browser looks for it."""
    small = preview.convert("RGB")
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    png = io.BytesIO()
    small.save(png, format="PNG", optimize=True)
    files.write_atomically(path, png.getvalue(), overwrite)
    return path
