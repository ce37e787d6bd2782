"""What the command line says of failures: a line where the user can mend it, a traceback where that is ours to do."""

import ast
from pathlib import Path

import pytest
import torch

from profusion import __main__ as program
from profusion import demo
from profusion.loop import TrainingError
from profusion.pictures import PictureError

KERNEL = Path(program.__file__).parent
DEMO = ("demo", "--out", "nowhere")


def failing(monkeypatch, problem):
    def run(*_, **__):
        problem()

    monkeypatch.setattr(demo, "run", run)
    return program.main(list(DEMO))


@pytest.mark.parametrize(("given", "capacity"), [((), demo.OPTIONS.capacity), (("--capacity", "1"), 1)])
def test_the_demo_has_a_capacity(monkeypatch, tmp_path, given, capacity):
    asked = []
    monkeypatch.setattr(demo, "run", lambda out, concept, training: asked.append(training) or {})
    assert program.main(["demo", "--out", str(tmp_path), *given]) == 0
    assert asked[0].capacity == capacity and asked[0].automatic and asked[0].steps == demo.OPTIONS.steps


def raising(error):
    def problem():
        raise error

    return problem


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PictureError("no pictures here"), "no pictures here"),
        (TrainingError("the loss is nan"), "the loss is nan"),
        (FileNotFoundError("weights not found"), "weights not found"),
        (MemoryError(), "memory ran out"),
        (ValueError("embedded null byte"), "null character"),
    ],
)
def test_what_can_be_mended_is_one_line(monkeypatch, capsys, error, message):
    assert failing(monkeypatch, raising(error)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("profusion: ") and captured.err.count("\n") == 1
    assert message in captured.err and not captured.out


@pytest.mark.parametrize(
    "problem",
    [
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: torch.randint(0, (1,)),
        lambda: torch.tensor([1.0, "x"]),
        raising(ValueError("operands could not be broadcast together")),
        raising(KeyError("a")),
    ],
)
def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, problem):
    with pytest.raises((ValueError, RuntimeError, KeyError, TypeError)):
        failing(monkeypatch, problem)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*DEMO, "--steps", "0"), "steps=0"),
        ((*DEMO, "--learning-rate", "nan"), "learning_rate=nan"),
        (("promptnet", "train", "--out", "one.pt"), "ends in .safetensors"),
        (("promptnet", "train", "--out", "one.safetensors", "--level-bias", "nan"), "level_bias=nan"),
    ],
)
def test_options_that_make_no_sense_are_one_line_before_anything_runs(
    capsys, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert program.main(list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("profusion: ") and message in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_every_error_of_the_kernel_is_one_of_those():
    first_base = {}
    for path in KERNEL.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                first_base[node.name] = ast.unparse(node.bases[0])
    assert {"PictureError", "MetricError", "NounError", "PromptNetError"} <= first_base.keys()
    for name, base in first_base.items():
        while base in first_base:
            base = first_base[base]
        assert base == "Explained", name
