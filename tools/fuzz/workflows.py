"""How workflows are damaged: as files of the frontend, and as prompts in the API's format.

(random numbers, the workflow, the node types there are) -> the mutated one; the one that came in stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from .mutations import HOSTILE, TEXTS, mutate

VALUES = (*HOSTILE, *TEXTS)


def _one(random: Any, things: Sequence) -> Any:
    return things[int(random.integers(len(things)))]


# Prompts: {number: {"class_type": ..., "inputs": {name: value or [number, slot]}}}


def edit_prompt(random: Any, prompt: dict, _: Sequence[str]) -> Any:
    return mutate(random, prompt)


def edit_values(random: Any, prompt: dict, _: Sequence[str]) -> dict:
    """One to three inputs of a node are another value."""
    prompt = copy.deepcopy(prompt)
    inputs = _one(random, [node["inputs"] for node in prompt.values() if node["inputs"]])
    for _ in range(int(random.integers(1, 4))):
        inputs[_one(random, list(inputs))] = copy.deepcopy(_one(random, VALUES))
    return prompt


def rewire(random: Any, prompt: dict, _: Sequence[str]) -> dict:
    """An input comes from another node's output, which may be no such thing, or from the node itself."""
    prompt = copy.deepcopy(prompt)
    links = [
        (node["inputs"], name) for node in prompt.values() for name, value in node["inputs"].items() if _link(value)
    ]
    inputs, name = _one(random, links)
    inputs[name] = [_one(random, list(prompt)), int(random.integers(0, 4))]
    return prompt


def _link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def drop_a_node(random: Any, prompt: dict, _: Sequence[str]) -> dict:
    dropped = _one(random, list(prompt))
    return {number: node for number, node in copy.deepcopy(prompt).items() if number != dropped}


def drop_an_input(random: Any, prompt: dict, _: Sequence[str]) -> dict:
    prompt = copy.deepcopy(prompt)
    inputs = _one(random, [node["inputs"] for node in prompt.values() if node["inputs"]])
    del inputs[_one(random, list(inputs))]
    return prompt


def another_type(random: Any, prompt: dict, types: Sequence[str]) -> dict:
    prompt = copy.deepcopy(prompt)
    prompt[_one(random, list(prompt))]["class_type"] = _one(random, types)
    return prompt


PROMPTS = (edit_prompt, edit_values, edit_values, edit_values, rewire, rewire, drop_a_node, drop_an_input, another_type)


# Files of the frontend


def edit_file(random: Any, workflow: dict, _: Sequence[str]) -> Any:
    return mutate(random, workflow)


def edit_widgets(random: Any, workflow: dict, _: Sequence[str]) -> dict:
    workflow = copy.deepcopy(workflow)
    node = _one(random, [node for node in workflow["nodes"] if node.get("widgets_values")])
    values = node["widgets_values"]
    values[int(random.integers(len(values)))] = copy.deepcopy(_one(random, VALUES))
    return workflow


def swap_widgets(random: Any, workflow: dict, _: Sequence[str]) -> dict:
    """As a file of another version has it, whose widgets stand in another order."""
    workflow = copy.deepcopy(workflow)
    node = _one(random, [node for node in workflow["nodes"] if len(node.get("widgets_values") or ()) > 1])
    values = node["widgets_values"]
    one, other = (int(random.integers(len(values))) for _ in range(2))
    values[one], values[other] = values[other], values[one]
    return workflow


def swap_links(random: Any, workflow: dict, _: Sequence[str]) -> dict:
    workflow = copy.deepcopy(workflow)
    one, other = (_one(random, workflow["links"]) for _ in range(2))
    one[1:3], other[1:3] = other[1:3], one[1:3]
    return workflow


def another_node(random: Any, workflow: dict, types: Sequence[str]) -> dict:
    workflow = copy.deepcopy(workflow)
    _one(random, workflow["nodes"])["type"] = _one(random, types)
    return workflow


FILES = (edit_file, edit_widgets, edit_widgets, swap_widgets, swap_links, another_node)
