"""Prompts with mutated values, as any program may send them: each ends in a result or in an error that can be shown.

FUZZ says how many (`make fuzz` asks for 2,000), SEED where they begin.
"""

import asyncio
import os
import sys
import time
import uuid

import numpy
import pytest

pytest.importorskip("comfy.samplers", reason="no ComfyUI found: no prompts are mutated")

from test_guarding import PLAIN, plausible

from profusion.problems import printable
from tools.fuzz.mutations import HOSTILE, TEXTS

COUNT, SEED = int(os.environ.get("FUZZ", "100")), int(os.environ.get("SEED", "12"))
VALUES = (*HOSTILE, *TEXTS, float("nan"), float("inf"), -float("inf"), 1e-320, 2**70, [["1", 0]], {"__value__": [1]})
MOST_SECONDS = 20  # Toybox Loader really loads


def mutated(random, values):
    """The values with one to three of them replaced."""
    values = dict(values)
    for name in random.choice(list(values), min(len(values), int(random.integers(1, 4))), replace=False):
        values[str(name)] = VALUES[int(random.integers(len(VALUES)))]
    return values


def causes(problem):
    """What the host's log prints of an exception."""
    while problem is not None:
        yield problem
        problem = (
            None
            if problem.__suppress_context__ and not problem.__cause__
            else (problem.__cause__ or problem.__context__)
        )


def widgets(node):
    return {one.id: plausible(one) for one in node.define_schema().inputs if one.get_io_type() in PLAIN}


def test_every_node_takes_any_values(pack):
    nodes = sys.modules[f"{pack.__name__}.nodes"].NODES
    refused = sys.modules[f"{pack.__name__}.nodes.host.guarding"].InputError
    random, outcomes = numpy.random.default_rng([SEED, 1]), {"ran": 0, "refused": 0, "failed": 0}
    for turn in range(COUNT):
        node = nodes[turn % len(nodes)]
        sockets = {one.id: plausible(one) for one in node.define_schema().inputs if one.get_io_type() not in PLAIN}
        if not widgets(node):
            continue
        values, started = mutated(random, widgets(node)), time.process_time()
        try:
            node.execute(**sockets, **values)
            outcomes["ran"] += 1
        except Exception as problem:
            outcomes["refused" if isinstance(problem, refused) else "failed"] += 1
            for one in causes(problem):
                assert printable(str(one)) == str(one), f"{node.__name__} {values!r:.500}: {problem!r:.500}"
        assert time.process_time() - started < MOST_SECONDS, f"{node.__name__} {values!r:.500}"
    assert outcomes["refused"] > COUNT / 4
    print(outcomes)


@pytest.fixture
def run(pack, tmp_path, monkeypatch):
    """Run Residual Loader and Residual Saver with these values through the host: what its history says."""
    import execution
    import folder_paths
    import torch
    from executor import prompt_executor

    import nodes

    kernel, pack_nodes = (sys.modules[f"{pack.__name__}.{name}"] for name in ("profusion.residual", "nodes.residual"))
    paths = ([str(tmp_path / "residuals")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "profusion_residuals", paths)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    residual = kernel.Residual(torch.zeros(1, 1, 32), "cat", ("middle.0.0",), "Toybox", 1)
    kernel.save_residual(residual, tmp_path / "residuals" / "cat.safetensors")
    for node in pack_nodes.NODES:
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)
    executor = prompt_executor()

    def ask(loader, saver):
        prompt = {
            "1": {"class_type": "ProFusion_ResidualLoader", "inputs": loader},
            "2": {"class_type": "ProFusion_ResidualSaver", "inputs": {"residual": ["1", 0], **saver}},
        }
        valid, error, outputs, by_node = asyncio.run(execution.validate_prompt("fuzz", prompt, None))
        if not valid:
            return "invalid", [one["details"] for node in by_node.values() for one in node["errors"]]
        executor.execute(prompt, str(uuid.uuid4()), execute_outputs=outputs)
        said = [data["exception_message"] for event, data in executor.status_messages if "exception_message" in data]
        return ("failed", said) if said else ("ran", [])

    return ask


def test_the_host_runs_on_after_any_prompt(run):
    random, outcomes = numpy.random.default_rng([SEED, 2]), {"ran": 0, "invalid": 0, "failed": 0}
    good = {"residual": "cat.safetensors"}, {"filename_prefix": "x", "precision": "int6"}
    for _ in range(COUNT):
        loader, saver = good
        if random.random() < 0.3:
            loader = mutated(random, loader)
        else:
            saver = {**mutated(random, {"filename_prefix": "x"}), "precision": "int6"}
        outcome, said = run(loader, saver)
        outcomes[outcome] += 1
        for text in said:
            assert printable(text) == text and len(text) < 20_000, (loader, saver, text[:500])
            assert "TypeError" not in text and "AttributeError" not in text, (loader, saver, text[:500])
    assert run(*good)[0] == "ran" and outcomes["failed"] and outcomes["invalid"]
    print(outcomes)
