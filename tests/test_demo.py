"""The demo on Toybox: what it leaves behind, and that both methods' pictures are measured alike."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from profusion import demo, keeping
from profusion.learning import own_concept, train
from profusion.residual import load_residual
from profusion.residual.training import ResidualTraining, TrainingOptions
from profusion.toybox.concepts import drawn_concept
from profusion.toybox.drawing import SIZE
from profusion.toybox.fused import FusedToybox
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import CUSTOMISED_GUIDANCE, NETWORKS, WEIGHTS, seeded

pytestmark = pytest.mark.skipif(
    not all((WEIGHTS / f"toybox_{name}.safetensors").is_file() for name in (*NETWORKS, "judge", "promptnet")),
    reason="Toybox's weights are not there: train them with `python -m training.toybox`",
)
SEEDS, STEPS = (2, 1), 3


@pytest.fixture(scope="module")
def fused():
    return FusedToybox.load()


@pytest.fixture(scope="module")
def concept():
    return drawn_concept()


@pytest.fixture(scope="module")
def drawing(fused, concept):
    residual = train(fused.toybox, concept, TrainingOptions(steps=1), lambda _: None).residual
    return demo.draw(fused, residual, concept.pictures[:1], "a photo of a {} on snow", SEEDS, STEPS)


def test_what_was_done_to_the_users_own_pictures_is_said(tmp_path, monkeypatch):
    """Before the training, which is left out here."""
    (folder := tmp_path / "own").mkdir()
    Image.new("RGB", (200, 100), "red").save(folder / "a.png")
    monkeypatch.setattr(demo, "train", None)
    said = []
    with pytest.raises(TypeError):
        demo.run(tmp_path / "out", own_concept(folder, "ball", 96), TrainingOptions(steps=2), say=said.append)
    cropped = "1 picture of 96x96 pixels, cropped and resized from 200x100"
    assert said == [f"learning 'your ball' (noun 'ball') from {cropped}"]


def test_it_writes_its_report_and_a_grid_of_both_methods(tmp_path, concept):
    prompts = ("a photo of a {} on grass", "a photo of a {} at night")
    report = demo.run(tmp_path, concept, TrainingOptions(steps=2), prompts, SEEDS, STEPS, lambda _: None)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["prompts"] == ["a photo of a mushroom on grass", "a photo of a mushroom at night"]
    assert {"plain", "customised", "other_seeds", "profusion", "references", "autoencoder"} <= report.keys()
    rows = 1 + 3 * len(SEEDS)  # the references, then plain, Infusion and ProFusion from each seed
    assert Image.open(tmp_path / "grid.png").height >= rows * 2 * SIZE
    assert {path.name for path in tmp_path.iterdir()} >= {"residual.safetensors", "loss.png"}
    assert not list(tmp_path.glob("training_*")), "what it could go on from is removed once it is finished"


def test_a_training_that_was_killed_goes_on_bit_for_bit_and_never_from_another_one(
    fused, concept, tmp_path, monkeypatch
):
    """No step has time to clean up after the last one: what is there was written before."""
    whole = train(fused.toybox, concept, TrainingOptions(steps=5), lambda _: None)
    monkeypatch.setattr(keeping, "SECONDS", 0.0)
    monkeypatch.setattr(keeping, "SHARE", 1e9)
    step = ResidualTraining._one_step

    def killed(training):
        if training.step == 3:
            raise SystemExit
        return step(training)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ResidualTraining, "_one_step", killed)
        train(fused.toybox, concept, TrainingOptions(steps=5), lambda _: None, tmp_path)
    (path,), said = tmp_path.iterdir(), []
    assert load_residual(path).steps == 3
    other = train(fused.toybox, concept, TrainingOptions(steps=5, seed=1), said.append, tmp_path)
    assert other.first == 0 and not any("going on" in text for text in said)
    assert train(fused.toybox, concept, TrainingOptions(steps=2), said.append, tmp_path / "elsewhere").first == 0
    again = train(fused.toybox, concept, TrainingOptions(steps=5), said.append, tmp_path)
    assert again.first == 3 and f"going on from step 3 of {path}" in said
    assert torch.equal(again.residual.delta, whole.residual.delta) and again.losses == whole.losses[3:]


def test_a_damaged_file_of_an_unfinished_training_is_said_and_begun_anew(fused, concept, tmp_path):
    train(fused.toybox, concept, TrainingOptions(steps=1), lambda _: None, tmp_path)
    (path,), said = tmp_path.iterdir(), []
    path.write_bytes(path.read_bytes()[:-9])
    assert train(fused.toybox, concept, TrainingOptions(steps=1), said.append, tmp_path).first == 0
    assert any("beginning anew" in text and str(path) in text for text in said)


def test_infusions_pictures_are_those_of_its_seeds_alone(fused, drawing):
    plain = fused.toybox.generate(["a photo of a mushroom on snow"] * 2, seeded(*SEEDS), STEPS, CUSTOMISED_GUIDANCE)
    torch.testing.assert_close(drawing.plain, fused.toybox.vae.pictures(plain), rtol=0, atol=1e-4)
    assert not torch.equal(drawing.customised, drawing.plain)


def test_profusion_draws_what_its_one_picture_shows(fused, concept, drawing):
    residual = train(fused.toybox, concept, TrainingOptions(steps=1), lambda _: None).residual
    other = drawn_concept("gold and navy cup").pictures[:1]
    again = demo.draw(fused, residual, other, "a photo of a {} on snow", SEEDS, STEPS)
    assert torch.equal(again.customised, drawing.customised)
    assert not torch.allclose(again.profusion, drawing.profusion, atol=1e-2)


def test_both_methods_are_scored_alike(fused, concept, drawing):
    same = replace(drawing, profusion=drawing.customised)
    scores = demo.score(fused.toybox, concept, [same, same], Judge.load())
    relative = {"way_to_the_references", "background_change_of_another_seed"}
    assert scores["profusion"] == {**scores["customised"], **{name: scores[name] for name in relative}}


def test_a_copy_of_the_references_is_all_the_way_there(fused, concept, drawing):
    copied = replace(drawing, profusion=concept.pictures[:2], plain=drawing.plain)
    scores = demo.score(fused.toybox, concept, [copied], Judge.load())
    assert scores["profusion"]["way_to_the_references"] > 0.9
    assert scores["profusion"]["caption_noun_accuracy"] == 1
    assert scores["plain"]["background_change"] == 0 < scores["profusion"]["background_change"]
