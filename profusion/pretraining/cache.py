"""What pictures are encoded to, kept on the disk: latents and CLIP image tokens, each picture's once.

A folder has `about.json`, which says of what and how large it is, `latents.bin` and `tokens.bin` with a row for each
picture, and `done.bin` with a byte for each. A row is written, both files are flushed to the disk, and only then its
byte says that it is there: whoever is killed at whatever moment, or loses power, leaves no row that claims to be and is
not. Several processes of one machine may write at once, and read what others wrote.

Rows are read through memory maps, and written as files are, since a map cannot say that the disk is full.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..problems import Explained, disk_is_full, why
from .stream import Batch, PictureStream

UNKNOWN, DONE, UNREADABLE = 0, 1, 2  # what a picture's byte says
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FORMAT = "profusion.features"
_STORED = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}  # numpy has no bfloat16
_ABOUT, _BYTES = "about.json", "done.bin"
_FLUSH_ROWS, _FLUSH_SECONDS = 256, 10.0  # written before they are flushed, which waits for the disk
_ADVICE = "Give another folder, or remove this one"
_AT_ONCE = 1 << 20  # bytes that are counted

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""`encode(pictures) -> (latents, image tokens)`: (B, size, size, 3) uint8 -> (B, C, h, w) and (B, L, width)."""


class CacheError(Explained, RuntimeError):
    """A cache that cannot be used or written. The message says why and what to do."""


@dataclass(frozen=True)
class Sizes:
    """What is kept of how many pictures: latents (C, h, w) and image tokens (L, width) of each, in one precision."""

    count: int
    latents: tuple[int, int, int]
    tokens: tuple[int, int]
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.dtype not in _STORED:
            raise CacheError(f"a cache keeps {', '.join(DTYPES)}, and not {str(self.dtype).removeprefix('torch.')}")
        if min(self.count, *self.latents, *self.tokens) < 1:
            raise ValueError(f"nothing to keep: {self}")

    def row_bytes(self) -> tuple[int, int]:
        """Of one picture's latents and of its tokens."""
        return math.prod(self.latents) * self.dtype.itemsize, math.prod(self.tokens) * self.dtype.itemsize


def size_on_disk(sizes: Sizes) -> int:
    """Bytes that a cache takes once every picture is in it."""
    return sizes.count * (sum(sizes.row_bytes()) + 1)


class States:
    """`states[entry]`: what is known of a picture by now, in any process."""

    def __init__(self, path: Path, count: int):
        self._path, self._count = path, count
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r", shape=(count,))

    def __reduce__(self) -> tuple:
        return States, (self._path, self._count)

    def __getitem__(self, entry: int) -> int:
        return int(self._bytes[entry])

    def of(self, entries: np.ndarray) -> np.ndarray:
        """Of some of them, as they are now."""
        return np.array(self._bytes[entries])

    def count_of(self, state: int) -> int:
        """How many are in this state."""
        parts = range(0, self._count, _AT_ONCE)
        return sum(int((self._bytes[at : at + _AT_ONCE] == state).sum()) for at in parts)


class FeatureCache:
    """The features of the pictures of a source, in a folder, which is made where it is not there.

    about: what they depend on, such as the fingerprints of source and encoders and the pictures' size, by name. Raises
    CacheError where the folder has those of something else, which is named, or the disk has too little room.
    """

    def __init__(self, folder: Path, sizes: Sizes, about: Mapping[str, str]):
        self.folder, self.sizes = folder, sizes
        try:
            self._begin(dict(about))
            self._files = [open(path, "r+b", buffering=0) for path in (*self._paths(), folder / _BYTES)]  # noqa: SIM115
            kind = _STORED[sizes.dtype]
            shapes = (sizes.count, *sizes.latents), (sizes.count, *sizes.tokens)
            self._maps = [
                np.memmap(path, kind, "r", shape=shape) for path, shape in zip(self._paths(), shapes, strict=True)
            ]
            self.states = States(folder / _BYTES, sizes.count)
        except OSError as problem:
            raise CacheError(f"the cache {folder} cannot be used: {why(problem)}") from problem
        self._pending: list[np.ndarray] = []
        self._flushed = time.monotonic()

    def _paths(self) -> tuple[Path, Path]:
        return self.folder / "latents.bin", self.folder / "tokens.bin"

    def _begin(self, about: dict[str, str]) -> None:
        sizes = {**asdict(self.sizes), "dtype": str(self.sizes.dtype).removeprefix("torch.")}
        sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}
        wanted = {"format": _FORMAT, **sizes, **about}
        path = self.folder / _ABOUT
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_room()
            with contextlib.suppress(files.NameTaken):  # another process began it at the same moment
                files.write_atomically(path, json.dumps(wanted, indent=1).encode(), overwrite=False)
        self._check(path, wanted)
        lengths = dict(self._lengths())
        if _length(self.folder / _BYTES):  # made last, so that all are there
            damaged = [path.name for path, length in lengths.items() if _length(path) != length]
            if damaged:
                raise CacheError(f"the cache {self.folder} is damaged: {damaged[0]} has another size. {_ADVICE}")
        for path, length in lengths.items():
            _make(path, length)

    def _check_room(self) -> None:
        needed, free = size_on_disk(self.sizes), shutil.disk_usage(self.folder).free
        if needed > free:
            raise CacheError(
                f"the cache of {self.sizes.count:,} pictures takes {_written(needed)}, and there are {_written(free)} "
                f"where {self.folder} is: make room, choose another folder, or train without a cache"
            )

    def _check(self, path: Path, wanted: dict) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise CacheError(f"the cache {self.folder} is damaged: {why(problem)}. {_ADVICE}") from problem
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise CacheError(f"{self.folder} is no cache of features. {_ADVICE}")
        other = [name for name in wanted.keys() | found.keys() if found.get(name) != wanted.get(name)]
        if other:
            differ = "; ".join(f"{name} is {found.get(name)} there, {wanted.get(name)} here" for name in sorted(other))
            raise CacheError(f"the cache {self.folder} is of something else: {differ}. {_ADVICE}")

    def _lengths(self) -> Iterator[tuple[Path, int]]:
        yield from zip(self._paths(), (row * self.sizes.count for row in self.sizes.row_bytes()), strict=True)
        yield self.folder / _BYTES, self.sizes.count

    def rounded(self, features: Tensor) -> Tensor:
        """The same as they come back from the cache, in their own type: training is to see no other."""
        return features.to(self.sizes.dtype).to(features.dtype)

    def read(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) and image tokens (B, L, width) of these pictures (B,), in the cache's precision.

        Raises CacheError for one that is not in it.
        """
        numbers = entries.cpu().numpy()
        missing = numbers[self.states.of(numbers) != DONE]
        if len(missing):
            raise CacheError(f"picture {missing[0]} is not in the cache {self.folder}: fill it first")
        latents, tokens = (self._tensor(np.array(data[numbers])) for data in self._maps)
        return latents, tokens

    def _tensor(self, data: np.ndarray) -> Tensor:
        found = torch.from_numpy(data)
        return found.view(torch.bfloat16) if self.sizes.dtype == torch.bfloat16 else found

    def write(self, entries: Tensor, latents: Tensor, tokens: Tensor) -> None:
        """Keep features of these pictures (B,): latents (B, C, h, w) and image tokens (B, L, width). They count as
        there from the next `flush` on, which comes by itself before long. What is there already stays.

        Raises CacheError where the disk is full, or they are too large for the precision.
        """
        expected = (len(entries), *self.sizes.latents), (len(entries), *self.sizes.tokens)
        if (tuple(latents.shape), tuple(tokens.shape)) != expected:
            raise CacheError(
                f"latents {tuple(latents.shape)} and tokens {tuple(tokens.shape)} do not fit the cache's {expected}"
            )
        numbers = entries.cpu().numpy()
        new = np.flatnonzero(self.states.of(numbers) != DONE)
        rows = [self._rows(part.detach()[torch.from_numpy(new)]) for part in (latents.cpu(), tokens.cpu())]
        for at, number in enumerate(numbers[new].tolist()):
            for file, part, length in zip(self._files, rows, self.sizes.row_bytes(), strict=False):
                self._put(file, number * length, part[at].tobytes())
        self._pending.append(numbers[new])
        waiting = sum(map(len, self._pending))
        if waiting >= _FLUSH_ROWS or time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self.flush()

    def _rows(self, features: Tensor) -> np.ndarray:
        kept = features.to(self.sizes.dtype).contiguous()
        if not torch.isfinite(kept).all():
            raise CacheError(
                f"features of a picture are not finite in {str(self.sizes.dtype).removeprefix('torch.')}: keep them in "
                "bfloat16 or float32, or run the encoders in float32"
            )
        return (kept.view(torch.int16) if kept.dtype == torch.bfloat16 else kept).numpy()

    def flush(self) -> None:
        """Have everything on the disk, and say that it is there. Raises CacheError."""
        numbers, self._pending = self._pending, []
        self._flushed = time.monotonic()
        if not sum(map(len, numbers)):
            return
        try:
            for file in self._files[:2]:
                os.fsync(file.fileno())
        except OSError as problem:
            raise self._unwritten(problem) from problem
        self._say(np.concatenate(numbers), DONE)

    def mark_unreadable(self, entries: Sequence[int]) -> None:
        """Note that these pictures cannot be read, so that no later run tries."""
        self._say(np.array([one for one in entries if self.states[one] == UNKNOWN], dtype=np.int64), UNREADABLE)

    def _say(self, numbers: np.ndarray, state: int) -> None:
        for number in numbers.tolist():
            self._put(self._files[2], number, bytes([state]))

    def _put(self, file, place: int, data: bytes) -> None:
        try:
            file.seek(place)
            while data:
                data = data[file.write(data) :]
        except OSError as problem:
            raise self._unwritten(problem) from problem

    def _unwritten(self, problem: OSError) -> CacheError:
        """What is said after a failure; what was written before it counts."""
        with contextlib.suppress(CacheError):
            self.flush()
        done, count = self.states.count_of(DONE), self.sizes.count
        rest = (count - done) * sum(self.sizes.row_bytes())
        said = f"{done:,} of {count:,} pictures are in the cache {self.folder}, and stay there"
        if disk_is_full(problem):
            return CacheError(f"the disk is full: {said}. Make room for {_written(rest)} more, or train without it")
        return CacheError(f"the cache cannot be written ({why(problem)}): {said}. Check the disk, or train without it")

    def close(self) -> None:
        """Flush what waits for it, and let go of the files."""
        try:
            self.flush()
        finally:
            for file in self._files:
                file.close()


def features_of(batch: Batch, cache: FeatureCache, encode: Encode) -> tuple[Tensor, Tensor]:
    """Latents (B, C, h, w) and image tokens (B, L, width) of a batch that a stream gave with this cache, float32.

    What is not in the cache is encoded and written. Either is as the cache's precision rounds it.
    """
    fresh = ~batch.cached
    new = [cache.rounded(part.float().cpu()) for part in encode(batch.pictures)] if fresh.any() else None
    if new is not None:
        cache.write(batch.entries[fresh], *new)
    if fresh.all():
        return new[0], new[1]
    found = []
    for at, old in enumerate(cache.read(batch.entries[batch.cached])):
        both = torch.empty(len(fresh), *old.shape[1:])
        both[batch.cached] = old.float()
        if new is not None:
            both[fresh] = new[at]
        found.append(both)
    return found[0], found[1]


def fill(stream: PictureStream, cache: FeatureCache, encode: Encode) -> Iterator[int]:
    """Encode what is not in the cache yet, of the stream's share of one epoch: batch by batch, as an iterator of how
    many batches are behind. It may end at any moment, and goes on where it was.

    Raises CacheError, and what the stream raises.
    """
    steps = -(-len(stream.source) // stream.batch)
    for batch in islice(stream.batches(0, cache.states), steps):
        features_of(batch, cache, encode)
        yield batch.step + 1
    cache.mark_unreadable(stream.skipped.entries)
    cache.flush()


def _make(path: Path, length: int) -> None:
    """A file of so many bytes, of which none takes room yet; one of that length as it is."""
    with path.open("ab") as file:
        if file.tell() != length:
            file.truncate(length)


def _length(path: Path) -> int:
    """Of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _written(size: int) -> str:
    """Bytes for people."""
    for unit, bytes_of in (("TiB", 1 << 40), ("GiB", 1 << 30)):
        if size >= bytes_of:
            return f"{size / bytes_of:.1f} {unit}"
    return f"{size / (1 << 20):.1f} MiB"
