"""`python -m profusion residual train`: the file, what it goes on from, and what is refused at once."""

import json
import os
import signal

import pytest
import torch
from PIL import Image

from profusion import __main__ as program
from profusion import residual_command
from profusion.residual import ResidualError, load_residual
from profusion.residual.training import ResidualTraining
from profusion.stable_diffusion import StableDiffusion
from profusion.toybox.pipeline import NETWORKS, WEIGHTS
from tests import shrunken

SIZE = 16


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, color in enumerate(("red", "orange")):
        image = Image.new("RGB", (40, 30), color)
        image.paste("blue", (0, 0, 15, 30))  # left and right differ
        image.save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    return shrunken.written(path, shrunken.checkpoint("SD 1.x"), torch.float16)


def run(out, images, checkpoint, *more, steps=3, noun="cat"):
    arguments = ["--out", str(out), "--images", str(images), "--noun", noun, "--steps", str(steps), *map(str, more)]
    if checkpoint is not None:
        arguments += ["--checkpoint", str(checkpoint), "--size", str(SIZE)]
    return program.main(["residual", "train", *arguments])


def test_it_writes_what_residual_trainer_writes(tmp_path, images, checkpoint, capsys):
    out = tmp_path / "new" / "cat.safetensors"
    assert run(out, images, checkpoint) == 0
    said = capsys.readouterr().out
    report = json.loads(said[said.index("{") :])
    assert report["residual"] == str(out) and report["steps"] == 3 and report["pictures"] == 2 and report["loss"] > 0
    assert "cropped and resized from 40x30" in said and "train 3/3" in said
    learned = load_residual(out)
    assert (learned.noun, learned.steps, learned.seed) == ("cat", 3, 0) and learned.training_state
    assert learned.origin.base == "model.safetensors" and learned.origin.learning_rate == 0.0  # automatic
    assert report["masks"] in ("found", "as given") and report["strangeness"] > 0
    assert len(learned.origin.base_hash) == 10 and learned.origin.base_hash == report["base_hash"]
    assert [path.name for path in out.parent.iterdir()] == ["cat.safetensors"]


def test_every_option_reaches_the_training(tmp_path, images, checkpoint):
    usual = tmp_path / "usual.safetensors"
    assert run(usual, images, checkpoint) == 0
    delta = load_residual(usual).delta
    options = (("--seed", 1), ("--batch", 2), ("--learning-rate", 0.5), ("--no-flip",), ("--dtype", "bfloat16"))
    options = (*options, ("--capacity", 2))
    for number, option in enumerate(options):
        out = tmp_path / f"{number}.safetensors"
        assert run(out, images, checkpoint, *option) == 0
        assert not torch.equal(load_residual(out).delta, delta), option
    assert run(tmp_path / "small.safetensors", images, checkpoint, "--precision", "int6") == 0
    assert (tmp_path / "small.safetensors").stat().st_size < usual.stat().st_size / 3


def test_an_interrupt_keeps_what_was_learned_and_the_same_command_ends_bit_for_bit(
    tmp_path, images, checkpoint, monkeypatch, capsys
):
    assert run(tmp_path / "whole.safetensors", images, checkpoint) == 0
    out, step = tmp_path / "work" / "cat.safetensors", ResidualTraining._one_step

    def interrupted(training):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(training)

    with monkeypatch.context() as patch:
        patch.setattr(ResidualTraining, "_one_step", interrupted)
        assert run(out, images, checkpoint) == 130
    assert "the same command goes on" in capsys.readouterr().err and not out.exists()
    assert len(list(out.parent.iterdir())) == 1
    assert run(out, images, checkpoint) == 0
    assert "going on from step 1" in capsys.readouterr().out
    assert torch.equal(load_residual(out).delta, load_residual(tmp_path / "whole.safetensors").delta)
    assert list(out.parent.iterdir()) == [out]


def test_a_residual_is_trained_further_and_another_base_is_said(tmp_path, images, checkpoint, capsys):
    assert run(tmp_path / "whole.safetensors", images, checkpoint) == 0
    begun = tmp_path / "begun.safetensors"
    assert run(begun, images, checkpoint, steps=1) == 0
    capsys.readouterr()
    assert run(tmp_path / "further.safetensors", images, checkpoint, "--resume", begun) == 0
    assert "warning" not in capsys.readouterr().out
    further = load_residual(tmp_path / "further.safetensors").delta
    assert torch.equal(further, load_residual(tmp_path / "whole.safetensors").delta)
    tensors = shrunken.checkpoint("SD 1.x")
    tensors = {name: 2 * x if "attn2.to_v" in name else x for name, x in tensors.items()}
    other = shrunken.written(tmp_path / "other.safetensors", tensors)
    assert run(tmp_path / "third.safetensors", images, other, "--resume", begun) == 0
    assert "warning: The residual of 'cat' was trained on model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noun": "..."}, "give the class of what the pictures show"),
        ({"noun": "(cat)"}, "the noun '(cat)' is not in the prompt"),
        ({"out": "cat.pt"}, "ends in .safetensors"),
        ({"out": "there.safetensors"}, "there is such a file already"),
        ({"out": "file/cat.safetensors"}, "nothing can be saved there"),
        ({"images": "nowhere"}, "is not a folder"),
        ({"more": ("--resume", "there.safetensors")}, "there.safetensors' cannot be loaded"),
        ({"steps": 0}, "steps=0"),
        ({"more": ("--learning-rate", "nan")}, "learning_rate=nan"),
    ],
)
def test_what_makes_no_sense_is_one_line_before_a_checkpoint_is_read(
    tmp_path, images, checkpoint, capsys, monkeypatch, options, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusion, "load", None)
    (tmp_path / "there.safetensors").write_bytes(b"someone's")
    (tmp_path / "file").write_bytes(b"")
    given = {"out": "cat.safetensors", "images": images, "more": (), **options}
    assert run(given.pop("out"), given.pop("images"), checkpoint, *given.pop("more"), **given) == 1
    said = capsys.readouterr().err
    assert said.startswith("profusion: ") and words in said and said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"there.safetensors", "file"}
    assert (tmp_path / "there.safetensors").read_bytes() == b"someone's"


def test_a_residual_that_is_as_far_already_is_refused(tmp_path, images, checkpoint, capsys):
    assert run(tmp_path / "cat.safetensors", images, checkpoint) == 0
    assert run(tmp_path / "two.safetensors", images, checkpoint, "--resume", tmp_path / "cat.safetensors") == 1
    assert "it has 3 steps already, and --steps 3 counts from the first" in capsys.readouterr().err


def test_toybox_is_asked_for_what_it_knows(tmp_path, images, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "cat.safetensors", images, None, noun="hedgehog")
    assert "Toybox knows" in capsys.readouterr().err


def test_a_name_that_is_taken_meanwhile_costs_nothing(tmp_path, images, checkpoint, monkeypatch):
    out, train = tmp_path / "cat.safetensors", residual_command.train

    def slow(*given):
        trained = train(*given)
        out.write_bytes(b"someone's")
        return trained

    monkeypatch.setattr(residual_command, "train", slow)
    command = residual_command.Command(images, "cat", out, residual_command.TrainingOptions(steps=2))
    with pytest.raises(
        ResidualError, match="meanwhile. What has been.*Give another --out in the same folder"
    ) as raised:
        residual_command.run(command, StableDiffusion.load(checkpoint, SIZE), lambda _: None)
    (partial,) = tmp_path.glob("training_*")
    assert str(partial) in str(raised.value) and load_residual(partial).steps == 2
    assert out.read_bytes() == b"someone's"


@pytest.mark.skipif(
    not all((WEIGHTS / f"toybox_{name}.safetensors").is_file() for name in NETWORKS), reason="no weights of Toybox"
)
def test_toybox_is_what_it_is_trained_on_by_default(tmp_path, images):
    out = tmp_path / "ball.safetensors"
    assert run(out, images, None, noun="ball", steps=1) == 0
    learned = load_residual(out)
    assert (learned.architecture, learned.origin.base, learned.origin.base_hash) == ("Toybox", "Toybox", "")
