"""Likeness of appearances and change of backgrounds, on drawn pictures."""

import numpy as np
import pytest
import torch

from profusion.toybox import world
from profusion.toybox.drawing import SIZE
from profusion.toybox.similarity import background_change, concept_similarity, grown, oklab


def tensors(pictures):
    images = torch.from_numpy(np.stack([picture.image for picture in pictures])).float() / 255
    return images, torch.from_numpy(np.stack([picture.bodies[0] for picture in pictures])).float() / 255


def wearing(noun, appearance, background="sea", seed=5):
    item = world.SceneObject(noun, appearance, (62.0, 68.0), 80.0, angle=3.0)
    return tensors([world.render(world.Scene((item,), background, seed))])


def test_oklab_knows_white_grey_and_red():
    lab = oklab(torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [1.0, 0.0, 0.0]]))
    assert torch.allclose(lab[0], torch.tensor([1.0, 0.0, 0.0]), atol=1e-3)
    assert lab[1, 1:].abs().max() < 1e-3
    assert torch.allclose(lab[2], torch.tensor([0.628, 0.225, 0.126]), atol=2e-3)


@pytest.mark.parametrize("name", list(world.CONCEPTS))
def test_a_concept_is_like_itself_elsewhere_and_unlike_every_other(name):
    references = tensors(world.concept_pictures(name, 3, np.random.default_rng(1)))
    same = concept_similarity(*tensors(world.concept_pictures(name, 2, np.random.default_rng(2))), *references)
    others = [other for other in world.CONCEPTS if other != name]
    pictures = [world.concept_pictures(other, 1, np.random.default_rng(3))[0] for other in others]
    assert same.min() > 0.95
    assert concept_similarity(*tensors(pictures), *references).max() < 0.6


@pytest.mark.parametrize("pattern", world.PATTERNS[1:])
def test_the_same_colors_in_another_pattern_are_less_alike(pattern):
    noun, (first, second) = "ball", ((0, 140, 140), (255, 120, 96))
    references = wearing(noun, world.Appearance(pattern, first, second), "grass", 1)
    scores = {
        other: concept_similarity(*wearing(noun, world.Appearance(other, first, second)), *references).item()
        for other in world.PATTERNS[1:]
    }
    scores["plain"] = concept_similarity(*wearing(noun, world.Appearance("plain", first)), *references).item()
    assert scores.pop(pattern) > 0.95
    assert max(scores.values()) < 0.85


def test_blur_costs_little():
    pictures, masks = tensors(world.concept_pictures("teal and coral ball", 2, np.random.default_rng(4)))
    small = torch.nn.functional.interpolate(pictures.movedim(-1, 1), size=SIZE // 3, mode="area")
    blurred = torch.nn.functional.interpolate(small, size=SIZE, mode="bilinear").movedim(1, -1)
    assert concept_similarity(blurred, masks, pictures, masks).min() > 0.85


def test_no_object_is_not_alike_and_no_reference_is_an_error():
    pictures, masks = tensors(world.concept_pictures("teal and coral ball", 2, np.random.default_rng(4)))
    assert concept_similarity(pictures, 0 * masks, pictures, masks).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="reference masks"):
        concept_similarity(pictures, masks, pictures, 0 * masks)
    with pytest.raises(ValueError, match="make them one size"):
        concept_similarity(pictures, masks, pictures[:, :48], masks[:, :48])


def test_background_change_counts_only_outside_the_grown_masks():
    plain, masks = torch.zeros(2, 32, 32, 3), torch.zeros(2, 32, 32)
    masks[:, 8:16, 8:16] = 1
    changed = plain.clone()
    changed[0][grown(masks, 4)[0] > 0] = 1.0
    changed[1] = 0.25
    assert background_change(changed, plain, masks).tolist() == [0.0, 0.25]
    assert background_change(changed, plain, torch.ones_like(masks)).tolist() == [0.0, 0.0]
