"""What one text says about many shards: braces, globs and commas, as WebDataset's users write them."""

from __future__ import annotations

import glob
import itertools
import os
import re
from pathlib import Path

from ..decoding import PictureError

PIPE = "pipe:"
MOST = 100_000  # shards of one pattern
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_ELSEWHERE = re.compile(r"(?!pipe:)([a-z][a-z0-9+.-]+)://?", re.IGNORECASE)


def shards(where: str) -> list[str]:
    """Every shard of a text, in its order: local paths, and commands that begin with "pipe:".

    Parts are separated by commas; "{0000..0099}" and "{a,b}" stand for each of theirs, "*", "?" and "[...]" for the
    files there are, by name. A file whose name the text is counts as that, whatever is in it. Within a command a comma
    separates where "pipe:" follows it, and the shell's own braces, such as ${HOME}, stay.
    Raises PictureError for what fits no file, and for addresses, which a command must read.
    """
    if Path(where).is_file():
        return [where]
    found: list[str] = []
    for part in _split(where):
        if not part.startswith(PIPE) and Path(part).is_file():
            found.append(part)
            continue
        for one in itertools.islice(_expanded(part), MOST + 1 - len(found)):
            found += [one] if one.startswith(PIPE) else _globbed(one)
    if len(found) > MOST:
        raise PictureError(f"{where:.200} names more than {MOST:,} shards: give fewer, larger ones")
    return found


def _split(where: str) -> list[str]:
    """The parts between commas outside braces."""
    parts, depth, start, command = [], 0, 0, where.startswith(PIPE)
    for at, letter in enumerate(where):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth <= 0 and (not command or where.startswith(PIPE, at + 1)):
            parts.append(where[start:at])
            start, command, depth = at + 1, where.startswith(PIPE, at + 1), 0
    return [part for part in (*parts, where[start:]) if part.strip(" ")]


def _expanded(text: str) -> itertools.chain[str] | list[str]:
    """Each text that the braces of a text stand for. Braces without ".." or "," in them stay."""
    for opened in (match.start() for match in re.finditer("{", text)):
        closed = _closing(text, opened)
        choices = _choices(text[opened + 1 : closed]) if closed and text[opened - 1 : opened] != "$" else None
        if choices:
            before, after = text[:opened], text[closed + 1 :]
            ends = list(_expanded(after)) if "{" in after else [after]
            middles = itertools.chain.from_iterable(_expanded(one) if "{" in one else [one] for one in choices)
            return itertools.chain.from_iterable((before + middle + end for end in ends) for middle in middles)
    return [text]


def _closing(text: str, opened: int) -> int | None:
    depth = 0
    for at in range(opened, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return at
    return None


def _choices(inside: str) -> list[str] | map | None:
    """What a pair of braces stands for: numbers as long as they are written, or the parts between its commas."""
    numbers = _RANGE.fullmatch(inside)
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        padded = any(len(text) > 1 and text.startswith("0") for text in numbers.groups())
        width = max(map(len, numbers.groups())) if padded else 0
        steps = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        return [f"{number:0{width}}" for number in itertools.islice(steps, MOST + 1)]
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append(inside[start:at])
            start = at + 1
    return [*parts, inside[start:]] if parts else None


def _globbed(part: str) -> list[str]:
    """The files of a pattern; a plain path as it is."""
    address = _ELSEWHERE.match(part)
    if address:
        raise PictureError(
            f"{part} is not on this machine: give a command that writes it out, such as 'pipe:curl -sfL {part}'"
        )
    part = os.path.expanduser(part)
    if not glob.has_magic(part) or Path(part).is_file():
        return [part]
    found = sorted(path for path in glob.glob(part, recursive=True) if os.path.isfile(path))
    if not found:
        raise PictureError(f"no file fits {part}: check the pattern, and that the folder is there")
    return found
