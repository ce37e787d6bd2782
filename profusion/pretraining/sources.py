"""Where the pictures of a pre-training are, and how the bytes of each are had."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..decoding import OTHER_SUFFIXES, RAW_SUFFIXES, SUFFIXES, PictureError
from ..problems import why
from .squares import MOST_BYTES

_SAMPLES = 1000  # files of a folder whose sizes are in its fingerprint


class Names(Sequence[str]):
    """Texts as one array of bytes, for millions of them: no object each, and processes share the memory."""

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        """text: uint8, all of them after another. ends: int64 (N,), where each ends."""
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        coded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(one) for one in coded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(coded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.text[start : self.ends[index]].tobytes())


class Source(ABC):
    """Pictures in a fixed order, each to be had at any time: `len`, `key` and `read`.

    left_out: what looked like pictures and is not among them, counted by reason. parts: how many pictures each shard
    has, for a shuffle that is kind to disks.
    """

    where: str
    left_out: Counter[str]
    parts: Sequence[int] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, entry: int) -> str:
        """The name of a picture, of which each has its own."""

    @abstractmethod
    def read(self, entry: int) -> bytes:
        """The bytes of a picture. Raises PictureError where they cannot be had."""

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that other pictures, or these in another order, do not have."""

    def note(self) -> str:
        """What was left out, as sentences after another one."""
        counted = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
        return f" {self.left_out.total()} left out ({counted})." if self.left_out else ""


class Folder(Source):
    """The pictures of a folder and of those in it, by their suffixes and in the order of their names' bytes.

    Hidden files and folders are left out. Links are followed, each folder once. Raises PictureError where there are
    none. The fingerprint is of all names, and of the sizes of a thousand files.
    """

    def __init__(self, folder: Path):
        self.where, self._folder, self.left_out = str(folder), folder, Counter()
        found, shards = [], 0
        for name in _files_under(folder):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES:
                found.append(name)
            elif suffix in OTHER_SUFFIXES + RAW_SUFFIXES:
                self.left_out[f"{suffix} is not read"] += 1
            shards += suffix == ".tar"
        if not found:
            there = f"{folder} holds no picture: no file in it, or in the folders in it, ends in {', '.join(SUFFIXES)}"
            raise PictureError(f"{there}. Its {shards} tar shards are given as {folder}/*.tar" if shards else there)
        self._names = Names.of(sorted(found, key=os.fsencode))

    def __len__(self) -> int:
        return len(self._names)

    def key(self, entry: int) -> str:
        return self._names[entry]

    def read(self, entry: int) -> bytes:
        name = self._names[entry]
        try:
            with (self._folder / name).open("rb") as file:
                data = file.read(MOST_BYTES + 1)
        except OSError as problem:
            raise PictureError(f"{name} cannot be opened: {why(problem)}") from problem
        if len(data) > MOST_BYTES:
            raise PictureError(f"{name} is too large: more than {MOST_BYTES >> 20} MiB")
        return data

    def fingerprint(self) -> str:
        found = hashlib.sha256(np.ascontiguousarray(self._names.ends))
        found.update(np.ascontiguousarray(self._names.text))
        for entry in np.linspace(0, len(self) - 1, min(len(self), _SAMPLES)).round().astype(int).tolist():
            try:
                size = (self._folder / self._names[entry]).stat().st_size
            except OSError:
                size = -1
            found.update(f"{size},".encode())
        return found.hexdigest()[:16]


def _files_under(folder: Path) -> Iterable[str]:
    """Paths from the folder on, with "/" between names, in no order."""
    seen, waiting = set(), [""]
    while waiting:
        inner = waiting.pop()
        try:
            here = os.stat(folder / inner)
            listed = os.scandir(folder / inner)
        except OSError as problem:
            raise PictureError(f"{folder / inner} cannot be listed: {why(problem)}") from problem
        if (here.st_dev, here.st_ino) in seen and here.st_ino:
            continue
        seen.add((here.st_dev, here.st_ino))
        with listed:
            for one in listed:
                if one.name.startswith("."):
                    continue
                is_folder, is_file = _kind(one)
                if is_folder:
                    waiting.append(f"{inner}{one.name}/")
                elif is_file:
                    yield inner + one.name


def _kind(one: os.DirEntry) -> tuple[bool, bool]:
    """Whether it is a folder, and whether it is a file; neither where a link leads nowhere."""
    try:
        return one.is_dir(), one.is_file()
    except OSError:
        return False, False
