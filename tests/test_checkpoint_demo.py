"""The demo on a checkpoint, by the command line: what it leaves behind, and what it says of what cannot be."""

import json

import pytest
import torch
from PIL import Image

from profusion import __main__ as program
from profusion import checkpoint_demo, keeping
from profusion.pipeline import noun_rows, seeded
from profusion.residual import load_residual
from profusion.residual.training import ResidualTraining, TrainingOptions
from profusion.stable_diffusion import StableDiffusion
from tests import shrunken

SIZE = 16


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, color in enumerate(("red", "orange")):
        Image.new("RGB", (40, 30), color).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module", params=shrunken.KINDS, ids="-".join)
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    return shrunken.written(path, shrunken.checkpoint(*request.param), torch.float16)


def run(out, checkpoint, images, noun="hedgehog"):
    arguments = ["--out", str(out), "--checkpoint", str(checkpoint), "--images", str(images), "--noun", noun]
    return program.main(["demo", *arguments, "--size", str(SIZE), "--steps", "2"])


@pytest.fixture
def short(monkeypatch):
    """Two sampling steps in place of 25."""
    draw = checkpoint_demo.draw
    monkeypatch.setattr(checkpoint_demo, "draw", lambda *args: draw(*args[:-1], 2))


def test_it_writes_a_grid_a_report_and_a_residual_that_draws_again(tmp_path, checkpoint, images, short):
    assert run(tmp_path, checkpoint, images) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["noun"] == "hedgehog" and report["pictures"] == 2 and report["training_steps"] == 2
    assert report["prompts"][0] == "a photo of a hedgehog on grass"
    assert {path.name for path in tmp_path.iterdir()} >= {"grid.png", "loss.png", "residual.safetensors"}
    assert Image.open(tmp_path / "grid.png").width >= 3 * SIZE
    assert not list(tmp_path.glob("training_*")), "what it could go on from is removed once it is finished"
    residual, model = load_residual(tmp_path / "residual.safetensors"), StableDiffusion.load(checkpoint, SIZE)
    assert residual.noun == "hedgehog" and residual.steps == 2 and residual.origin.base == checkpoint.name
    assert noun_rows(report["prompts"][0], residual.noun)
    plain, customised = model.generate_customised(report["prompts"][0], [residual], seeded(1), 2)
    assert plain.isfinite().all() and not torch.equal(plain, customised)


def test_the_plot_says_which_loss_it_is_of(tmp_path, checkpoint, images, short, monkeypatch):
    titles, plot = [], checkpoint_demo.loss_plot

    def noted(*args, title=None, **options):
        titles.append(title)
        return plot(*args, **options)

    monkeypatch.setattr(checkpoint_demo, "loss_plot", noted)
    assert run(tmp_path, checkpoint, images) == 0
    assert titles == [TrainingOptions(learning_rate=0.0).loss_title] == ["loss (share of the plain model's)"]
    assert "eps error" in TrainingOptions().loss_title


def test_what_is_no_checkpoint_is_one_line(tmp_path, images, capsys):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"<!DOCTYPE html>" + b" " * 100)
    assert run(tmp_path / "out", path, images) == 1
    said = capsys.readouterr().err
    assert (
        said.startswith("profusion: 'model.safetensors' cannot be loaded: it is a web page") and said.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint", "x"], "needs --images and --noun"),
        (["--size", "64"], "go with --checkpoint"),
        (["--dtype", "float16"], "go with --checkpoint"),
        (["--images", "x", "--noun", "hedgehog"], "Toybox knows"),
        (["--checkpoint", "x", "--images", "y"], "go together"),
        (["--checkpoint", "x", "--images", "y", "--noun", "z", "--device", "warp:9"], "no such device"),
        (["--checkpoint", "x", "--images", "y", "--noun", "z", "--device", "meta"], "no such device"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, options, words):
    with pytest.raises(SystemExit):
        program.main(["demo", "--out", str(tmp_path), *options])
    assert words in capsys.readouterr().err


def test_a_run_that_is_interrupted_says_so_and_goes_on(tmp_path, images, short, capsys, monkeypatch):
    checkpoint = shrunken.written(tmp_path / "model.safetensors", shrunken.checkpoint("SD 1.x"))
    out, step = tmp_path / "out", ResidualTraining._one_step
    monkeypatch.setattr(keeping, "SECONDS", 0.0)
    monkeypatch.setattr(keeping, "SHARE", 1e9)

    def interrupted(training):
        if training.step == 1:
            raise KeyboardInterrupt
        return step(training)

    with monkeypatch.context() as patch:
        patch.setattr(ResidualTraining, "_one_step", interrupted)
        assert run(out, checkpoint, images) == 130
    assert "the same command goes on" in capsys.readouterr().err and len(list(out.iterdir())) == 1
    assert run(out, checkpoint, images) == 0
    assert "going on from step 1" in capsys.readouterr().out
    resumed = load_residual(out / "residual.safetensors")
    assert run(tmp_path / "whole", checkpoint, images) == 0
    assert torch.equal(resumed.delta, load_residual(tmp_path / "whole" / "residual.safetensors").delta)
