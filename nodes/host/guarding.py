"""What every node has around it: its inputs are what they should be, and its errors can be shown and logged.

A message goes to the host's log, over a socket and into a page. One that cannot be encoded ends the host's worker
thread, and with it every later prompt; so no node lets one out.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io

from ...profusion.problems import OUT_OF_MEMORY, Explained, hidden_character, known, printable, shortage_in

MOST_LETTERS = 100_000  # of a text
_PARTS = ("CLIP", "VAE", "CLIP_VISION")  # a checkpoint may lack these: the nodes say so themselves
_MADE_OF = {"LATENT": dict, "CONDITIONING": (list, tuple)}  # others are objects of the host's, or of this pack's
_PLAIN = str | int | float | bool


class InputError(ValueError):
    """An input that no node can use, or a failure put into words. The message names it and says what to do."""


def guarded(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, whose `execute` checks its inputs first and lets no exception out whose text cannot be shown."""
    run = node.execute.__func__
    signature = inspect.signature(run)
    rest = next((name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD), None)

    @functools.wraps(run)
    def execute(cls, *values, **named):
        try:
            given = signature.bind(cls, *values, **named).arguments
            check_inputs(node.define_schema().inputs, {**given, **given.get(rest, {})})
            return run(cls, *values, **named)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as problem:
            said = told(problem)
            if said is None:
                raise
            raise said.with_traceback(problem.__traceback__) from loggable(problem)

    node.execute = classmethod(execute)
    return node


def told(problem: Exception) -> Exception | None:
    """The same failure in words that can be shown; None where it can be shown as it is.

    Where a device's memory ran out, it is of the host's own kind, so that the host unloads its models, as it does for
    its own nodes.
    """
    words, shortage = None if isinstance(problem, InputError) else known(problem), shortage_in(problem)
    if words is None and shortage is not None and not isinstance(problem, Explained):
        words = OUT_OF_MEMORY
    said = printable(str(problem)) if words is None else f"{words[0].upper()}{words[1:]}."
    if shortage is not None:
        # Newer hosts, asked about it, also clear what CUDA still has to say of it.
        getattr(comfy.model_management, "is_oom", bool)(shortage)
        return torch.cuda.OutOfMemoryError(said)
    return None if words is None and loggable(problem) is problem else InputError(said)


def loggable(problem: BaseException | None, within: frozenset[int] = frozenset()) -> BaseException | None:
    """An exception with what caused it, as a log prints them; stand-ins of the same words for those with a text that no
    log takes."""
    if problem is None or id(problem) in within:
        return None
    cause = problem.__cause__ or (None if problem.__suppress_context__ else problem.__context__)
    shown, text = loggable(cause, within | {id(problem)}), str(problem)
    if shown is cause and printable(text) == text:
        return problem
    stand_in = InputError(printable(f"{type(problem).__name__}: {text}")).with_traceback(problem.__traceback__)
    stand_in.__cause__ = shown
    return stand_in


def check_inputs(inputs: list, values: Mapping[str, Any]) -> None:
    """Raise InputError, which names it, for an input that is nothing of its kind. They may come from anywhere: a
    workflow's file, another node, or a program that talks to the server."""
    for one in inputs:
        if one.id not in values or (one.optional and values[one.id] is None):
            continue
        value, kind = values[one.id], one.get_io_type()
        if kind in ("STRING", "COMBO"):
            _check_text(one.id, value)
        elif kind in ("INT", "FLOAT", "BOOLEAN"):
            if not isinstance(value, numbers.Real) or value != value or abs(value) == math.inf:
                raise InputError(f"{one.id} is {value!r:.80}: give a number")
        elif kind in ("IMAGE", "MASK") and isinstance(value, list):  # see `sets`
            bad = [item for item in value if not hasattr(item, "shape")]
            if bad:
                raise InputError(f"{one.id} has {bad[0]!r:.80} in it: connect a node that gives {kind}")
        elif not _may_be(kind, value):
            raise InputError(f"{one.id} is {value!r:.80}: connect a node that gives {kind}")
        elif kind == "CONDITIONING" and isinstance(value, (list, tuple)) and not all(map(_is_prompt, value)):
            raise InputError(f"{one.id} has no prompt in it: connect a node that gives {kind}")
        elif kind == "LATENT" and not hasattr(value.get("samples") if isinstance(value, dict) else None, "shape"):
            raise InputError(f"{one.id} has no latents in it: connect a node that gives {kind}")


def _may_be(kind: str, value: Any) -> bool:
    """Whether a value may be what another node gives as this kind."""
    if value is None:
        return kind in _PARTS
    if isinstance(value, (dict, list, tuple)):
        return isinstance(value, _MADE_OF.get(kind, ()))
    return not isinstance(value, _PLAIN)


def _is_prompt(entry: Any) -> bool:
    """Whether this is an entry of a CONDITIONING: a context and what belongs to it."""
    two = isinstance(entry, (list, tuple)) and len(entry) == 2
    return two and hasattr(entry[0], "shape") and isinstance(entry[1], dict)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} is {value!r:.80}: give a text")
    hidden = hidden_character(value)
    if hidden is not None:
        raise InputError(f"{name} has the character {hidden} in it, which is no text: remove it")
    if len(value) > MOST_LETTERS:
        raise InputError(f"{name} has {len(value):,} characters: give at most {MOST_LETTERS:,}")
