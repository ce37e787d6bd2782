"""Tensor files that are written whole or not at all, and that notice when a bit of them has changed.

The container is safetensors. Its metadata carries a checksum of the tensors and of the metadata written with them, so
that a damaged file is refused rather than read wrong. The checksum is against damage, not against forgery: whoever
reads a file still checks that its contents make sense. Nothing in a file is ever executed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import safetensors
import torch
from torch import Tensor

from . import problems
from .problems import Explained

try:
    import fcntl
except ImportError:  # Windows, which refuses to remove a file that is open
    fcntl = None

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Tensor name -> (type, shape, bytes), as the file has them.
Contents = dict[str, tuple[str, list[int], bytes]]

CHECKSUM = "checksum"
MAX_HEADER_BYTES = 1 << 20
MAX_DIMENSIONS = 8
_PIECE = 1 << 24  # bytes of a file that are read at once
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL}

LEFT_BEHIND = 600.0  # seconds without a write, after which a temporary that nobody holds was left by a kill
_TEMPORARY = re.compile(r"\.profusion-[0-9a-f]{12}\.tmp")

Written = TypeVar("Written")


class FileFormatError(Explained, ValueError):
    """Not a safetensors file, or a damaged one. The message completes the sentence "it is ..."."""


class NameTaken(Exception):
    """Another file has this name already, and must keep it."""


def write_atomically(path: Path, data: bytes | Iterable[bytes], overwrite: bool = True) -> None:
    """Write `data`, whole or in pieces, under a temporary name in its folder, flush it to the disk, then rename it.

    Whatever goes wrong, `path` holds either what it held before or all of `data`, and no temporary file is left; what
    a kill left in this folder earlier is removed. overwrite: whether a file at `path` may be replaced; otherwise
    NameTaken is raised, also where another process takes the name at the same moment.
    Raises OSError as the system words it (no such folder, read-only, disk full).
    """
    temporary = temporary_beside(path)
    try:
        with opened_temporary(temporary) as file:
            for piece in [data] if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        _remove_leftovers(temporary)
        if overwrite:
            temporary.replace(path)
        else:
            _claim(path, temporary)
    except BaseException:  # an interrupt must not leave a temporary file behind either
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_numbered(paths: Iterable[Path], write: Callable[[Path], Written]) -> Written:
    """`write(path)` for the first free one of these paths. It must raise NameTaken where somebody took it meanwhile."""
    for path in paths:
        if path.exists():
            continue
        try:
            return write(path)
        except NameTaken:
            continue
    raise ValueError("no name is left")


def save_in_one(places: Sequence[Path], save: Callable[[Path], Written], error: type[ValueError]) -> Written:
    """`save(folder)` in the first of these folders where it can be done. Raises what it raised in all of them."""
    problems: list[Exception] = []
    for folder in places:
        try:
            return save(folder)
        except Exception as problem:  # whatever it is, another folder may do
            problems.append(problem)
    if len(problems) == 1:
        raise problems[0]
    raise error(" ".join(str(problem) for problem in problems)) from problems[0]


def try_writing(path: Path, size: int) -> None:
    """Whether so many bytes can be written in the folder of `path`, which is made. Raises OSError; leaves no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with opened_temporary(temporary) as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
        _remove_leftovers(temporary)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def temporary_beside(path: Path) -> Path:
    """A temporary name in the folder of `path`, by which leftovers are known later."""
    return path.with_name(f".profusion-{uuid.uuid4().hex[:12]}.tmp")


@contextlib.contextmanager
def opened_temporary(path: Path) -> Iterator[BinaryIO]:
    """A new file to write to, locked as long as this process has it open."""
    with path.open("xb") as file:
        if fcntl is not None:
            _locked(file)  # in a folder without locks, the age of the file must do
        yield file


def _claim(path: Path, temporary: Path) -> None:
    """Give a finished temporary this name, if no file has it. Raises NameTaken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise NameTaken(f"'{path}' is there already") from None
    except OSError as problem:
        if problem.errno not in _NO_LINKS:
            raise
    else:
        temporary.unlink()
        return
    # A folder without links, such as exFAT or some network folders: an empty file reserves the name for an instant.
    try:
        path.open("xb").close()
    except FileExistsError:
        raise NameTaken(f"'{path}' is there already") from None
    try:
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _remove_leftovers(own: Path) -> None:
    """Remove the temporaries beside `own`, just written, that a killed process left.

    Safe beside live ones: they were written to lately, by the clock of the folder, which `own` tells, or are locked.
    """
    with contextlib.suppress(OSError):
        now = own.stat().st_mtime
        for path in own.parent.iterdir():
            if path != own and _TEMPORARY.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    if now - path.stat().st_mtime > LEFT_BEHIND and not _is_held(path):
                        path.unlink()


def hold(path: Path) -> Callable[[], None] | None:
    """Keep every other process from holding this file, until what is returned is called or this process ends.

    None where another one holds it, or it cannot be opened. Where the system has no locks, as Windows and some network
    folders, everybody gets it.
    """
    if fcntl is None:
        return lambda: None
    try:
        file = path.open("r+b")  # for writing: network folders lock no other
    except OSError:
        return None
    if _locked(file):
        return file.close
    file.close()
    return None


def _is_held(path: Path) -> bool:
    """Whether a live process has this temporary open, as far as the system can tell."""
    release = hold(path)
    if release is not None:
        release()
    return release is None


def _locked(file: BinaryIO) -> bool:
    """Lock a file, which must be open for writing. False where another process has; True also where there are no
    locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        return problem.errno in _NO_LOCKS
    return True


def why_not_written(problem: Exception) -> str:
    """Why a file could not be written, and what to do."""
    if problems.disk_is_full(problem):
        return "the disk is full. Make room and save again; what was there before is untouched."
    return f"{problems.why(problem)}. Check the name, the folder and its permissions."


def why_not_read(problem: Exception) -> str:
    """Why a file could not be read, and what to do."""
    return f"{problems.why(problem)}. Check the name, the folder and its permissions."


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file of any size, in hexadecimal digits. Raises OSError."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            sha.update(piece)
    return sha.hexdigest()


def tensors_to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with a checksum, the same bytes for the same contents."""
    return b"".join(tensor_pieces(tensors, metadata))


def tensor_pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], unchecked: Mapping[str, str] | None = None
) -> Iterator[bytes]:
    """The same file in pieces, the header and then tensor by tensor, for networks that should not be in memory twice.

    unchecked: more metadata, which the checksum does not cover. Written by hand because the library puts the metadata
    in a random order. Tensors come widest type first, as the library has it, which with the padded header keeps every
    tensor aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    checksum = _checksum(((name, *_content(tensors[name])) for name in sorted(tensors)), metadata)
    header: dict[str, object] = {"__metadata__": {**(unchecked or {}), **metadata, CHECKSUM: checksum}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        dtype, shape = _DTYPE_NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield _content(tensors[name])[2]


def parse(data: bytes) -> tuple[Contents, dict[str, str]]:
    """Take a safetensors file apart into its tensors, as bytes, and its metadata; every offset and size is checked.

    Raises FileFormatError, which says what the bytes are instead where that can be told.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER_BYTES:
        raise FileFormatError(what_it_is(data))
    if len(data) < 8 + length:
        raise FileFormatError(
            f"it is cut short, or its first bytes are damaged: the header takes {length} bytes, "
            f"the whole file has {len(data)}"
        )
    try:
        entries = safetensors.deserialize(data)
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_without_duplicates)
    except safetensors.SafetensorError as problem:
        raise _not_safetensors(problem) from problem
    except (ValueError, RecursionError) as problem:
        raise FileFormatError(f"it has an invalid header ({problems.why(problem)})") from problem
    contents = {name: (entry["dtype"], entry["shape"], entry["data"]) for name, entry in entries}
    return contents, header.get("__metadata__") or {}


def check_integrity(contents: Contents, metadata: Mapping[str, str], checked: Collection[str]) -> None:
    """Compare the checksum of a parsed file with its contents. Raises FileFormatError where they differ.

    checked: the names of the metadata entries it covers. Others, which some tool may have added since, are left out.
    """
    _compare(metadata, checked, ((name, *content) for name, content in sorted(contents.items())))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a large safetensors file, which stay on the disk until they are used, and its metadata.

    Raises FileFormatError, which says what the file is instead where that can be told, and OSError.
    """
    with path.open("rb") as file:
        beginning = file.read(64)
    if len(beginning) < 8 or int.from_bytes(beginning[:8], "little") > MAX_HEADER_BYTES:
        raise FileFormatError(what_it_is(beginning))
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as problem:
        raise _not_safetensors(problem) from problem


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file does, whatever its name. Raises OSError."""
    with path.open("rb") as file:
        beginning = file.read(9)
    return beginning[8:] == b"{" and int.from_bytes(beginning[:8], "little") <= MAX_HEADER_BYTES


def _not_safetensors(problem: safetensors.SafetensorError) -> FileFormatError:
    return FileFormatError(f"it is cut short, damaged, or not a safetensors file at all ({problems.why(problem)})")


def check_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    checked: Collection[str],
    poll: Callable[[], None] = lambda: None,
) -> None:
    """`check_integrity` for what `read_tensors` returned. poll: called before each tensor; it stops by raising."""
    strange = [name for name, tensor in tensors.items() if tensor.dtype not in _DTYPE_NAMES]
    if strange:
        raise FileFormatError(
            f"it holds a tensor of a kind unknown here: '{strange[0]:.80}', {tensors[strange[0]].dtype}"
        )

    def contents() -> Iterator[tuple]:
        for name in sorted(tensors):
            poll()
            yield name, *_content(tensors[name])

    _compare(metadata, checked, contents())


def _compare(metadata: Mapping[str, str], checked: Collection[str], contents: Iterable[tuple]) -> None:
    covered = {key: metadata[key] for key in checked if key in metadata}
    if metadata.get(CHECKSUM) != _checksum(contents, covered):
        raise FileFormatError("it is damaged: its contents do not match its checksum")


def to_tensors(contents: Contents) -> dict[str, Tensor]:
    """The tensors of a parsed file, each with memory of its own.

    Raises FileFormatError for one that is empty or of a type that is not in DTYPES.
    """
    tensors = {}
    for name, (dtype, shape, raw) in contents.items():
        if dtype not in DTYPES or 0 in shape or len(shape) > MAX_DIMENSIONS:
            raise FileFormatError(f"it holds a tensor of a kind unknown here: '{name:.80}', {dtype}, {shape!s:.80}")
        tensors[name] = torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape)
    return tensors


def what_it_is(data: bytes) -> str:
    """What a file that does not begin with a believable header length most likely is."""
    if not data:
        return "it is empty"
    if data.startswith(b"PK\x03\x04"):
        return "it is a zip archive, perhaps a PyTorch .pt file under another name, and not a safetensors file"
    if data[:1] == b"\x80" and data[1:2] in b"\x02\x03\x04\x05":
        return "it is a PyTorch checkpoint under another name, which could run code and is never opened"
    if data.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer and not the file itself, which was not downloaded"
    text = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<?xml", b"{", b"[")):
        return "it is a text, most likely an error message of a server that was saved in place of the file"
    if text.startswith((b"<!doctype", b"<html")):
        return "it is a web page: the download got an error page in place of the file"
    return "it is not a safetensors file, or its first bytes are damaged"


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _checksum(contents: Iterable[tuple[str, str, list[int], bytes]], metadata: Mapping[str, str]) -> str:
    """16 hexadecimal digits of SHA-256 over the metadata and the tensors: (name, type, shape, bytes), by name."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, dtype, shape, raw in contents:
        digest.update(json.dumps([name, dtype, shape, len(raw)]).encode())
        digest.update(raw)
    return digest.hexdigest()[:16]


def _content(tensor: Tensor) -> tuple[str, list[int], bytes]:
    """A tensor as `parse` returns it. safetensors is little-endian, as is every platform that torch runs on."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return _DTYPE_NAMES[tensor.dtype], list(tensor.shape), raw
