"""The file of a residual: safetensors, less than 11,000 bytes for SD 1.5 in the default precision.

metadata            format, format_version, architecture, layers (names), width (of each), noun, steps, seed,
                    precision, checksum; what the residual was trained on, see origin.py
int6                codes (layers, bytes) U8 and scales (layers, groups) BF16, see packing.py
float16, float32    delta (layers, 1, width)
float32 only        training.<name>: the optimizer's tensors, for a resume that continues bit for bit
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
from ..kinds import RESIDUAL, another_kind
from ..problems import why
from . import packing
from .concept import Residual, ResidualError, checked_delta, checked_layers, checked_training_state, some
from .origin import Origin

if TYPE_CHECKING:
    from PIL.Image import Image

PRECISIONS = ("int6", "float16", "float32")
SUFFIX = ".safetensors"
PREVIEW_SUFFIX = ".png"
PREVIEW_SIDE = 256
MAX_FILE_BYTES = 64 << 20

_FORMAT = "profusion.residual"
_FORMAT_VERSION = "1"
_FIELDS = ("format", "format_version", "architecture", "layers", "width", "noun", "steps", "seed", "precision")
_TRAINING = "training."


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
    tensors = _encode_delta(checked_delta(residual.delta, residual.layers), precision)
    if precision == "float32" and keep_training_state:
        state = checked_training_state(residual.training_state) or {}
        tensors |= {_TRAINING + name: tensor for name, tensor in state.items()}
    metadata = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "architecture": residual.architecture,
        "layers": " ".join(residual.layers),
        "width": str(residual.context_dim),
        "noun": residual.noun,
        "steps": str(residual.steps),
        "seed": str(residual.seed),
        "precision": precision,
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
    stored = delta.to(torch.float16 if precision == "float16" else torch.float32)
    if not torch.isfinite(stored).all():
        raise ResidualError(
            f"The residual has values up to {delta.abs().max():.3g}, too large for {precision}: "
            f"save it as int6 or float32."
        )
    return {"delta": stored}


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
    version = metadata.get("format_version", "none")
    if version != _FORMAT_VERSION:
        raise ResidualError(
            f"it has the format version {version:.20}, and this ProFusion reads {_FORMAT_VERSION}: "
            f"either ProFusion needs an update, or the file is damaged"
        )
    files.check_integrity(contents, metadata, _FIELDS)
    missing = [field for field in _FIELDS if field not in metadata]
    if missing:
        raise ResidualError(f"it lacks the metadata {some(missing)}")
    tensors = files.to_tensors(contents)
    state = {name.removeprefix(_TRAINING): tensors.pop(name) for name in list(tensors) if name.startswith(_TRAINING)}
    layers = checked_layers(metadata["layers"].split(" "))  # before anything is made of the tensors
    return Residual(
        delta=_decode_delta(tensors, metadata["precision"], len(layers), _number(metadata, "width")),
        noun=metadata["noun"],
        layers=layers,
        architecture=metadata["architecture"],
        steps=_number(metadata, "steps"),
        seed=_number(metadata, "seed"),
        training_state=state or None,
        origin=Origin.of_metadata(metadata),
    )


def _decode_delta(tensors: Mapping[str, Tensor], precision: str, layers: int, width: int) -> Tensor:
    """delta (layers, 1, width) float32 from the tensors that keep it in a file."""
    groups = packing.groups_per_row(width)
    expected = {
        "int6": {
            "codes": (torch.uint8, (layers, groups * packing.BYTES_PER_GROUP)),
            "scales": (torch.bfloat16, (layers, groups)),
        },
        "float16": {"delta": (torch.float16, (layers, 1, width))},
        "float32": {"delta": (torch.float32, (layers, 1, width))},
    }
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != expected.get(precision):
        raise ResidualError(f"its tensors ({some(found)}) do not fit {layers} layers of {width} as '{precision:.20}'")
    if precision == "int6":
        return packing.dequantise(tensors["codes"], tensors["scales"], width)[:, None]
    return tensors["delta"].float()


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
