"""The toybox world: determinism, masks, captions, and what training never sees."""

import numpy as np
import pytest

from profusion.toybox import drawing, world
from profusion.toybox.drawing import SIZE

PALETTE = np.array(list(world.PALETTE.values()))


def generator(seed=0):
    return np.random.default_rng(seed)


def single(noun, appearance=None, background="grass", **options):
    item = world.SceneObject(noun, appearance, (64.0, 67.0), 80.0, **options)
    return world.Scene((item,), background)


def palette_look(pattern="plain", first="red", second=None):
    second_color = None if second is None else world.PALETTE[second]
    return world.Appearance(pattern, world.PALETTE[first], second_color, first, second)


def any_look(noun):
    return None if noun in world.FIXED_NOUNS else palette_look("striped", "blue", "white")


def test_the_same_generator_draws_the_same_world():
    def draw(seed):
        rng = generator(seed)
        scenes = [world.sample_scene(rng) for _ in range(6)]
        return scenes, [world.render(scene).image for scene in scenes], [world.caption(s, rng) for s in scenes]

    first, second, other = draw(3), draw(3), draw(4)
    assert first[0] == second[0] and first[2] == second[2]
    assert all((a == b).all() for a, b in zip(first[1], second[1], strict=True))
    assert first[0] != other[0]


@pytest.mark.parametrize("noun", world.NOUNS)
def test_masks_hold_the_object_and_nothing_else(noun):
    rng = generator(1)
    for diameter, angle, flip in ((58.0, 0.0, False), (80.0, 10.0, True)):
        item = world.SceneObject(noun, any_look(noun), (64.0, 67.0), diameter, angle, flip)
        picture = world.render(world.Scene((item,), "sea"))
        assert picture.image.shape == (SIZE, SIZE, 3) and picture.image.dtype == np.uint8
        assert picture.masks.shape == picture.bodies.shape == (1, SIZE, SIZE)
        rows, columns = np.nonzero(picture.masks[0] > 127)
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == pytest.approx(diameter, abs=2.5)
        assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(67, abs=1.5)
        assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(64, abs=1.5)
        assert (picture.bodies <= picture.masks).all()
        assert (picture.bodies > 127).sum() > 0.25 * (picture.masks > 127).sum()
    bald = world.render(world.Scene((item,), "sea", seed=int(rng.integers(99))))
    inside = picture.masks[0] == 255
    assert (bald.image[inside] == picture.image[inside]).all()


def test_the_body_is_what_the_appearance_changes():
    for noun in world.GENERIC_NOUNS:
        red, blue = (world.render(single(noun, palette_look(first=name))) for name in ("red", "blue"))
        changed = (red.image != blue.image).any(axis=-1)
        assert not changed[red.bodies[0] == 0].any()
        assert changed[red.bodies[0] == 255].all()


def test_objects_of_a_pair_are_apart_and_left_comes_first():
    rng, pairs = generator(2), 0
    for _ in range(400):
        scene = world.sample_scene(rng)
        low, high = world.SINGLE_DIAMETERS if len(scene.objects) == 1 else world.PAIR_DIAMETERS
        assert all(low <= item.diameter <= high for item in scene.objects)
        if len(scene.objects) == 2:
            pairs += 1
            left, right = scene.objects
            assert left.noun != right.noun and left.center[0] < right.center[0]
            masks = world.render(scene).masks > 127
            assert not (masks[0] & masks[1]).any()
    assert 60 < pairs < 140


def test_caption_indices_point_at_their_words():
    rng, openings = generator(3), set()
    for _ in range(600):
        scene = world.sample_scene(rng)
        found = world.caption(scene, rng)
        words = found.text.split()
        openings.add(" ".join(words[:3]))
        assert [words[i] for i in found.noun_words] == [item.noun for item in scene.objects]
        for item, noun, attributes in zip(scene.objects, found.noun_words, found.attribute_words, strict=True):
            look = item.appearance
            known = set() if look is None else {look.name1, look.name2, look.pattern} - {None, "plain"}
            assert {words[i] for i in attributes} <= known
            assert all(i < noun for i in attributes)
            others = {words[i] for i in range(len(words))} & known
            assert others or not attributes
        phrase = world.BACKGROUND_PHRASES[scene.background]
        named = [words[i] for i in found.background_words]
        assert bool(named) == found.text.endswith(phrase) and all(word in phrase.split() for word in named)
    assert len(openings) > 2


def test_captions_leave_things_out():
    rng = generator(4)
    scenes = [world.sample_scene(rng) for _ in range(2000)]
    captions = [world.caption(scene, rng) for scene in scenes]
    generic = [
        not words
        for scene, found in zip(scenes, captions, strict=True)
        for item, words in zip(scene.objects, found.attribute_words, strict=True)
        if item.appearance is not None
    ]
    assert 0.3 < np.mean(generic) < 0.5
    assert 0.1 < np.mean([not found.background_words for found in captions]) < 0.2


def test_full_and_bare_captions():
    scene = single("ball", palette_look("striped", "red", "white"))
    assert world.full_caption(scene) == world.Caption(
        "a photo of a red and white striped ball on grass", (8,), ((4, 6, 7),), (10,)
    )
    assert world.bare_caption(scene).text == "a photo of a ball on grass"
    assert world.bare_caption(scene, background=False).text == "a photo of a ball"
    left = world.SceneObject("lemon", None, (32, 68), 58)
    right = world.SceneObject("fish", palette_look(first="orange"), (96, 68), 58)
    both = world.full_caption(world.Scene((left, right), "wall"))
    assert both.text == "a photo of a lemon and an orange fish by a brick wall"
    assert (both.noun_words, both.attribute_words, both.background_words) == ((4, 8), ((), (7,)), (11, 12))


def test_a_pattern_is_coarse_enough_for_an_eightfold_autoencoder():
    for diameter in (world.PAIR_DIAMETERS[0], world.SINGLE_DIAMETERS[1]):
        sheet = drawing.fill("striped", (0, 0, 0), (255, 255, 255), (SIZE / 2, SIZE / 2), diameter)[0, :, 0] > 127
        edges = np.nonzero(sheet[1:] != sheet[:-1])[0]
        assert 2 * np.diff(edges).mean() >= 2.4 * 8  # a period has two edges


@pytest.mark.parametrize("name", drawing.BACKGROUNDS)
def test_a_place_looks_another_for_every_seed(name):
    pictures = [drawing.draw_background(name, seed) for seed in range(8)]
    assert (drawing.draw_background(name, 0) == pictures[0]).all()
    changes = [np.abs(a - b).mean() / 255 for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(changes) > 0.015 and np.mean(changes) > 0.03


def nearest_color(pixels, colors):
    """For RGB pixels (..., 3), the index of the nearest of `colors` (n, 3); all 0..255.

    Half of any difference in brightness is forgiven, because objects are shaded.
    """
    difference = np.asarray(pixels, np.float32)[..., None, :] - np.asarray(colors, np.float32)
    brightness = difference.mean(axis=-1, keepdims=True)
    return ((difference - 0.5 * brightness) ** 2).sum(axis=-1).argmin(axis=-1)


@pytest.mark.parametrize("first", world.PALETTE)
def test_palette_colours_can_be_counted(first):
    names = list(world.PALETTE)
    second = names[(names.index(first) + 3) % len(names)]
    for noun in world.GENERIC_NOUNS:
        plain = world.render(single(noun, palette_look(first=first), "night"))
        seen = nearest_color(plain.image[plain.bodies[0] == 255], PALETTE)
        assert (seen == names.index(first)).mean() > 0.93, noun
        striped = world.render(single(noun, palette_look("striped", first, second), "snow"))
        seen = nearest_color(striped.image[striped.bodies[0] == 255], PALETTE)
        shares = np.bincount(seen, minlength=len(names)) / len(seen)
        assert {names[i] for i in np.argsort(shares)[-2:]} == {first, second}, noun
        assert shares[[names.index(first), names.index(second)]].min() > 0.25, noun


def test_held_out_combinations_are_never_sampled():
    rng = generator(5)
    free = [world.sample_scene(rng, hold_out=False) for _ in range(3000)]
    nameable = [s for s in free if len(s.objects) == 1 and s.objects[0].appearance and s.objects[0].appearance.named]
    assert 0.05 < np.mean([world.is_held_out(scene) for scene in nameable]) < 0.11
    assert not any(world.is_held_out(world.sample_scene(rng)) for _ in range(3000))
    prompts = world.unseen_prompts(20, rng)
    assert len(prompts) == 20
    for scene, found in prompts:
        assert world.is_held_out(scene) and found == world.full_caption(scene)


def test_concepts_are_never_sampled():
    rng = generator(6)
    for _ in range(5000):
        look = world.sample_appearance(rng)
        assert look.color2 is None or not world.near_concept(look.color1, look.color2)
    colors = list(world.PALETTE.values())
    assert not any(world.near_concept(a, b) for a in colors for b in colors)
    for noun, look in world.CONCEPTS.values():
        assert noun in world.GENERIC_NOUNS and look.name1 is None and look.name2 is None
        assert world.near_concept(look.color1, look.color2) and world.near_concept(look.color2, look.color1)


def test_concept_pictures_show_one_object_on_many_backgrounds():
    name = next(iter(world.CONCEPTS))
    pictures = world.concept_pictures(name, 8, generator(7))
    assert len(pictures) == 8 and len({p.scene.background for p in pictures[:6]}) == 6
    assert {(p.scene.objects[0].noun, p.scene.objects[0].appearance) for p in pictures} == {world.concept(name)}
    assert world.concept_pictures(name, 0, generator()) == []
    with pytest.raises(ValueError, match="no concept 'sock'"):
        world.concept("sock")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: world.Appearance("zigzag", (1, 2, 3)), "pattern is 'zigzag'"),
        (lambda: world.Appearance("plain", (1, 2, 3), (4, 5, 6)), "color2 must be None"),
        (lambda: world.Appearance("striped", (1, 2, 3)), "color2 must be None"),
        (lambda: world.Appearance("plain", (1, 2, 300)), "three numbers 0..255"),
        (lambda: world.Appearance("plain", (1, 2, 3), name1="red"), "does not stand for"),
        (lambda: world.SceneObject("sock", None, (48, 48), 60), "noun is 'sock'"),
        (lambda: world.SceneObject("lemon", palette_look(), (48, 48), 60), "lemon has its own appearance"),
        (lambda: world.SceneObject("ball", None, (48, 48), 60), "ball needs an appearance"),
        (lambda: world.SceneObject("lemon", None, (48, 48), 600), "diameter is 600"),
        (lambda: world.Scene((), "grass"), "one or two objects"),
        (lambda: single("lemon", background="mars"), "background is 'mars'"),
        (lambda: world.Scene(single("lemon").objects * 2, "grass"), "left object must come first"),
    ],
)
def test_impossible_worlds_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
