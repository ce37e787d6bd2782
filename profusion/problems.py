"""What stands between the outside and a person: which text is shown, which names files may have, and what each failure
is called.

One table says what an exception means, wherever it was raised: files, pictures, checkpoints, memory. Whoever reads
what others made catches `Exception` and words it by `why`: no list of types is complete, since libraries raise
whatever a damaged file makes of them.
"""

from __future__ import annotations

import errno
import re
import unicodedata
from collections.abc import Callable

import torch

MOST = 400  # characters of a message from elsewhere
OUT_OF_MEMORY = "memory ran out. Lower batch_size or the pictures' size, or close other programs"
_CUDA_OUT_OF_MEMORY = 2  # the driver's number of it

_HIDDEN = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of a surrogate pair, separators of lines
_TURNING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they make a name look like another one
_JOINER = "\u2060"  # has no width, and ends nothing

_DISK_FULL = "the disk is full"
_NOT_ALLOWED = "the folder is read-only, or not yours to use"
_ERRNO = {
    errno.ENOSPC: _DISK_FULL,
    errno.EFBIG: _DISK_FULL,
    errno.EDQUOT: _DISK_FULL,
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: _NOT_ALLOWED,
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "a link leads back to itself",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
}


class Explained(Exception):
    """A failure whose message is for the user: what is wrong and what to do. All of the kernel's errors are."""


def _says(*words: str) -> Callable[[BaseException], bool]:
    return lambda problem: any(word in str(problem) for word in words)


def _always(_: BaseException) -> bool:
    return True


_TABLE: tuple[tuple[type[BaseException], Callable[[BaseException], bool], str], ...] = (
    (MemoryError, _always, OUT_OF_MEMORY),
    (RuntimeError, _says("can't allocate memory", "not enough memory", "out of memory"), OUT_OF_MEMORY),
    (UnicodeError, _always, "it has a character that no file name and no log can hold"),
    (ValueError, _says("null byte", "null character"), "it has a null character in it"),
    (RecursionError, _always, "it is nested too deeply"),
)


def known(problem: BaseException) -> str | None:
    """What the table says of an exception; None where it says nothing, or the exception explains itself."""
    if isinstance(problem, Explained):
        return None
    return next((words for kind, fits, words in _TABLE if isinstance(problem, kind) and fits(problem)), None)


def why(problem: BaseException) -> str:
    """What went wrong, in one line that can be shown and logged anywhere."""
    words = known(problem)
    if words is None and isinstance(problem, OSError) and problem.errno is not None:
        words = _ERRNO.get(problem.errno) or problem.strerror
    if words is None:
        words = str(problem) if isinstance(problem, ValueError | OSError) else f"{type(problem).__name__}: {problem}"
    words = " ".join(printable(words).split()).removesuffix(".") or type(problem).__name__
    return words if len(words) <= MOST else words[:MOST] + "..."


def shortage_in(problem: BaseException | None) -> BaseException | None:
    """The failure by which a device ran out of memory: this one, or one that it was raised from; None where none is."""
    seen = set()
    while problem is not None and id(problem) not in seen:
        if _is_shortage(problem):
            return problem
        seen.add(id(problem))
        problem = problem.__cause__
    return None


def _is_shortage(problem: BaseException) -> bool:
    if isinstance(problem, torch.cuda.OutOfMemoryError):
        return True
    if not isinstance(problem, getattr(torch, "AcceleratorError", ())):  # newer torch's
        return False
    return getattr(problem, "error_code", None) == _CUDA_OUT_OF_MEMORY or "out of memory" in str(problem).lower()


def disk_is_full(problem: BaseException) -> bool:
    """Whether there was no room."""
    return isinstance(problem, OSError) and _ERRNO.get(problem.errno) == _DISK_FULL


def printable(text: str) -> str:
    """The text with an escape such as \\x00 for every character that is not shown; lines and tabs stay.

    Whatever comes back can be encoded, so that a log or a socket takes it.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if letter in "\n\t" or not _hidden(letter) else ascii(letter)[1:-1] for letter in text)


def hidden_character(text: str) -> str | None:
    """The first character of a text that `printable` would escape, escaped."""
    return next((ascii(letter)[1:-1] for letter in text if letter not in "\n\r\t" and _hidden(letter)), None)


def _hidden(letter: str) -> bool:
    return letter in _TURNING or unicodedata.category(letter) in _HIDDEN


def inert(text: str) -> str:
    """The text as it is, but nothing that takes it for HTML finds a tag, an entity or a link in it.

    A joiner of no width after each "<" and "&", and in addresses, which no parser reads over; frontends that escape
    their text, as newer ones do, show the same.
    """
    text = re.sub(r"[<&]", lambda found: found[0] + _JOINER, printable(text))
    return re.sub(r"(?i)(://|www\.)", lambda found: found[0][:-1] + _JOINER + found[0][-1], text)


# Names of files. What one system refuses is refused on all: files travel.

_FORBIDDEN = '<>:"|?*'
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(\.|$)")


def why_no_name(name: str) -> str | None:
    """Why a file or a folder may not have this name on every system; None where it may."""
    hidden = hidden_character(name) or next((ascii(mark)[1:-1] for mark in name if mark in "\n\r\t"), None)
    if hidden:
        return f"{hidden} is not allowed in a name"
    marks = sorted({mark for mark in name if mark in _FORBIDDEN})
    if marks:
        return f"{' '.join(marks)} {'is' if len(marks) == 1 else 'are'} not allowed in a name"
    if name != name.rstrip(" ."):
        return "a name may not end in a space or a dot"
    if _DEVICES.match(name):
        return f"'{name}' is a device on Windows"
    return None
