"""Nodes that take pictures take one set of them: a host's batch, or a list, of which it would call them once for each.

A host that is told so gives a node a list for every input. What belongs to the set reaches the node as that list.
Anything else is one value as a rule; where it is several, the node runs once for each, as the host would have run it,
with the whole set every time.
"""

from __future__ import annotations

import functools
from typing import Any

from comfy_api.latest import io

from .guarding import InputError

MOST_EMPTY = 20  # that a message lists


def taking_sets(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, taking lists for the inputs in its SETS, where it has such; any other node as it is.

    A list of texts becomes one text with a line for each, and none of them may be empty. Who calls `execute` itself
    gives values, as for any node.
    """
    sets = getattr(node, "SETS", ())
    if not sets:
        return node
    define, run = node.define_schema.__func__, node.execute.__func__

    @functools.wraps(define)
    def define_schema(cls):
        schema = define(cls)
        schema.is_input_list = True
        for output in schema.outputs:
            output.is_output_list = True
        return schema

    @functools.wraps(run)
    def execute(cls, *values, **named):
        if values or not all(isinstance(value, list) for value in named.values()):
            return run(cls, *values, **named)
        return _merged([run(cls, **given) for given in _runs(named, sets)])

    node.define_schema, node.execute = classmethod(define_schema), classmethod(execute)
    return node


def _runs(named: dict[str, list], sets: tuple[str, ...]) -> list[dict[str, Any]]:
    """The values of each run. What has fewer of them than others has its last one repeated, as in the host."""
    empty = next((name for name, value in named.items() if not value), None)
    if empty:
        raise InputError(f"{empty} is an empty list: the node before it made nothing")
    shared = {name: _joined(name, value) for name, value in named.items() if name in sets}
    single = {name: value for name, value in named.items() if name not in sets}
    count = max((len(value) for value in single.values()), default=1)
    return [
        {**shared, **{name: value[min(index, len(value) - 1)] for name, value in single.items()}}
        for index in range(count)
    ]


def _joined(name: str, value: list) -> Any:
    """A list as it is, unless it is one of texts."""
    if len(value) == 1 or not all(isinstance(item, str) for item in value):
        return value[0] if isinstance(value[0], str) else value
    lines = [" ".join(text.split()) for text in value]
    empty = [str(number) for number, line in enumerate(lines, start=1) if not line]
    if empty and any(lines):
        more = f" and {len(empty) - MOST_EMPTY} more" * (len(empty) > MOST_EMPTY)
        raise InputError(
            f"{name}: of the {len(lines)} texts in its list these are empty: {', '.join(empty[:MOST_EMPTY])}{more}. "
            "Give each picture its text; a loader of folders gives an empty one where a picture has no file of texts"
        )
    return "\n".join(lines)


def _merged(outputs: list[io.NodeOutput]) -> io.NodeOutput:
    """What the runs made, as one list for each output, and what they show one after the other."""
    results = [list(values) for values in zip(*(output.args for output in outputs), strict=True)]
    shown: dict[str, list] = {}
    for output in outputs:
        for kind, items in (output.ui or {}).items():
            shown[kind] = [*shown.get(kind, ()), *items]
    return io.NodeOutput(*results, ui=shown or None)
