"""`python -m profusion probe`: its table, on Toybox and on a checkpoint, and what is refused at once."""

import pytest

from profusion import __main__ as program
from tests import shrunken

PROMPT = "a photo of a ball on grass"


def probe(capsys, *more, prompt=PROMPT, noun="ball"):
    assert program.main(["probe", "--prompt", prompt, "--noun", noun, "--steps", "3", *map(str, more)]) == 0
    said, head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["layer", "inside", "outside"]
    return said, [(name, float(inside), float(outside)) for name, inside, outside in map(str.split, rows)]


def test_toybox_looks_for_a_ball_at_its_noun(capsys):
    said, rows = probe(capsys)
    assert len(rows) == 10 and rows[0][0] == "input.1.0"
    assert all(inside > 10 > 5 > outside for _, inside, outside in rows)
    assert said.startswith("'ball' has ") and said.endswith("% outside.")


def test_a_checkpoint_is_probed_too(capsys, tmp_path):
    path = shrunken.written(tmp_path / "model.safetensors", shrunken.checkpoint("SD 1.x"))
    _, rows = probe(capsys, "--checkpoint", path, "--size", 16, prompt="a cat on grass", noun="cat")
    assert all(0 < inside < 100 for _, inside, _ in rows)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "0"], "--steps 0: give 1 to 1000"),
        (["--seed", "-1"], "--seed -1: give 0 to"),
        (["--prompt", "a star"], "--noun is of the noun 'ball', which is not a word of the prompt 'a star'"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(capsys, more, said):
    assert program.main(["probe", "--prompt", PROMPT, "--noun", "ball", *more]) == 1
    assert said in capsys.readouterr().err
