"""A file's bytes as a square: as the references of a concept are framed, and within the same bounds."""

import numpy as np
import pytest
import torch
from PIL import Image

from profusion.decoding import PictureError
from profusion.pictures import read_picture
from profusion.pretraining.order import generator_of
from profusion.pretraining.squares import Framing, StreamError, square
from profusion.references import Shown, framed
from tests.pretraining.examples import bomb, broken, coded, picture


@pytest.mark.parametrize("size", [(40, 40), (57, 40), (40, 91), (64, 48)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_it_is_what_a_reference_becomes(tmp_path, size, kind):
    data = coded(picture(3, size), kind)
    (tmp_path / "a").write_bytes(data)
    expected = framed([Shown(*read_picture(tmp_path / "a"))], 32).pictures[0]
    assert torch.equal(square(data, "a", Framing(32)), (expected * 255).round().byte())


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_one_that_is_much_too_large_looks_the_same(kind):
    large = Image.effect_noise((40, 30), 90).resize((1100, 820), Image.Resampling.BICUBIC).convert("RGB")
    exact = large.crop((140, 0, 960, 820)).resize((64, 64), Image.Resampling.LANCZOS)
    difference = square(coded(large, kind), "a", Framing(64)).float() - torch.from_numpy(np.array(exact)).float()
    assert difference.abs().mean() < 1.0 and difference.abs().max() < 8  # of 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_as_its_camera_says(orientation):
    shown = picture(5, (30, 20))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # transpositions by which the file has it
    stored = shown if orientation == 1 else shown.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = square(coded(stored, "PNG", exif=exif), "a", Framing(16))
    assert torch.equal(found, square(coded(shown), "a", Framing(16)))


def test_what_is_transparent_is_grey():
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    half.paste((0, 255, 0, 0), (8, 0, 16, 16))
    found = square(coded(half), "a", Framing(16))
    assert found[:, :8].unique(dim=1).tolist()[0] == [[255, 0, 0]] and (found[:, 8:] == 128).all()


@pytest.mark.parametrize(
    "mode, kind, options",
    [
        ("L", "PNG", {}),
        ("1", "PNG", {}),
        ("I;16", "PNG", {}),
        ("P", "GIF", {}),
        ("P", "PNG", {"transparency": 3}),
        ("LA", "PNG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "TIFF", {}),
        ("RGB", "BMP", {}),
        ("RGB", "AVIF", {}),
    ],
)
def test_every_kind_that_is_read(mode, kind, options):
    if kind not in set(Image.registered_extensions().values()):
        pytest.skip(f"the library reads no {kind} here")
    grey = picture(4, (40, 30)).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        image = grey.convert("RGB").convert(mode)
    found = square(coded(image, kind, **options), "a", Framing(24))
    assert found.shape == (24, 24, 3) and found.dtype == torch.uint8
    if mode in ("L", "I;16", "LA"):
        assert torch.equal(found, square(coded(grey), "a", Framing(24)))


def test_the_first_frame_of_a_moving_one():
    frames = [picture(number, (20, 20)) for number in (1, 9)]
    moving = coded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert torch.equal(square(moving, "a", Framing(20)), square(coded(frames[0]), "a", Framing(20)))


def test_a_random_part_is_drawn_by_its_generator():
    data = coded(picture(6, (90, 30)))
    drawn = [square(data, "a", Framing(30, "random"), generator_of(2, seed)) for seed in range(20)]
    whole = np.asarray(picture(6, (90, 30)))
    lefts = [next(at for at in range(61) if (whole[:, at : at + 30] == one.numpy()).all()) for one in drawn]
    assert min(lefts) < 15 and max(lefts) > 45
    assert torch.equal(drawn[3], square(data, "a", Framing(30, "random"), generator_of(2, 3)))


@pytest.mark.parametrize(
    "name, words",
    [
        ("cut", "cannot be read as a picture: image file is truncated"),
        ("text", "cannot be read as a picture"),
        ("empty", "cannot be read as a picture"),
        ("bomb", "is too large: it has hundreds of megapixels"),
        ("large", "is too large: it has 81 megapixels, and a PNG file may have 19"),
        ("tiny", "is too small: it has 3x3 pixels"),
        ("clear", "is wholly transparent"),
    ],
)
def test_one_of_no_use_is_named(name, words):
    with pytest.raises(PictureError, match=f"^a/b.jpg {words}"):
        square(broken()[name], "a/b.jpg", Framing(16))


def test_a_bomb_is_small():
    assert len(bomb()) < 200


def test_options_that_cannot_be():
    with pytest.raises(StreamError, match="crop='middle' is none of center, random"):
        Framing(64, "middle")
    with pytest.raises(StreamError, match="size=4 must be at least 8 pixels"):
        Framing(4)
