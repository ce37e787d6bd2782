"""The shipped judge on drawn pictures that its training did not see, and its interface."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from profusion.toybox import world
from profusion.toybox.drawing import SIZE
from profusion.toybox.judge import Judge, JudgeError, JudgeNetwork, halves, whole
from profusion.toybox.pipeline import save_network, weight_file


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


def drawn(count, objects=1, seed=99):
    rng, pictures = np.random.default_rng((77, seed)), []
    while len(pictures) < count:
        scene = world.sample_scene(rng, hold_out=False)
        if len(scene.objects) == objects:
            pictures.append(world.render(scene))
    return torch.from_numpy(np.stack([picture.image for picture in pictures])).float() / 255, pictures


def share_right(said, true):
    return float(np.mean([a == b for a, b in zip(said, true, strict=True)]))


def overlap(found, drawn_masks):
    found, true = found > 0.5, torch.from_numpy(np.stack(drawn_masks)) > 127
    return ((found & true).sum(dim=(1, 2)) / (found | true).sum(dim=(1, 2))).mean().item()


def test_single_objects(judge):
    images, pictures = drawn(200)
    verdict, scenes = judge.look(images), [picture.scene for picture in pictures]
    generic = [i for i, scene in enumerate(scenes) if scene.objects[0].appearance is not None]
    assert share_right(verdict.nouns, [scene.objects[0].noun for scene in scenes]) >= 0.97
    assert share_right(verdict.backgrounds, [scene.background for scene in scenes]) >= 0.97
    patterns = [scenes[i].objects[0].appearance.pattern for i in generic]
    assert share_right([verdict.patterns[i] for i in generic], patterns) >= 0.95
    assert overlap(verdict.object_mask, [picture.masks[0] for picture in pictures]) >= 0.92
    assert overlap(verdict.body_mask, [picture.bodies[0] for picture in pictures]) >= 0.88


def test_moved_and_resized_objects(judge):
    rng, pictures, nouns = np.random.default_rng(5), [], []
    for noun in world.NOUNS * 8:
        look = None if noun in world.FIXED_NOUNS else world.sample_appearance(rng)
        center = tuple(SIZE / 2 + rng.uniform(-12, 12, 2))
        item = world.SceneObject(noun, look, center, rng.uniform(64, 96), rng.uniform(-4, 4))
        pictures.append(world.render(world.Scene((item,), str(rng.choice(world.BACKGROUNDS)), int(rng.integers(99)))))
        nouns.append(noun)
    images = torch.from_numpy(np.stack([picture.image for picture in pictures])).float() / 255
    assert share_right(judge.nouns(images), nouns) >= 0.97
    assert share_right(judge.backgrounds(images), [picture.scene.background for picture in pictures]) >= 0.97


def test_concepts_keep_their_nouns(judge):
    pictures = [
        picture for name in world.CONCEPTS for picture in world.concept_pictures(name, 3, np.random.default_rng(0))
    ]
    images = torch.from_numpy(np.stack([picture.image for picture in pictures])).float() / 255
    assert share_right(judge.nouns(images), [picture.scene.objects[0].noun for picture in pictures]) >= 0.96


def test_two_objects_are_judged_by_halves(judge):
    images, pictures = drawn(60, objects=2)
    nouns = [picture.scene.objects[side].noun for side in (0, 1) for picture in pictures]
    assert share_right(judge.nouns(halves(images)), nouns) >= 0.97
    assert overlap(judge.object_mask(images), [picture.masks.max(axis=0) for picture in pictures]) >= 0.88


def test_blurred_pictures_are_judged_as_sharp_ones(judge):
    images, pictures = drawn(100, seed=3)
    small = torch.nn.functional.interpolate(images.movedim(-1, 1), size=37, mode="bilinear", antialias=True)
    blurred = torch.nn.functional.interpolate(small, size=SIZE, mode="bicubic").clamp(0, 1).movedim(1, -1)
    assert share_right(judge.nouns(blurred), [picture.scene.objects[0].noun for picture in pictures]) >= 0.95


def test_halves_repeat_their_edges():
    columns, quarter, half = torch.arange(float(SIZE)).expand(1, SIZE, SIZE), SIZE // 4, SIZE // 2
    left, right = (part[0].tolist() for part in halves(columns))
    assert left == [0.0] * quarter + list(range(half)) + [half - 1.0] * quarter
    assert right == [half] * quarter + list(range(half, SIZE)) + [SIZE - 1.0] * quarter
    assert torch.equal(whole(*halves(columns).chunk(2)), columns)


def test_a_batch_is_judged_as_its_pictures_are(judge):
    images, _ = drawn(3)
    together, alone = judge.look(images), judge.look(images[1:2])
    assert torch.allclose(together.noun_probabilities[1:2], alone.noun_probabilities, atol=1e-5)
    assert together.object_mask.shape == (3, SIZE, SIZE)


@pytest.mark.parametrize(
    "pictures",
    [
        torch.zeros(2, 3, SIZE, SIZE),
        torch.zeros(SIZE, SIZE, 3),
        torch.zeros(0, SIZE, SIZE, 3),
        torch.full((1, SIZE, SIZE, 3), 255.0),
        torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8),
        torch.full((1, SIZE, SIZE, 3), float("nan")),
    ],
)
def test_what_is_no_batch_of_pictures_is_refused(judge, pictures):
    with pytest.raises(JudgeError):
        judge.look(pictures)


def test_the_file_is_small_and_says_what_it_is(tmp_path):
    assert weight_file("judge").stat().st_size <= 700_000
    with safe_open(weight_file("judge"), "pt") as file:
        assert file.metadata() == {"format": "pt", "architecture": "Toybox", "network": "judge"}
    network = JudgeNetwork()
    assert sum(parameter.numel() for parameter in network.parameters()) <= 350_000
    save_network("judge", network, tmp_path)
    again = Judge.load(tmp_path).network.state_dict()
    assert all(torch.equal(again[name], value.half().float()) for name, value in network.state_dict().items())
