"""The authors' release: an archive of torch's, which is looked through before anything is made of it.

torch's own reader runs no code of such a file, but believes its sizes: a record may be deflated to a thousandth, and
what is called while it reads may ask for any amount of memory. A checkpoint needs neither.
"""

from __future__ import annotations

import pickletools  # which lists what a file would do, and does none of it
import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .. import files
from ..problems import why

MAX_RECORDS = 20_000
MAX_PROGRAM_BYTES = 2 << 20

_NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
_NAMES |= {f"torch {kind}Storage" for kind in ("Half", "BFloat16", "Float", "Double", "Long", "Int", "Bool")}
_CALLS = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}


def check_archive(path: Path) -> None:
    """Raise FileFormatError unless it is an archive as torch writes it that holds tensors by name, and OSError."""
    with path.open("rb") as file:
        beginning = file.read(64)
    if not beginning.startswith(b"PK\x03\x04"):
        raise files.FileFormatError(
            "it is in torch's old format, or damaged" if beginning[:1] == b"\x80" else files.what_it_is(beginning)
        )
    try:
        with zipfile.ZipFile(path) as archive:
            _check_program(_program(archive, path.stat().st_size))
    except files.FileFormatError:
        raise
    except Exception as problem:  # whatever a damaged file makes of zipfile and pickletools
        raise files.FileFormatError(f"it is cut short or damaged ({why(problem)})") from problem


def _program(archive: zipfile.ZipFile, size: int) -> bytes:
    """The record that says which tensors there are."""
    records = archive.infolist()
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed or sum(record.file_size for record in records) > size:
        raise files.FileFormatError("it is compressed, or its records overlap, and a checkpoint of torch's never is")
    programs = [record for record in records if record.filename.endswith("/data.pkl")]
    if len(records) > MAX_RECORDS or len(programs) != 1 or programs[0].file_size > MAX_PROGRAM_BYTES:
        raise files.FileFormatError("it is an archive, but not a checkpoint of torch's")
    return archive.read(programs[0])


def _check_program(program: bytes) -> None:
    for code, argument, _ in pickletools.genops(program):
        if code.name in _CALLS or (code.name == "GLOBAL" and argument not in _NAMES):
            raise files.FileFormatError(f"it asks for more than tensors: {code.name} {argument!s:.80}")


def check_stored(tensors: Mapping[str, Tensor]) -> None:
    """Raise FileFormatError where tensors share memory, or repeat it, so that they have more numbers than the file."""
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > sum(stored.values()):
        raise files.FileFormatError("its tensors have more numbers than it has bytes for")
