"""`python -m profusion score` on folders of pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from profusion.__main__ import main
from profusion.pictures import from_image
from profusion.stamped import save_stamped
from profusion.toybox import world


@pytest.fixture
def folders(tmp_path):
    """Two folders of drawn pictures, 2 and 3, their objects' masks, and a folder that is empty."""
    for name, count, seed in (("images", 2, 2), ("references", 3, 1)):
        for folder in (name, f"{name}-masks"):
            (tmp_path / folder).mkdir()
        for index, item in enumerate(world.concept_pictures("teal and coral ball", count, np.random.default_rng(seed))):
            Image.fromarray(item.image).save(tmp_path / name / f"{index}.png")
            Image.fromarray(item.masks[0]).save(tmp_path / f"{name}-masks" / f"{index}.png")
    (tmp_path / "empty").mkdir()
    return tmp_path


def score(folders, *more, images="images", references="references"):
    return main(
        ["score", "--images", str(folders / images), "--references", str(folders / references), *map(str, more)]
    )


def with_masks(folders):
    return "--masks", folders / "images-masks", "--reference-masks", folders / "references-masks"


def test_a_table_and_a_file_and_a_chart(folders, capsys):
    written, picture = folders / "scores.json", folders / "scores.png"
    assert score(folders, "--prompt", "a ball", *with_masks(folders), "--json", written, "--chart", picture) == 0
    table = capsys.readouterr().out
    assert "| generated |" in table and "CLIP-T (Toybox's own pair)" in table
    found = json.loads(written.read_text())
    assert found["images"] == ["0.png", "1.png"] and found["prompts"] == ["a ball"]
    means = {(row["metric"], row["subject"]): row["mean"] for row in found["scores"]}
    assert {metric for metric, _ in means} == {"CLIP-T", "CLIP-I", "CLIP-I, object", "CLIP-I, background"}
    assert all(row["count"] == (2 if row["subject"] == "generated" else 3) for row in found["scores"])
    assert means["CLIP-I, background", "generated"] < 0.99  # they are on different backgrounds
    assert Image.open(picture).size[0] == 640


def test_a_prompt_for_each_picture_and_no_objects_without_masks(folders, capsys):
    prompts = folders / "prompts.txt"
    prompts.write_text("a ball on grass\n\na ball at night\n")
    assert score(folders, "--prompts", prompts) == 0 and "object" not in capsys.readouterr().out
    assert score(folders, "--prompts", prompts, "--masks", folders / "images-masks") == 0
    assert "both the generated pictures and the references have masks" in capsys.readouterr().out
    prompts.write_text("\na ball at night\n")
    assert score(folders, "--prompts", prompts) == 1
    assert "of 2 lines of prompts for 2 pictures these are empty: 1. Write" in capsys.readouterr().err


def test_prompts_that_are_not_given_are_those_that_the_pictures_say(folders, capsys, tmp_path):
    assert score(folders) == 1
    said = capsys.readouterr().err
    assert "0.png does not say what it was drawn from" in said and "give --prompt or --prompts" in said
    for index, prompt in enumerate(("a (teal:1.3) ball", r"a ball \(coral\)")):
        path = folders / "images" / f"{index}.png"
        picture = from_image(Image.open(path))
        path.unlink()
        save_stamped([path], picture, {"prompt": prompt})
    assert score(folders, "--json", folders / "scores.json") == 0
    assert json.loads((folders / "scores.json").read_text())["prompts"] == ["a teal ball", "a ball (coral)"]


@pytest.mark.parametrize(
    ("more", "sets", "message"),
    [
        (["--prompt", "a ball"], {"images": "empty"}, "no pictures in"),
        (["--prompt", "a ball"], {"references": "empty"}, "no pictures in"),
        (["--prompt", "a ball"], {"references": "nowhere"}, "is not a folder"),
        (["--prompt", " "], {}, "none of them empty"),
        (["--prompts", "nowhere.txt"], {}, "nowhere.txt"),
        (["--prompt", "a ball", "--clip", "vit"], {}, "--clip vit: give toybox, or open_clip:NAME"),
        (["--prompt", "a ball", "--clip", "open_clip:"], {}, "such as ViT-B/32"),
    ],
)
def test_bad_input_is_named(folders, capsys, more, sets, message):
    assert score(folders, *more, **sets) == 1
    assert message in capsys.readouterr().err


def test_mismatched_lists_and_pictures_that_are_not_toyboxs(folders, capsys):
    prompts = folders / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\n")
    assert score(folders, "--prompts", prompts) == 1 and "3 prompts for 2 pictures" in capsys.readouterr().err
    assert score(folders, "--prompt", "a ball", "--masks", folders / "references-masks") == 1
    assert "3 masks for 2 pictures" in capsys.readouterr().err
    Image.new("RGB", (120, 80), "red").save(folders / "images" / "0.png")
    assert score(folders, "--prompt", "a ball") == 1
    assert "pictures of 120x80 pixels" in capsys.readouterr().err


def test_masks_that_are_the_wrong_way_round_are_asked_about(folders, capsys):
    path = folders / "images-masks" / "1.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert score(folders, "--prompt", "a ball", *with_masks(folders)) == 1
    said = capsys.readouterr().err
    assert "1.png is white all around and black inside, so it seems to be inverted" in said and "Invert it" in said


def test_what_macos_leaves_beside_pictures_stops_nothing(folders, capsys):
    (folders / "images" / "._0.png").write_bytes(b"\0\5\x16\7")
    assert score(folders, "--prompt", "a ball") == 0
    (folders / "images" / "IMG_1.CR2").write_bytes(b"II*")
    assert score(folders, "--prompt", "a ball") == 1
    assert "cannot be read: IMG_1.CR2. Save them as PNG or JPEG" in capsys.readouterr().err
