"""What is measured of pictures of a concept, with Toybox's own pair."""

import math

import numpy as np
import pytest
import torch

from profusion.metrics import MetricError, Pictures, concept_scores
from profusion.toybox import world
from profusion.toybox.drawing import SIZE

CONCEPT = "teal and coral ball"


def drawn(name, count, seed):
    items = world.concept_pictures(name, count, np.random.default_rng(seed))
    return Pictures(
        [torch.from_numpy(item.image).float() / 255 for item in items],
        [torch.from_numpy(item.masks[0]).float() / 255 for item in items],
    )


def means(scores):
    return {(score.metric, score.subject): score.mean for score in scores.scores}


def test_the_concept_scores_higher_than_another_thing(toybox):
    references = drawn(CONCEPT, 3, 1)
    same = concept_scores(drawn(CONCEPT, 3, 2), references, ["a ball"], [toybox])
    other = concept_scores(drawn("gold and navy cup", 3, 2), references, ["a ball"], [toybox])
    assert all(score.backbone == toybox.name and score.count == 3 for score in same.scores)
    for metric in ("CLIP-T", "CLIP-I", "CLIP-I, object"):
        assert means(same)[metric, "generated"] > means(other)[metric, "generated"] + 0.1
    among = means(same)["CLIP-I, object", "references among themselves"]
    assert means(other)["CLIP-I, object", "generated"] + 0.1 < among < 1
    assert ("CLIP-I, background", "generated") in means(same)
    assert next(score for score in same.scores if "background" in score.metric).better == ""


def test_the_references_themselves_are_1_and_a_further_backbone_is_named(toybox):
    one = Pictures(drawn(CONCEPT, 1, 1).images)
    found = concept_scores(one, one, [], [Colors()])
    assert means(found) == {("DINO", "generated"): pytest.approx(1.0)} and found.scores[0].backbone == "mean colours"
    assert math.isnan(found.scores[0].low)


class Colors:
    """A backbone whose features are a picture's mean colour."""

    name, measure = "mean colours", "DINO"

    def images(self, pictures):
        return pictures.mean(dim=(1, 2)) - 0.4


def test_pictures_of_different_sizes_which_toybox_does_not_know():
    generated = Pictures([torch.rand(64, 96, 3), torch.rand(130, 100, 3)])
    found = concept_scores(generated, generated, [], [Colors()])
    assert [(score.metric, score.count) for score in found.scores] == [("DINO", 2), ("DINO", 2)]


def test_toybox_refuses_pictures_that_are_not_its_own(toybox):
    with pytest.raises(MetricError, match=r"pictures of 96x64 pixels: .* --clip open_clip:ViT-L/14"):
        concept_scores(Pictures([torch.rand(64, 96, 3)]), drawn(CONCEPT, 2, 1), ["a ball"], [toybox])


def test_each_picture_has_its_prompt(toybox):
    found = [
        concept_scores(drawn(CONCEPT, 2, 2), drawn(CONCEPT, 2, 1), prompts, [toybox])
        for prompts in (["a ball", "a cup on grass"], ["a cup on grass", "a ball"])
    ]
    assert found[0].scores[0].mean != found[1].scores[0].mean and found[0].scores[1:] == found[1].scores[1:]


def test_every_pair_has_a_clip_t_of_its_own(toybox, mismatched):
    generated, references = Pictures(drawn(CONCEPT, 2, 2).images), Pictures(drawn(CONCEPT, 2, 1).images)
    found = concept_scores(generated, references, ["a ball"], [Colors(), toybox, mismatched(0)])
    assert [score.metric for score in found.scores] == ["DINO", "DINO", "CLIP-T", *["CLIP-I"] * 4] and len(
        found.notes
    ) == 1


def test_no_prompt_similarity_of_a_pair_that_is_none(mismatched):
    found = concept_scores(drawn(CONCEPT, 2, 2), drawn(CONCEPT, 2, 1), ["a ball"], [mismatched(0)])
    assert not any(score.metric == "CLIP-T" for score in found.scores)
    assert "No CLIP-T: mismatched finds" in found.notes[0] and found.notes[0] in found.markdown()


def test_masks_on_one_side_only_compare_no_objects_and_say_so(toybox):
    references = drawn(CONCEPT, 2, 1)
    found = concept_scores(Pictures(references.images), references, ["a ball"], [toybox])
    assert {score.metric for score in found.scores} == {"CLIP-T", "CLIP-I"} and "both" in found.notes[0]


@pytest.mark.parametrize(
    ("generated", "references", "prompts", "message"),
    [
        ([], 1, ["a ball"], "no generated pictures"),
        (1, [], ["a ball"], "no references"),
        (2, 1, ["a ball"] * 3, "3 prompts for 2 pictures"),
        (1, 1, [" "], "none of them empty"),
        (1, 1, [], "0 prompts"),
    ],
)
def test_what_is_missing_is_said(toybox, generated, references, prompts, message):
    sets = [Pictures([torch.rand(SIZE, SIZE, 3)] * n if isinstance(n, int) else n) for n in (generated, references)]
    with pytest.raises(MetricError, match=message):
        concept_scores(*sets, prompts, [toybox])


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        ([torch.rand(8, 8, 3)] * 2, [torch.ones(8, 8)], "1 masks for 2 pictures"),
        ([torch.rand(8, 8, 4)], None, "without an alpha channel"),
        ([torch.rand(8, 8, 3), torch.full((8, 8, 3), math.nan)], None, "picture 2: .*not finite"),
    ],
)
def test_pictures_that_are_none(images, masks, message):
    with pytest.raises(MetricError, match=message):
        Pictures(images, masks)
