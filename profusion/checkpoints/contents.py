"""What a safetensors file of any size says is in it: names, shapes and types, read before a single tensor is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
from torch import Tensor

from .. import files, problems
from ..kinds import MAX_HEADER_BYTES
from ..problems import Explained

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_WEIGHTS = {"F32", "F16", "BF16"}
_MOST_NAMES = 100_000


class CheckpointError(Explained, ValueError):
    """A file that is no checkpoint of SD 1.x, SD 2.x or SDXL, or not one that can be loaded. It says what it is."""


@dataclass(frozen=True)
class Contents:
    """The header of a safetensors file. types: as safetensors spells them ("F16")."""

    path: Path
    shapes: dict[str, Shape]
    types: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)

    def under(self, prefix: str) -> dict[str, Shape]:
        """The shapes of all names with this beginning, without it."""
        return {name[len(prefix) :]: shape for name, shape in self.shapes.items() if name.startswith(prefix)}

    def any_begins(self, *beginnings: str) -> bool:
        """Whether a name begins with one of these."""
        return any(name.startswith(beginnings) for name in self.shapes)

    def check_types(self, names: Iterable[str]) -> None:
        """Raise CheckpointError unless all these tensors are float32, float16 or bfloat16."""
        strange = sorted(name for name in names if self.types[name] not in _WEIGHTS)
        if strange:
            raise refusal(
                self.path,
                f"its weights are stored as {self.types[strange[0]]:.20} ('{strange[0]:.80}'), and only F32, F16 and "
                "BF16 can be read. Take the checkpoint as its makers released it, not a quantised copy",
            )

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors, one after another, still on the disk."""
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                for name in names:
                    yield name, file.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as problem:
            raise refusal(self.path, problems.why(problem)) from problem


def refusal(path: Path, reason: str) -> CheckpointError:
    """The error that names the file and says why it cannot be loaded. reason: no full stop at its end."""
    return CheckpointError(f"'{path.name:.120}' cannot be loaded: {reason}.")


def read_contents(path: str | Path) -> Contents:
    """Read the header of a safetensors file, and compare it with the file's length.

    Raises CheckpointError, which says what the file is where it is something else, or that it is cut short.
    """
    path = Path(path)
    if not path.is_file():  # a pipe would never answer
        raise refusal(path, "there is no such file" if not path.exists() else "it is no file, but a folder or a device")
    try:
        with path.open("rb") as file:
            beginning = file.read(64)
            length = int.from_bytes(beginning[:8], "little")
            if len(beginning) < 8 or length > MAX_HEADER_BYTES:
                raise refusal(path, files.what_it_is(beginning))
            size = path.stat().st_size
            if size < 8 + length:
                raise refusal(path, f"it is cut short: the header takes {length} bytes, the whole file has {size}")
            file.seek(8)
            header = json.loads(file.read(length))
        return _checked(path, header, size - 8 - length)
    except OSError as problem:
        raise refusal(path, files.why_not_read(problem).rstrip(".")) from problem
    except CheckpointError:
        raise
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as problem:
        raise refusal(path, f"it has an invalid header ({problems.why(problem)})") from problem


def _checked(path: Path, header: dict, size: int) -> Contents:
    metadata = header.pop("__metadata__", None) or {}
    if len(header) > _MOST_NAMES:
        raise refusal(path, f"it holds {len(header)} tensors, which no checkpoint does")
    shapes, types, end = {}, {}, 0
    for name, entry in header.items():
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        if len(shape) > files.MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise refusal(path, f"its tensor '{name:.80}' has a shape that is none")
        expected = math.prod(shape) * _BYTES.get(entry["dtype"], 0)
        if stop < start or (expected and stop - start != expected):
            raise refusal(path, f"its tensor '{name:.80}' has {stop - start} bytes where its shape takes {expected}")
        shapes[name], types[name], end = shape, entry["dtype"], max(end, stop)
    if end > size:
        raise refusal(
            path,
            f"it is cut short: its tensors take {end} bytes, and {size} are there. Its download or its copy did not "
            "end: get it again",
        )
    return Contents(path, shapes, types, metadata if isinstance(metadata, dict) else {})
