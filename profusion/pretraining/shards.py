"""Tar shards on this machine: each is looked through once, and its pictures are read wherever they lie.

WebDataset's conventions: a picture's member is called KEY.SUFFIX, where KEY has no dot; other members are left out.
What is before a cut is used. Where each picture lies is kept beside the shard, in NAME.tar.profusion-index, or in a
folder that is given for that, and believed as long as the shard has the size and the time that it had.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from .. import files
from ..decoding import OTHER_SUFFIXES, RAW_SUFFIXES, SUFFIXES, PictureError
from ..problems import printable, why
from .sources import Names, Source
from .squares import MOST_BYTES

INDEX_SUFFIX = ".profusion-index"
_FORMAT, _CHECKED = "profusion.shard", ("format", "shard", "left_out", "damage")
_SHOWN = 8  # shards by name, in a message
Say = Callable[[str], None]


class ShardError(PictureError):
    """A shard that is none, or ends too early. The message completes the sentence "it ..."."""


class Member(NamedTuple):
    """A file in a tar: its name, where its bytes begin and how many they are, and how they are read from a stream."""

    name: str
    offset: int
    size: int
    read: Callable[[], bytes]


class _Header(tarfile.TarInfo):
    """A member's header that tells the archive how its last one ended: the library is silent about damage."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as problem:
            archive.ended = problem
            raise


def members(file: BinaryIO, streamed: bool = False) -> Iterator[Member]:
    """The files in a tar, in their order; streamed: one that can only be read on, and may be compressed.

    Raises ShardError where the archive is none, is damaged or ends before its end mark, after what was before that.
    """
    try:
        with tarfile.open(fileobj=file, mode="r|*" if streamed else "r:", tarinfo=_Header) as archive:
            archive.ended = None
            while (member := archive.next()) is not None:
                archive.members.clear()  # or each stays in memory
                if member.isreg() and not member.issparse():
                    taken = archive.extractfile(member)
                    yield Member(member.name, member.offset_data, member.size, taken.read)
            ended = archive.ended
    except ShardError:
        raise
    except Exception as problem:  # whatever a damaged archive makes of the library
        raise ShardError(f"is no tar, or damaged or cut short ({why(problem)})") from problem
    if not isinstance(ended, tarfile.EOFHeaderError):
        raise ShardError("is damaged or cut short: it has no end mark") from ended


def is_picture(name: str, left_out: Counter[str]) -> bool:
    """Whether a member is a picture by its name; what seems to be one otherwise is counted."""
    base = name.rpartition("/")[2]
    key, _, rest = base.partition(".")
    if not key:
        return False
    if f".{rest.lower()}" in SUFFIXES:
        return True
    last = os.path.splitext(base)[1].lower()
    if last in OTHER_SUFFIXES + RAW_SUFFIXES:
        left_out[f"{last} is not read"] += 1
    elif last in SUFFIXES:
        left_out[f"named KEY.PART{last}, which is not the picture KEY"] += 1
    return False


@dataclass(frozen=True)
class Index:
    """The pictures in one shard: names, and int64 (N,) where each begins and how many bytes it has. damage: what is
    wrong with the shard, if anything is."""

    names: Names
    offsets: np.ndarray
    sizes: np.ndarray
    left_out: Counter[str] = field(default_factory=Counter)
    damage: str = ""


def index_of(path: Path) -> Index:
    """Look through a shard. Raises OSError where it cannot be read."""
    found: list[Member] = []
    left_out: Counter[str] = Counter()
    damage = ""
    length = path.stat().st_size
    with path.open("rb") as file:
        try:
            for member in members(file):
                if is_picture(member.name, left_out):
                    found.append(member._replace(read=bytes))
        except ShardError as problem:
            damage = str(problem)
    whole = [one for one in found if one.offset + one.size <= length]
    left_out["cut off at the end of its shard"] += len(found) - len(whole)
    numbers = np.array([(one.offset, one.size) for one in whole], dtype=np.int64).reshape(-1, 2)
    return Index(Names.of(one.name for one in whole), numbers[:, 0], numbers[:, 1], +left_out, damage)


def kept_index(path: Path, folder: Path | None) -> Index:
    """The index of a shard from its file, which is written where it is missing or of another shard.

    folder: for the files of all shards; default: beside each. Where that cannot be written, nothing is kept.
    Raises OSError where the shard cannot be read.
    """
    status = path.stat()
    about = json.dumps([status.st_size, status.st_mtime_ns])
    kept = path.with_name(path.name + INDEX_SUFFIX)
    if folder is not None:
        place = hashlib.sha256(os.fsencode(os.path.abspath(path.parent))).hexdigest()[:8]
        kept = folder / f"{place}-{path.name}{INDEX_SUFFIX}"
    found = _read_index(kept, about)
    if found is None:
        found = index_of(path)
        if len(found.names):
            with contextlib.suppress(OSError):  # a folder that is only to be read: it is looked through each time
                _write_index(kept, about, found)
    return found


def _write_index(path: Path, about: str, index: Index) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"text": index.names.text, "ends": index.names.ends, "offsets": index.offsets, "sizes": index.sizes}
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    metadata = {"format": _FORMAT, "shard": about, "left_out": json.dumps(index.left_out), "damage": index.damage}
    files.write_atomically(path, files.tensor_pieces(tensors, metadata))


def _read_index(path: Path, about: str) -> Index | None:
    """The index in a file, if it is whole and of this shard."""
    if not path.is_file():
        return None
    try:
        tensors, metadata = files.read_tensors(path)
        if (metadata.get("format"), metadata.get("shard")) != (_FORMAT, about):
            return None
        files.check_tensors(tensors, metadata, _CHECKED)
        text, ends, offsets, sizes = (tensors[name].numpy().copy() for name in ("text", "ends", "offsets", "sizes"))
        return Index(Names(text, ends), offsets, sizes, Counter(json.loads(metadata["left_out"])), metadata["damage"])
    except (files.FileFormatError, OSError, KeyError, ValueError):
        return None


class Shards(Source):
    """The pictures in tar shards on this machine, shard by shard in the order given, and in each by their place.

    index: a folder for what is known of the shards; default: beside each. damaged: what is wrong with which. say: told
    how far it is. Raises PictureError for shards that are not there, and where no picture is in any.
    """

    def __init__(self, paths: Sequence[Path], where: str, index: Path | None = None, say: Say = lambda _: None):
        check_there(paths)
        self.where, self._paths, self.left_out = where, list(paths), Counter()
        self._called = called(paths)
        found = []
        for number, path in enumerate(paths):
            try:
                found.append(kept_index(path, index))
            except OSError as problem:
                raise PictureError(f"the shard {path} cannot be read: {why(problem)}") from problem
            self.left_out.update(found[-1].left_out)
            if (number + 1) % 100 == 0:
                say(f"{number + 1} of {len(paths)} shards looked through")
        self.damaged = {name: one.damage for name, one in zip(self._called, found, strict=True) if one.damage}
        self.parts = [len(one.names) for one in found]
        self._ends = np.cumsum(self.parts, dtype=np.int64)
        if not self._ends[-1]:
            raise PictureError(f"{where} holds no picture.{self.note()}")
        lengths = np.cumsum([len(one.names.text) for one in found], dtype=np.int64)
        before = [0, *lengths[:-1].tolist()]
        ends = [one.names.ends + start for one, start in zip(found, before, strict=True)]
        self._names = Names(np.concatenate([one.names.text for one in found]), np.concatenate(ends))
        self._offsets = np.concatenate([one.offsets for one in found])
        self._sizes = np.concatenate([one.sizes for one in found])

    def __len__(self) -> int:
        return len(self._names)

    def key(self, entry: int) -> str:
        return f"{self._called[self._shard(entry)]}/{self._names[entry]}"

    def read(self, entry: int) -> bytes:
        path, size = self._paths[self._shard(entry)], int(self._sizes[entry])
        if size > MOST_BYTES:
            raise PictureError(f"{self.key(entry)} is too large: more than {MOST_BYTES >> 20} MiB")
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(int(self._offsets[entry]))
                data = file.read(size)
                while 0 < len(data) < size and (more := file.read(size - len(data))):
                    data += more
        except OSError as problem:
            raise PictureError(f"{self.key(entry)} cannot be opened: {why(problem)}") from problem
        if len(data) < size:
            raise PictureError(f"{self.key(entry)} cannot be opened: its shard has become shorter")
        return data

    def fingerprint(self) -> str:
        found = hashlib.sha256(json.dumps([self._called, self.parts]).encode("utf-8", "surrogateescape"))
        for array in (self._names.ends, self._names.text, self._offsets, self._sizes):
            found.update(np.ascontiguousarray(array))
        return found.hexdigest()[:16]

    def note(self) -> str:
        return super().note() + damage_note(self.damaged)

    def _shard(self, entry: int) -> int:
        return int(np.searchsorted(self._ends, entry, side="right"))


def damage_note(damaged: dict[str, str]) -> str:
    """Which shards are damaged, as a sentence after another one."""
    if not damaged:
        return ""
    named = [f"{printable(name)} {damage}" for name, damage in list(damaged.items())[:_SHOWN]]
    more = f"; and {len(damaged) - _SHOWN} more" * (len(damaged) > _SHOWN)
    return f" Damaged shards, of which the rest is not seen: {'; '.join(named)}{more}."


def called(paths: Sequence[Path]) -> list[str]:
    """What shards are called: their paths, without the folder that all are in."""
    absolute = [os.path.abspath(path) for path in paths]
    common = os.path.dirname(absolute[0]) if len(absolute) == 1 else os.path.commonpath(absolute)
    return [os.path.relpath(path, common).replace(os.sep, "/") for path in absolute]


def check_there(paths: Sequence[Path]) -> None:
    """Raise PictureError, which names them, for shards that are missing, or given twice."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" * (len(missing) > _SHOWN)
        raise PictureError(f"not there: {', '.join(missing[:_SHOWN])}{more}. Give a folder of pictures, or tar shards")
    twice = [str(path) for path, count in Counter(map(os.path.abspath, paths)).items() if count > 1]
    if twice:
        raise PictureError(f"shards are given twice: {', '.join(twice[:_SHOWN])}. Give each once")
