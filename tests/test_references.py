"""Pictures as people have them: lists and batches, mixed sizes, masks alike, and masks that are the wrong way round."""

import pytest
import torch
from PIL import Image

from profusion.pictures import from_image, to_image
from profusion.references import NATIVE, PictureError, check_not_inverted, concept_pictures, framed, gather, together
from profusion.toybox.drawing import SIZE


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def square(height, width, top, left, side):
    """A mask (height, width) with a white square in it."""
    mask = torch.zeros(height, width)
    mask[top : top + side, left : left + side] = 1
    return mask


def test_toyboxs_own_size_is_that_of_its_drawings():
    assert NATIVE["Toybox"] == SIZE


def test_a_list_of_one_size_is_the_batch():
    images, masks = noise(3, 50, 40, 3), noise(3, 50, 40, seed=1)
    whole = concept_pictures(images, masks, native=48)
    parts = concept_pictures([images[:1], images[1:]], [masks[:2], masks[2]], native=48)
    assert torch.equal(whole.pictures, parts.pictures) and torch.equal(whole.masks, parts.masks)
    assert whole.note == parts.note
    assert torch.equal(whole.pictures, images[:, 1:49]) and torch.equal(whole.masks, masks[:, 1:49])


def test_pictures_of_other_channels_are_one_set():
    grey, alpha = noise(1, 16, 16, 1), noise(1, 16, 16, 4, seed=1)
    pictures, masks, _ = concept_pictures([grey, noise(16, 16, 3, seed=2), alpha])
    assert pictures.shape == (3, 16, 16, 3)
    assert torch.equal(masks[2], alpha[0, ..., 3]) and masks[:2].min() == 1
    assert torch.equal(pictures[0], grey[0].expand(-1, -1, 3))


@pytest.mark.parametrize(
    ("sizes", "native", "expected"),
    [
        ([(96, 96), (96, 120)], 96, (88, 104)),
        ([(600, 800), (800, 600)], 512, (512, 512)),
        ([(4032, 3024), (1200, 900), (640, 480)], 512, (592, 440)),
        ([(64, 64), (128, 128)], None, (64, 64)),
        ([(8, 8), (8, 2000)], 64, (16, 256)),
    ],
)
def test_mixed_sizes_become_the_mean_of_their_proportions_at_the_models_own_area(sizes, native, expected):
    pictures, masks, note = concept_pictures([noise(1, *size, 3) for size in sizes], native=native)
    assert pictures.shape == (len(sizes), *expected, 3) and masks.shape == (len(sizes), *expected)
    assert pictures.min() >= 0 and pictures.max() <= 1 and masks.min() == 1
    assert note.startswith(f"{len(sizes)} pictures of {expected[1]}x{expected[0]} pixels, cropped and resized from ")
    assert f"{sizes[0][1]}x{sizes[0][0]}" in note


def test_what_is_done_is_said_with_the_models_own_size():
    assert concept_pictures(noise(2, 96, 96, 3), native=96).note == "2 pictures of 96x96 pixels"
    assert concept_pictures(noise(1, 100, 90, 3)).note == "1 picture of 88x96 pixels, cropped from 90x100"
    note = concept_pictures(noise(2, 192, 192, 3), native=96).note
    assert note.startswith("2 pictures of 192x192 pixels. The model's own size is 96x96 pixels: resize")
    many = concept_pictures([noise(1, 96, 96 + index, 3) for index in range(9)], native=96).note
    assert "from 96x96, 97x96, 98x96, 99x96 and 5 other sizes" in many


@pytest.mark.parametrize(
    ("count", "size", "native", "expected"),
    [(1, (2000, 3000), 512, (416, 624)), (2, (384, 384), 96, (96, 96)), (1, (1032, 1024), 512, (512, 512))],
)
def test_a_camera_s_photo_alone_is_brought_to_the_models_own_area(count, size, native, expected):
    """At its own size its training ran out of memory."""
    pictures, masks, note = concept_pictures(noise(count, *size, 3), torch.ones(1, *size), native=native)
    assert pictures.shape == (count, *expected, 3) and masks.shape == (count, *expected) and masks.min() == 1
    assert f"of {expected[1]}x{expected[0]} pixels, cropped and resized from {size[1]}x{size[0]}. More than 4" in note
    assert f"the model's own {native}x{native} pixels" in note


def test_masks_that_nothing_is_learned_from_are_named_by_their_input():
    """Concept Scores has two inputs of masks."""
    around = torch.ones(1, 32, 32)
    around[:, 8:24, 8:24] = 0
    with pytest.raises(PictureError, match="mask 2 of reference_masks is white all around") as problem:
        gather(noise(2, 32, 32, 3), [1 - around, around], "reference_masks")
    assert "learned" not in str(problem.value) and "seems to be inverted. Load Image" in str(problem.value)
    with pytest.raises(PictureError, match="mask 1 of masks is all black. Paint") as problem:
        gather(noise(1, 32, 32, 3), torch.zeros(1, 32, 32), "masks")
    assert "learned" not in str(problem.value)
    with pytest.raises(PictureError, match="mask 1 is white all around.*would be learned"):
        gather(noise(1, 32, 32, 3), around)


def test_up_to_four_times_the_models_own_area_and_without_one_pictures_keep_their_size():
    assert concept_pictures(noise(1, 1024, 1024, 3), native=512).pictures.shape == (1, 1024, 1024, 3)
    assert concept_pictures(noise(1, 1600, 1600, 3)).pictures.shape == (1, 1600, 1600, 3)


def test_a_mask_goes_where_its_picture_goes():
    """A white square on black, and its mask: after cropping and resizing one is still the other."""
    masks = [square(100, 300, 30, 220, 50), square(128, 128, 8, 8, 64)]
    images = [mask[None, ..., None].expand(-1, -1, -1, 3) for mask in masks]
    pictures, weights, _ = concept_pictures(images, masks, native=128)
    assert pictures.shape[1] < pictures.shape[2]
    assert (pictures[..., 0] - weights).abs().mean() < 0.02
    assert (weights > 0.99).sum(dim=(1, 2)).min() > 500


def test_the_crop_has_the_object_in_its_middle_and_stays_inside():
    one = gather(noise(1, 100, 300, 3), square(100, 300, 30, 220, 40))
    picture, mask, note = framed(one, 100)
    assert torch.equal(picture[0], one[0].colours[:, 190:290]) and mask.sum() == 1600
    assert note == "1 picture of 100x100 pixels, cropped and resized from 300x100"
    at_the_edge = gather(noise(1, 100, 300, 3), square(100, 300, 0, 290, 10))
    assert torch.equal(framed(at_the_edge, 100).pictures[0], at_the_edge[0].colours[:, 200:])


def ends(height, width, *sides):
    """A mask (height, width) that is white at both ends, as far as these."""
    mask = torch.zeros(height, width)
    mask[:, : sides[0]] = mask[:, width - sides[-1] :] = 1
    return mask


@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("sides", [(40, 40), (30, 50)], ids=str)
def test_the_crop_falls_on_an_object_and_never_between_two(turned, sides):
    """Their middle is where nothing is."""
    picture, mask = noise(96, 400, 3), ends(96, 400, *sides)
    if turned:
        picture, mask = picture.transpose(0, 1), mask.T
    fitted = framed(gather(picture, mask), 96)
    assert fitted.masks.sum() == 96 * max(sides)
    kept = {40: 50, 50: 62}[max(sides)]
    assert fitted.note.endswith(f". Of its object picture 1 keeps {kept}%: crop it yourself to show more"), fitted.note
    whole = torch.cat([picture, mask[..., None]], -1)
    assert torch.equal(framed(gather(whole), 96).masks, fitted.masks)


def test_which_of_several_pictures_loses_its_object_is_said():
    images = [noise(96, 400, 3), noise(400, 96, 3)]
    fitted = concept_pictures(images, [ends(96, 400, 40), torch.ones(400, 96)], native=96)
    assert fitted.masks[0].any() and "Of its object picture 1 keeps 50%" in fitted.note
    assert "picture 2" not in fitted.note  # it has no mask: what its object is nobody said
    assert concept_pictures(images, native=96).note.endswith("cropped and resized from 400x96, 96x400")


def test_many_that_lose_their_objects_are_not_all_listed():
    note = framed(gather(noise(7, 96, 400, 3), ends(96, 400, 40)), 96).note
    assert note.endswith("picture 4 keeps 50%, and 3 more lose as much: crop it yourself to show more")
    named = framed(iter(gather(noise(2, 96, 400, 3), ends(96, 400, 40))), 96, ("a.png", "b.png")).note
    assert ". Of its object a.png keeps 50%, b.png keeps 50%: crop" in named


def test_an_object_at_the_edge_is_not_trimmed_away():
    mask = torch.zeros(96, 103)
    mask[:, :3] = 1
    one = concept_pictures(noise(96, 103, 3), mask)
    assert one.masks.sum() == mask.sum() and one.note == "1 picture of 96x96 pixels, cropped from 103x96"


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (50, 70)])
def test_without_a_mask_a_frame_is_the_authors_crop_and_lanczos(size):
    picture = noise(*size, 3).mul(255).round() / 255
    high, wide = size
    crop = min(size)
    box = ((wide - crop) // 2, (high - crop) // 2, (wide + crop) // 2, (high + crop) // 2)
    theirs = from_image(to_image(picture).crop(box).resize((96, 96), Image.Resampling.LANCZOS))
    ours = framed(gather(picture), 96).pictures[0]
    assert torch.equal(ours, theirs)


def test_a_frame_of_the_right_size_is_the_picture():
    images = noise(2, 96, 96, 3)
    fitted = framed(gather(images), 96)
    assert torch.equal(fitted.pictures, images) and fitted.note == "2 pictures of 96x96 pixels"


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([noise(16, 16)] * 2, "2 masks for 3 pictures"),
        ([noise(2, 16, 16), noise(2, 16, 16)], "4 masks for 3 pictures"),
        ([noise(16, 32)], "a mask of 32x16 pixels does not fit pictures of 16x16"),
        ([noise(16, 16), torch.zeros(16, 16), noise(16, 16)], "mask 2 is all black"),
    ],
)
def test_masks_that_do_not_go_with_the_pictures_are_named(masks, message):
    with pytest.raises(PictureError, match=message):
        concept_pictures([noise(1, 16, 16, 3)] * 2 + [noise(1, 16, 32, 3)], masks)


def test_one_mask_serves_a_list_of_its_proportions():
    mask = square(32, 32, 8, 8, 16)
    _, weights, _ = concept_pictures([noise(1, 64, 64, 3), noise(1, 32, 32, 3)], mask, native=64)
    assert (weights[:, 20:44, 20:44] > 0.99).all() and (weights[:, :12] < 0.01).all()


def test_nothing_at_all_is_named():
    with pytest.raises(PictureError, match="no pictures"):
        gather([])
    with pytest.raises(PictureError, match="give some that show anything"):
        gather(torch.zeros(1, 0, 5, 3))
    with pytest.raises(PictureError, match="5x5 pixels are too small"):
        together(gather([noise(1, 5, 5, 3), noise(1, 64, 64, 3)]), 8)


# Masks that are the wrong way round

BUST = 1 - torch.cat([square(60, 60, 20, 15, 30), torch.zeros(0, 60)])
BUST[45:, 20:40] = 0  # which leaves the picture below


@pytest.mark.parametrize("mask", [1 - square(60, 60, 20, 20, 20), BUST], ids=["cut-out", "bust"])
def test_an_inverted_cut_out_is_asked_about(mask):
    with pytest.raises(PictureError, match="mask 1 is white all around and black inside.*Invert Mask"):
        concept_pictures(noise(1, 60, 60, 3), mask)
    with pytest.raises(PictureError, match="picture 2 is opaque all around and transparent inside, so"):
        concept_pictures([noise(60, 60, 3), torch.cat([noise(60, 60, 3), mask[..., None]], -1)])
    concept_pictures(noise(1, 60, 60, 3), 1 - mask)


def test_what_is_no_cut_out_is_not_asked_about():
    full, speck, corner = torch.ones(60, 60), torch.ones(60, 60), 1 - square(60, 60, 20, 20, 20)
    speck[30:34, 30:34] = 0
    corner[0, 0] = 0  # what the message says to do
    tall = torch.zeros(60, 60)
    tall[:, 10:50] = 1
    for mask in (full, speck, corner, tall, square(60, 60, 0, 0, 59), square(60, 60, 20, 20, 20)):
        check_not_inverted(mask, "mask 1", "")
