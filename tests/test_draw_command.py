"""`python -m profusion draw`: which pictures it writes, what they say of themselves, and what is refused at once."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from profusion import __main__ as program
from profusion.learning import origin_on
from profusion.pipeline import seeded
from profusion.residual import Residual, save_residual
from profusion.residual.training import TrainingOptions
from profusion.stable_diffusion import StableDiffusion
from profusion.stamped import how_made
from profusion.toybox.pipeline import NETWORKS, WEIGHTS
from tests import shrunken

SIZE = 16
PROMPT = "a cat beside a (dog:1.2)"
STEM = "a_cat_beside_a_dog_1_2"


@pytest.fixture(scope="module", params=["SD 1.x", "SDXL"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    return shrunken.written(path, shrunken.checkpoint(request.param))


@pytest.fixture(scope="module")
def model(checkpoint):
    return StableDiffusion.load(checkpoint, SIZE)


@pytest.fixture(scope="module")
def residuals(model, tmp_path_factory):
    """The files of a cat's and of a dog's."""
    folder, paths = tmp_path_factory.mktemp("residuals"), {}
    pictures, masks = torch.rand(1, SIZE, SIZE, 3), torch.ones(1, SIZE, SIZE)
    for seed, noun in enumerate(("cat", "dog")):
        empty = model.training(pictures, masks, noun, TrainingOptions(steps=1)).residual()
        delta = 30 * torch.randn(empty.delta.shape, generator=torch.manual_seed(seed))
        residual = Residual(delta, noun, empty.layers, empty.architecture, origin=origin_on(model, 0.02))
        paths[noun] = save_residual(residual, folder / f"{noun}.safetensors", "float32").path
    return paths


def run(out, checkpoint, *more, prompt=PROMPT):
    options = ["--checkpoint", checkpoint, "--size", SIZE] if checkpoint is not None else []
    return program.main(["draw", "--prompt", prompt, "--out", *map(str, [out, "--steps", 2, *options, *more])])


def pixels(path):
    return np.asarray(Image.open(path)).astype(float)


def close(path, other):
    return np.abs(pixels(path) - pixels(other)).max() <= 1


def test_a_folder_gets_a_picture_of_each_seed_that_says_how_it_was_made(tmp_path, checkpoint, model):
    assert run(tmp_path, checkpoint, "--seeds", 3, 4, 3, "--negative", "snow", "--cfg", 5) == 0
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == [f"{STEM}_seed_{seed}.png" for seed in (3, 4)]
    latent = model.generate([PROMPT], seeded(4), 2, 5.0, negative="snow")
    expected = (model.pictures(latent)[0] * 255).round().numpy()
    assert np.abs(pixels(paths[1]) - expected).max() <= 1
    how = how_made(paths[1])
    assert (how["prompt"], how["negative"], how["seed"], how["steps"], how["cfg"]) == (PROMPT, "snow", 4, 2, 5.0)
    assert (how["base"], how["residuals"], how["stream"]) == ("model.safetensors", [], "plain")
    assert json.loads(Image.open(paths[1]).text["profusion"]) == how


def test_residuals_are_drawn_beside_the_plain_pictures(tmp_path, checkpoint, residuals, model, capsys):
    both = ("--residual", residuals["cat"], residuals["dog"])
    assert run(tmp_path, checkpoint, *both, "--strength", 1, 0.5) == 0
    assert "warning" not in capsys.readouterr().out
    plain, customised = (tmp_path / stream / f"{STEM}_seed_1.png" for stream in ("plain", "customised"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["customised", "plain"]
    assert not close(plain, customised)
    cat, dog = how_made(customised)["residuals"]
    assert (cat["file"], cat["noun"], cat["strength"]) == ("cat.safetensors", "cat", 1.0)
    assert (dog["file"], dog["noun"], dog["strength"]) == ("dog.safetensors", "dog", 0.5)
    assert how_made(plain)["residuals"] == [] and how_made(customised)["cfg"] == 7.0
    assert run(tmp_path / "none", checkpoint) == 0
    assert close(plain, tmp_path / "none" / f"{STEM}_seed_1.png")
    assert run(tmp_path / "off", checkpoint, *both, "--strength", 0) == 0
    assert close(plain, tmp_path / "off" / "customised" / f"{STEM}_seed_1.png")
    for name, options in (("weaker", ("--strength", 0.5)), ("shared", ("--shared-latent",))):
        assert run(tmp_path / name, checkpoint, *both, *options) == 0
        assert not close(customised, tmp_path / name / "customised" / f"{STEM}_seed_1.png")
    # what F sees there depends on the residuals
    assert len(how_made(tmp_path / "shared" / "plain" / f"{STEM}_seed_1.png")["residuals"]) == 2


def test_what_is_there_already_is_not_drawn_again_and_nothing_is_overwritten(
    tmp_path, checkpoint, residuals, capsys, monkeypatch
):
    assert run(tmp_path, checkpoint, "--residual", residuals["cat"], "--seeds", 1, 2) == 0
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(stamps) == 4
    (gone,) = (path for path in stamps if path.parent.name == "customised" and path.stem.endswith("_2"))
    before = pixels(gone)
    gone.unlink()
    capsys.readouterr()
    assert run(tmp_path, checkpoint, "--residual", residuals["cat"], "--seeds", 1, 2) == 0
    assert capsys.readouterr().out.count("is there already") == 3
    assert (pixels(gone) == before).all()
    assert all(path == gone or path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert run(tmp_path, checkpoint, "--residual", residuals["cat"], "--strength", 2, "--cfg", 7) == 0
    assert len(list(tmp_path.rglob("*.png"))) == 5  # the plain one is the same
    (added,) = set(tmp_path.rglob("*.png")) - set(stamps)
    assert added.name == f"{STEM}_seed_1_2.png" and how_made(added)["residuals"][0]["strength"] == 2.0
    monkeypatch.setattr(StableDiffusion, "generate_customised", None)
    assert run(tmp_path, checkpoint, "--residual", residuals["cat"], "--strength", 2) == 0


def test_one_png_holds_all_seeds_plain_above_customised(tmp_path, checkpoint, residuals):
    sheet = tmp_path / "new" / "sheet.png"
    assert run(sheet, checkpoint, "--residual", residuals["cat"], "--seeds", 1, 2) == 0
    assert Image.open(sheet).size == (2 * SIZE, 2 * SIZE)
    how = how_made(sheet)
    assert how["seeds"] == [1, 2] and how["stream"] == ["plain", "customised"] and len(how["residuals"]) == 1
    assert run(tmp_path / "apart", checkpoint, "--residual", residuals["cat"], "--seeds", 2) == 0
    one = pixels(tmp_path / "apart" / "customised" / f"{STEM}_seed_2.png")
    assert np.abs(pixels(sheet)[SIZE:, SIZE:] - one).max() <= 1
    assert run(tmp_path / "one.png", checkpoint) == 0 and Image.open(tmp_path / "one.png").size == (SIZE, SIZE)


def test_a_residual_of_another_base_is_drawn_with_a_warning(tmp_path, residuals, model, checkpoint, capsys):
    tensors = shrunken.checkpoint(model.family)
    tensors = {name: 2 * x if "attn2.to_v" in name else x for name, x in tensors.items()}
    other = shrunken.written(tmp_path / "other.safetensors", tensors)
    assert run(tmp_path / "out", other, "--residual", residuals["cat"]) == 0
    assert "warning: The residual of 'cat' was trained on model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--strength", 1, 2), "--strength has 2 numbers for 1 residuals"),
        (("--strength", "nan"), "--strength must be finite"),
        (("--seeds", -1), "--seeds must lie in"),
        (("--steps", 0), "--steps 0"),
        (("--cfg", "nan"), "--cfg nan"),
        (("--residual", "nowhere.safetensors"), "nowhere.safetensors"),
        (("--negative", "(a:inf)"), "weight inf"),
        (("--prompt", "embedding:x cat"), "embedding 'x'"),
        (("--prompt", "two cats"), "cat.safetensors is of the noun 'cat', which is not a word of the prompt"),
        (("--out", "there.png"), "there is such a file already"),
        (("--out", "file"), "it is a file, and no folder"),
        (("--out", "file/x.png"), "nothing can be saved there"),
    ],
)
def test_what_makes_no_sense_is_one_line_before_a_checkpoint_is_read(
    tmp_path, checkpoint, residuals, capsys, monkeypatch, more, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusion, "load", None)
    for name in ("there.png", "file"):
        (tmp_path / name).write_bytes(b"someone's")
    assert run("out", checkpoint, "--residual", residuals["cat"], *more) == 1
    said = capsys.readouterr().err
    assert said.startswith("profusion: ") and words in said and said.count("\n") == 1
    assert (tmp_path / "there.png").read_bytes() == b"someone's" and not list(tmp_path.rglob("*seed*"))


def test_a_residual_of_another_architecture_is_one_line(tmp_path, checkpoint, capsys):
    strange = Residual(torch.ones(1, 1, 8), "cat", ("input.1.0",), "Toy")
    path = save_residual(strange, tmp_path / "strange.safetensors", "float32").path
    assert run(tmp_path / "out", checkpoint, "--residual", path) == 1
    said = capsys.readouterr().err
    assert "was trained on Toy" in said and said.count("\n") == 1


def test_what_a_strange_file_says_of_itself_is_nothing(tmp_path):
    for name, data in (("a.png", b""), ("b.png", b"\x89PNG\r\n\x1a\n" + b"x" * 50)):
        (tmp_path / name).write_bytes(data)
        assert how_made(tmp_path / name) is None
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    assert how_made(tmp_path / "c.png") is None and how_made(tmp_path / "none.png") is None


@pytest.mark.skipif(
    not all((WEIGHTS / f"toybox_{name}.safetensors").is_file() for name in NETWORKS), reason="no weights of Toybox"
)
def test_toybox_draws_by_default_what_score_then_measures(tmp_path, capsys):
    assert run(tmp_path / "a", None, "--seeds", 1, 2, prompt="a photo of a ball on grass") == 0
    assert how_made(next((tmp_path / "a").iterdir()))["base"] == "Toybox"
    capsys.readouterr()
    folders = ["--images", str(tmp_path / "a"), "--references", str(tmp_path / "a")]
    assert program.main(["score", *folders]) == 0
    assert "CLIP-T" in capsys.readouterr().out
