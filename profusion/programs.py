"""The program of an archive of torch's, which would rebuild what is in it: listed, not followed.

What it calls and which texts it has is told without running it, so that a file of strangers can be judged by them.
"""

from __future__ import annotations

import pickletools  # which lists what a file would do, and does none of it
import re
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MAX_BYTES = 2 << 20
"""Of a program, at most: some ten thousand tensors."""

PUT_TOGETHER = "a name that is put together"
_CALLS_OF_NUMBERS = ("EXT1", "EXT2", "EXT4")  # of things that the reader's own registry knows
_KEEPS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_FETCHES = ("GET", "BINGET", "LONG_BINGET")


class Step(NamedTuple):
    """One line of a program. name: what it calls, "module name". text, number: one that it has."""

    code: str
    name: str | None = None
    text: str | None = None
    number: int | None = None


def steps(program: bytes | BinaryIO) -> Iterator[Step]:
    """The lines of a program, to its end. Raises ValueError where it is cut short or is none."""
    pushed: deque[str | None] = deque(maxlen=2)  # the texts among the two last things, which STACK_GLOBAL joins
    kept: dict[int, str | None] = {}
    for code, argument, _ in pickletools.genops(program):
        text = name = None
        if code.name in ("GLOBAL", "INST"):
            name = argument
        elif code.name == "STACK_GLOBAL":
            name = " ".join(pushed) if len(pushed) == 2 and all(pushed) else PUT_TOGETHER
        elif code.name in _CALLS_OF_NUMBERS:
            name = f"{PUT_TOGETHER} ({code.name} {argument})"
        elif isinstance(argument, str):
            text = argument
        if code.name in _KEEPS:
            kept[len(kept) if argument is None else argument] = pushed[-1] if pushed else None
        elif code.stack_before or code.stack_after:  # a frame and the protocol's number leave all as it is
            pushed.append(kept.get(argument) if code.name in _FETCHES else None if code.name == "PERSID" else text)
        yield Step(code.name, name, text, argument if isinstance(argument, int) else None)


# What models hold besides tensors, as "module name": kinds of numbers and containers, and the notes of those libraries
# that write checkpoints. Functions that open files or follow names are in the same modules, so modules do not suffice.
_KINDS = (
    r"collections (OrderedDict|defaultdict|deque|Counter)",
    r"(builtins|__builtin__) (set|frozenset|dict|list|tuple|int|long|float|complex|bool|str|unicode|bytes|bytearray"
    r"|slice|range|xrange|object)",
    r"_codecs encode",
    r"copyreg _reconstructor|copy_reg _reconstructor",
    r"torch (\w*Storage|Size|Tensor|device|dtype|bool|[a-z]+\d\w*)",
    r"torch\.storage \w*Storage",
    r"torch\._(utils|tensor) _rebuild_\w+",
    r"torch\.serialization _get_layout",
    r"torch\.(nn|optim)[.\w]* [A-Z]\w*",
    r"numpy (ndarray|dtype|bool_?|[a-z]+\d+)",
    r"numpy\.dtypes \w+DType",
    r"numpy\._?core\.(multiarray (_reconstruct|scalar)|numeric _frombuffer)",
    r"numpy\.random\.\w+ (__\w+_ctor|__pyx_unpickle_\w+|[A-Z]\w*)",
    r"(pytorch_lightning|lightning|lightning_fabric)(\.(pytorch|fabric|callbacks|utilities|core|trainer|loops)[.\w]*)?"
    r" [A-Z]\w*",
    r"omegaconf[.\w]* [A-Z]\w*",
    r"typing (Any|Dict|List|Optional|Tuple|Union)",
    r"argparse Namespace",
    r"pathlib \w*Path",
)
_OF_MODELS = re.compile("|".join(_KINDS))


def of_models(name: str) -> bool:
    """Whether a call is one that checkpoints need: it makes a container, a number or a note, and does nothing."""
    return _OF_MODELS.fullmatch(name) is not None
