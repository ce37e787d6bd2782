"""Many pictures, from folders of the host's and from its batches and lists: each is read when its turn comes, encoded
once, and what cannot be read is counted and named."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

from ...profusion.decoding import RAW_SUFFIXES, PictureError
from ...profusion.loop import TrainingError
from ...profusion.pictures import picture_files, read_picture
from ...profusion.problems import hidden_character
from ...profusion.promptnet.training import PictureSet
from ...profusion.references import Shown, framed, gather

NONE = "none"  # in a list of folders: no folder
MOST_APART = 64  # pictures that are kept from training, to see whether it helps with new ones
BATCH = 8  # pictures that are encoded at a time
MOST_LISTED = 4  # names in a note
MOST_SHOWN = 3  # pictures that are kept as they are, to be drawn meanwhile

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Latents (B, C, h, w) as the model takes them, and image tokens (B, L, width), of pictures (B, H, W, 3)."""


class FolderError(ValueError):
    """A folder of pictures that is not there. The message says which are."""


@dataclass(frozen=True)
class Source:
    """A picture by its name, which is read when it is asked for. Raises PictureError then."""

    name: str
    read: Callable[[], Shown]


def folder_names() -> list[str]:
    """The folders in the host's input folder, those that are links among them; NONE first."""
    inside = Path(folder_paths.get_input_directory())
    names = set(folder_paths.get_input_subfolders())
    for parent in ("", *names):  # the host passes over links to folders, and sets of pictures are large
        try:
            entries = list(os.scandir(inside / parent))
        except OSError:
            continue
        names |= {f"{parent}/{one.name}".lstrip("/") for one in entries if one.is_symlink() and one.is_dir()}
    return [NONE, *sorted(name for name in names if not _unfit(name))]


def _unfit(name: str) -> bool:
    """Older frontends put a list's entries into their menu as HTML."""
    return hidden_character(name) is not None or any(mark in name for mark in "<>\n\r\t")


def find_folder(name: str) -> Path | None:
    """The path of a listed folder, None for NONE. Raises FolderError, which says what is there."""
    if name == NONE:
        return None
    parts = name.replace("\\", "/").split("/") if isinstance(name, str) else [""]
    if _unfit(str(name)) or not all(parts) or ".." in parts or ":" in parts[0]:
        raise FolderError(f"there can be no folder {name!r:.80}: choose one of the list")
    inside = Path(folder_paths.get_input_directory())
    path = inside.joinpath(*parts)
    if not path.is_dir():
        names = folder_names()[1:]
        found = f"{', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}" or "no folder"
        raise FolderError(
            f"there is no folder {name!r:.80} in {inside}. Found: {found}. Put a folder of pictures there, or a link "
            "to one, and refresh the node definitions (R)"
        )
    return path


def folder_fingerprint(name: str) -> str:
    """Changes when a file of the folder does."""
    try:
        path = find_folder(name)
        found = hashlib.sha256()
        for one in () if path is None else picture_files(path):
            state = one.stat()
            found.update(f"{one} {state.st_size} {state.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
        return found.hexdigest()
    except (OSError, ValueError):  # the node itself will say what is wrong
        return "missing"


def sources(folder: str, images: Tensor | Sequence[Tensor] | None) -> list[Source]:
    """The pictures of a folder and those that are connected. Raises PictureError where there are none."""
    path = find_folder(folder)
    found = [] if images is None else [Source(f"picture {n}", lambda one=one: one) for n, one in _numbered(images)]
    if path is not None:
        for file in picture_files(path):
            found.append(Source(str(file.relative_to(path)), lambda file=file: _read(file)))
    if not found:
        raise PictureError(
            "no pictures: choose a folder, or connect images" if path is None else f"no pictures in {path}"
        )
    return found


def _read(file: Path) -> Shown:
    if file.suffix.lower() in RAW_SUFFIXES:  # most have a small picture in them, which would be read in its place
        raise PictureError(f"{file} is a camera's raw file: save it as PNG or JPEG")
    return Shown(*read_picture(file))


def _numbered(images: Tensor | Sequence[Tensor]):
    return enumerate(gather(images), start=1)


@dataclass(frozen=True)
class EncodedSet:
    """What a training takes: the pictures to learn from, and those kept apart from it, if it has enough of them.

    shown: a few of the latter (default the former) as pictures (n, side, side, 3), the first n of their set. note: all
    of it in words.
    """

    pictures: PictureSet
    apart: PictureSet | None
    shown: Tensor
    note: str


def set_bytes(count: int, latent: Sequence[int], tokens: Sequence[int]) -> int:
    """Bytes that so many pictures take in main memory, from the shapes of one latent and of one picture's tokens."""
    return count * (4 * torch.Size(latent).numel() + 2 * torch.Size(tokens).numel())


def encoded(given: Sequence[Source], side: int, encode: Encode, tell: Callable[[int], None]) -> EncodedSet:
    """Encode pictures as squares of `side` pixels, some at a time, into main memory: latents in float32, tokens in
    float16, since they are many.

    tell: told how many more have been read; it may stop all by raising. Raises TrainingError where none can be read or
    encoded.
    """
    away = _spread(len(given))
    stores, shown, skipped = (_Store(len(given) - len(away)), _Store(len(away))), ([], []), []
    for first in range(0, len(given), BATCH):
        rows, squares = [], []
        for at in range(first, min(first + BATCH, len(given))):
            try:
                squares.append(framed([given[at].read()], side).pictures[0])
                rows.append(at)
            except PictureError as problem:
                skipped.append((given[at].name, str(problem)))
        if rows:
            latents, tokens = encode(torch.stack(squares))
            made = PictureSet(latents.detach().float().cpu(), tokens.detach().half().cpu())  # which are finite
            for at, square, latent, tokens in zip(rows, squares, made.latents, made.image_tokens, strict=True):
                stores[at in away].add(latent, tokens)
                if len(shown[at in away]) < MOST_SHOWN:
                    shown[at in away].append(square.cpu())
        tell(min(first + BATCH, len(given)) - first)
    sets, pairs = [store.pictures() for store in stores], list(shown)
    if sets[0] is None:  # all that can be read happens to be kept apart
        sets.reverse()
        pairs.reverse()
    if sets[0] is None:
        raise TrainingError(f"none of the {len(given)} pictures can be read. {_skipped(skipped)}")
    with torch.inference_mode(False):
        pictures = torch.stack(pairs[1] or pairs[0])
    return EncodedSet(*sets, pictures, _note(sets, side, skipped))


def _spread(count: int) -> set[int]:
    """Which of so many pictures are kept apart: a tenth, at most MOST_APART, in even distances."""
    apart = min(MOST_APART, count // 10)
    return {round((index + 0.5) * count / apart) for index in range(apart)}


class _Store:
    """Room for so many encoded pictures, taken at once: a list that is joined would take it twice."""

    def __init__(self, most: int):
        self._most, self._count = most, 0
        self._latents = self._tokens = torch.empty(0)

    def add(self, latent: Tensor, tokens: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if not self._count:
                self._latents = torch.empty(self._most, *latent.shape)
                self._tokens = torch.empty(self._most, *tokens.shape, dtype=torch.float16)
            self._latents[self._count].copy_(latent)
            self._tokens[self._count].copy_(tokens)
        self._count += 1

    def pictures(self) -> PictureSet | None:
        with torch.inference_mode(False):
            return PictureSet(self._latents[: self._count], self._tokens[: self._count]) if self._count else None


def _note(sets: Sequence[PictureSet | None], side: int, skipped: Sequence[tuple[str, str]]) -> str:
    kept = [one for one in sets if one is not None]
    size = sum(one.latents.nbytes + one.image_tokens.nbytes for one in kept)
    apart = "" if sets[1] is None else f", {len(sets[1])} of them kept apart"
    total = sum(map(len, kept))
    said = f"{total} picture{'s' * (total > 1)} of {side}x{side} pixels{apart}: {size / 1e6:,.0f} MB of main memory"
    return f"{said}\n{_skipped(skipped)}" if skipped else said


def _skipped(skipped: Sequence[tuple[str, str]]) -> str:
    more = f"\nand {len(skipped) - MOST_LISTED} more" * (len(skipped) > MOST_LISTED)
    each = "\n".join(f"{name}: {why}" for name, why in skipped[:MOST_LISTED])
    return f"{len(skipped)} left out, which cannot be read:\n{each}{more}"
