"""Reading people's pictures, and drawing grids and plots."""

import os
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from profusion.pictures import (
    PictureError,
    caption,
    captioned,
    from_image,
    grid,
    latent_masks,
    loss_plot,
    masked,
    picture_files,
    picture_paths,
    read_picture,
    read_pictures,
    stacked,
    tiled,
    to_image,
)
from profusion.references import concept_pictures, framed, gather


def test_pictures_are_read_by_name_with_alpha_as_mask(tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "b.jpg")
    half = Image.new("RGBA", (100, 100), (0, 0, 255, 255))
    half.paste((0, 255, 0, 0), (0, 0, 50, 100))
    half.save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    pictures, masks, note = read_pictures(tmp_path, 64)
    assert pictures.shape == (2, 64, 64, 3) and masks.shape == (2, 64, 64)
    assert masks[0, :, :28].max() < 0.01 and masks[0, :, 36:].min() == 1 and masks[1].min() == 1
    assert note == "2 pictures of 64x64 pixels, cropped and resized from 100x100, 300x200"
    assert torch.allclose(pictures[0, 32, 10], torch.tensor(0.5), atol=0.01), "hidden colours must not be learned"


@pytest.mark.parametrize("mode", ["L", "I;16", "P", "1", "CMYK"])
def test_any_kind_of_picture_is_read(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (9, 9)).save(tmp_path / f"x.{suffix}")
    assert read_pictures(tmp_path, 16)[0].shape == (1, 16, 16, 3)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(PictureError, match="no pictures in"):
        read_pictures(tmp_path, 16)
    with pytest.raises(PictureError, match="is not a folder"):
        read_pictures(tmp_path / "nowhere", 16)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but not really")
    with pytest.raises(PictureError, match="broken.png cannot be read"):
        read_pictures(tmp_path, 16)
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "broken.png")
    with pytest.raises(PictureError, match="wholly transparent"):
        read_pictures(tmp_path, 16)


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_is_turned_as_its_camera_says(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    values = np.random.default_rng(0).integers(0, 256, (20, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as file:
        expected = from_image(ImageOps.exif_transpose(file))
    assert torch.equal(read_picture(tmp_path / "a.png")[0], expected)


def test_a_damaged_header_of_a_whole_picture_says_nothing(tmp_path):
    exif = b"Exif\x00\x00II\x00\x00*\x00\x00\x00\x08\x00\x00\x00"
    Image.new("RGB", (12, 9), "red").save(tmp_path / "a.webp", exif=exif, lossless=True)
    with pytest.raises(SyntaxError), Image.open(tmp_path / "a.webp") as file:
        ImageOps.exif_transpose(file)
    assert read_picture(tmp_path / "a.webp")[0].shape == (9, 12, 3)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
def test_a_large_picture_is_the_same_one_smaller(tmp_path, mode):
    small = Image.effect_noise((33, 22), 90).resize((3300, 2200), Image.Resampling.BICUBIC)
    if mode == "RGBA":
        small = Image.merge("RGBA", [small, small.rotate(180), small, Image.new("L", small.size, 200)])
    picture = small.convert("1", dither=0) if mode == "1" else small if mode == "RGBA" else small.convert(mode)
    deep = Image.fromarray(np.asarray(small).astype(np.uint16) * 257) if mode == "I;16" else picture
    deep.save(tmp_path / "a.png")
    values, mask = read_picture(tmp_path / "a.png")
    assert 0.99 * 2**21 < mask.numel() <= 2**21 and abs(values.shape[1] / values.shape[0] - 1.5) < 0.01
    expected = from_image(picture.convert("RGBA").convert("RGB").resize(values.shape[1::-1], Image.Resampling.BOX))
    shown = (values - 0.5 * (1 - mask[..., None])) / mask[..., None]
    assert (shown - expected).abs().mean() < (0.02 if mode == "1" else 0.004)


def test_a_format_that_people_do_not_send_is_not_opened(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.ppm")
    (tmp_path / "a.ppm").rename(tmp_path / "a.png")
    with pytest.raises(PictureError, match="cannot identify"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.jpe", "a.JFIF", "a.apng", "a", "a.jpg~", "a.png.part", "a.tga", "a.ppm"])
def test_what_is_a_picture_is_read_whatever_its_name(tmp_path, name):
    kind = "JPEG" if "j" in name.lower() else "PNG"
    Image.new("RGB", (9, 9), "red").save(tmp_path / name, kind)
    (tmp_path / "notes").write_text("a red thing")
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "empty").write_bytes(b"")
    assert [path.name for path in picture_paths(tmp_path)] == [name]
    assert read_pictures(tmp_path, 16).pictures.shape == (1, 16, 16, 3)


def test_a_camera_s_raw_file_is_not_taken_for_the_small_picture_in_it(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.dng", "TIFF")
    with pytest.raises(PictureError, match="pictures that cannot be read: a.dng"):
        picture_paths(tmp_path)


def test_all_broken_pictures_are_named_at_once(tmp_path):
    for name in ("a.png", "c.jpg", "d.webp"):
        (tmp_path / name).write_bytes(b"broken")
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    with pytest.raises(PictureError) as problem:
        read_pictures(tmp_path, 16)
    assert all(f"{name} cannot be read" in str(problem.value) for name in ("a.png", "c.jpg", "d.webp"))


RAMP = np.linspace(0, 1, 24 * 32).reshape(24, 32)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("a.png", (RAMP * 65535).astype(np.uint16), RAMP),
        ("a.png", (RAMP * 9000).astype(np.uint16), RAMP * 9000 / 65535),
        ("a.tiff", (RAMP * 65535).astype(np.uint16), RAMP),
        ("a.tif", (RAMP * 65535).astype(np.int32), RAMP),
        ("a.tif", np.rint(RAMP * 255).astype(np.int32), RAMP),
        ("a.tif", (RAMP * 2**31 * 0.9).astype(np.int32), RAMP),
        ("a.tiff", RAMP.astype(np.float32), RAMP),
        ("a.tiff", (RAMP * 0.25 - 0.1).astype(np.float32), np.clip(RAMP * 0.25 - 0.1, 0, 1)),
        ("a.tiff", (RAMP * 255).astype(np.float32), RAMP),
        ("a.tiff", (RAMP * 1.0001).astype(np.float32), RAMP),
        ("a.tiff", (RAMP * 2 - 0.5).astype(np.float32), np.clip(RAMP * 2 - 0.5, 0, 1)),
        ("a.tiff", (RAMP * 280).astype(np.float32), np.clip(RAMP * 280 / 255, 0, 1)),
        ("a.tiff", (RAMP * 9000).astype(np.float32), RAMP * 9000 / 65535),
        ("a.tif", np.rint(RAMP * 280).astype(np.int32), RAMP * 280 / 65535),
        ("a.tiff", (RAMP * 1e6).astype(np.float32), RAMP),
        ("a.tiff", np.full((24, 32), -5, np.float32), RAMP * 0),
    ],
    ids=lambda value: f"{value.dtype} to {value.max():.3g}" if isinstance(value, np.ndarray) else value,
)
def test_grey_of_many_bits_is_scaled_by_its_range(tmp_path, name, values, expected):
    Image.fromarray(values).save(tmp_path / name)
    picture, mask = read_picture(tmp_path / name)
    assert mask.min() == 1 and (picture[..., 0] == picture[..., 2]).all()
    assert np.abs(picture[..., 0].numpy() - expected).max() < 0.6 / 255
    assert read_pictures(tmp_path, 16).pictures.shape == (1, 16, 16, 3)


def test_a_float_picture_with_nan_in_it_is_named(tmp_path):
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(PictureError, match="a.tiff is no picture: it has values that are not numbers"):
        read_picture(tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", ["tiff", "gif", "avif", "jfif", "heic"])
def test_formats_that_the_library_reads_are_read(tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("Pillow has no AVIF here")
    if suffix == "heic":
        pytest.importorskip("pillow_heif", reason="pillow-heif is not installed").register_heif_opener()
    picture = Image.new("RGB", (32, 24), (200, 30, 30))
    picture.save(tmp_path / f"a.{suffix}", **({"format": "JPEG"} if suffix == "jfif" else {}))
    colours = read_pictures(tmp_path, 16)[0].mean(dim=(0, 1, 2)) * 255
    assert (colours - torch.tensor([200.0, 30, 30])).abs().max() < 9


def test_hidden_files_are_no_pictures_and_what_cannot_be_read_is_named_one_by_one(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.jpg")
    (tmp_path / "._a.jpg").write_bytes(b"\0\5\x16\7 what macOS leaves")
    (tmp_path / ".hidden.heic").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in picture_paths(tmp_path)] == ["a.jpg"]
    for name in ("x.heic", "y.HEIF", "z.psd", "raw.CR2"):
        (tmp_path / name).write_bytes(b"something")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    monkeypatch.setattr(Image, "EXTENSION", {key: kind for key, kind in Image.EXTENSION.items() if kind != "HEIF"})
    with pytest.raises(PictureError, match="cannot be read: x.heic, y.HEIF, raw.CR2, z.psd. Save them as PNG or JPEG"):
        read_pictures(tmp_path, 16)


@pytest.mark.parametrize("left", [10, 100, 330])
def test_a_folder_is_cropped_around_its_objects_as_a_node_does_it(tmp_path, left):
    """A cut-out of 60 x 60 in a picture of 400 x 100: whole, wherever it is."""
    values = np.full((100, 400, 4), 120, np.uint8)
    values[..., 3] = 0
    values[20:80, left : left + 60, 3] = 255
    Image.fromarray(values).save(tmp_path / "cut.png")
    found, node = read_pictures(tmp_path, 96), framed(gather(torch.from_numpy(values[None]).float() / 255), 96)
    assert abs(float(found.masks.mean()) - 0.36) < 0.002
    assert all(torch.equal(*pair) for pair in zip(found[:2], node[:2], strict=True)) and found.note == node.note


def test_what_a_folder_loses_of_an_object_is_said_by_name(tmp_path):
    values = np.full((96, 400, 4), 120, np.uint8)
    values[:, 40:360, 3] = 0
    Image.fromarray(values).save(tmp_path / "both ends.png")
    Image.new("RGB", (96, 96), "red").save(tmp_path / "whole.png")
    assert read_pictures(tmp_path, 96).note.endswith(
        ". Of its object both ends.png keeps 50%: crop it yourself to show more"
    )


@pytest.mark.parametrize("read", [read_picture, lambda path: read_pictures(path.parent, 32)])
def test_an_inverted_cut_out_is_asked_about(tmp_path, read):
    picture = Image.new("RGBA", (48, 48), (200, 30, 30, 255))
    picture.paste((200, 30, 30, 0), (10, 10, 30, 30))
    picture.save(tmp_path / "a.png")
    with pytest.raises(PictureError, match="a.png is opaque all around and transparent inside, so it seems to be inv"):
        read(tmp_path / "a.png")
    picture.putpixel((0, 0), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 0), (0, 0, 4, 4))
    picture.save(tmp_path / "a.png")
    assert read(tmp_path / "a.png")[1].min() == 0


def test_image_round_trip():
    picture = torch.rand(5, 7, 3)
    assert (from_image(to_image(picture)) - picture).abs().max() <= 0.5 / 255 + 1e-6


def test_latent_masks_are_covered_shares():
    mask = torch.zeros(1, 16, 16)
    mask[:, :8, :4] = 1
    assert latent_masks(mask, (2, 2)).tolist() == [[[0.5, 0.0], [0.0, 0.0]]]


def test_grids_and_plots_show_what_they_are_given():
    picture = torch.zeros(8, 8, 3)
    picture[..., 0] = 1
    sheet = from_image(grid([("row", [picture, picture])], ["a caption", "another"], scale=4))
    assert ((sheet - torch.tensor([1.0, 0, 0])).abs().sum(-1) < 0.02).sum() == 2 * 32 * 32
    empty, full = loss_plot([]), loss_plot([1.0, 0.5, 0.25] * 10, steps=60)
    assert empty.size == full.size and empty.tobytes() != full.tobytes()
    loss_plot([0.0])


def test_a_plot_starts_where_the_training_did():
    assert loss_plot([1.0] * 5, 40).tobytes() != loss_plot([1.0] * 5, 40, start=20).tobytes()
    assert loss_plot([1.0, 0.5], start=20).size == (512, 288)


def test_stacked_pictures_are_as_wide_as_the_last():
    sheet = stacked([Image.new("RGB", (10, 20), "red"), Image.new("RGB", (40, 8), "blue")])
    assert sheet.size == (40, 88)
    assert sheet.getpixel((20, 79)) == (255, 0, 0) and sheet.getpixel((20, 80)) == (0, 0, 255)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_of_any_channels_become_rgb_and_a_mask(channels):
    images = torch.rand(2, 16, 24, channels)
    alpha = images[..., -1] if channels in (2, 4) else torch.ones(2, 16, 24)
    colours = images[..., :1].expand(2, 16, 24, 3) if channels < 3 else images[..., :3]
    pictures, masks, _ = concept_pictures(images)
    torch.testing.assert_close(masks, alpha)
    torch.testing.assert_close(pictures, colours * alpha[..., None] + 0.5 * (1 - alpha[..., None]))


def test_one_picture_without_a_batch_is_one_picture():
    assert concept_pictures(torch.rand(16, 16, 3))[0].shape == (1, 16, 16, 3)


def test_pictures_and_masks_lose_the_same_pixels_at_their_edges():
    images, masks = torch.rand(1, 21, 19, 3), torch.rand(1, 21, 19)
    pictures, weights, _ = concept_pictures(images, masks)
    assert torch.equal(pictures, images[:, 2:18, 1:17]) and torch.equal(weights, masks[:, 2:18, 1:17])


def test_one_mask_serves_all_pictures_and_any_size_is_fitted():
    images, mask = torch.rand(3, 32, 48, 3), torch.zeros(1, 64, 96)
    mask[:, :32] = 1
    _, weights, _ = concept_pictures(images, mask)
    assert weights.shape == (3, 32, 48)
    assert weights[:, :15].min() > 0.99 and weights[:, 17:].max() < 0.01
    assert torch.equal(concept_pictures(images, mask[0])[1], weights)
    assert torch.equal(concept_pictures(images, mask * 9 - 4)[1], weights), "values are cut off at 0 and 1"


def test_alpha_and_mask_both_count():
    images, mask = torch.ones(1, 16, 16, 4), torch.ones(1, 16, 16)
    images[:, :8, :, 3] = 0
    mask[:, :, :8] = 0
    assert concept_pictures(images, mask)[1].sum() == 64


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        ((0, 16, 16, 3), None, "no pictures"),
        ((1, 1, 1, 3), None, "pictures of 1x1 pixels are too small to encode; give at least 8x8"),
        ((1, 16, 16, 5), None, "1 to 4 channels"),
        ((1, 2, 16, 16, 3), None, "1 to 4 channels"),
        ((3, 16, 16, 3), (2, 16, 16), "2 masks for 3 pictures"),
        ((1, 16, 16, 3), (1, 1, 1), "a mask of 1x1 pixels does not fit pictures of 16x16"),
        ((1, 16, 32, 3), (1, 16, 16), "a mask of 16x16 pixels does not fit pictures of 32x16"),
    ],
)
def test_pictures_and_masks_that_make_no_sense_are_named(images, masks, message):
    with pytest.raises(PictureError, match=message):
        concept_pictures(torch.ones(images), masks and torch.ones(masks))


def test_what_holds_nothing_to_learn_is_named():
    images = torch.ones(2, 64, 96, 3)
    with pytest.raises(PictureError, match="mask 1 is all black.*connect no mask"):
        concept_pictures(images, torch.zeros(1, 64, 64))  # what the host gives for a picture without transparency
    masks = torch.ones(2, 64, 96)
    masks[1] = 0
    with pytest.raises(PictureError, match="mask 2 is all black"):
        concept_pictures(images, masks)
    with pytest.raises(PictureError, match="picture 2 has nothing to learn"):
        concept_pictures(torch.cat([images, masks[..., None]], -1))
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(PictureError, match="picture 2 has values that are not numbers"):
        concept_pictures(images)
    with pytest.raises(PictureError, match="a mask has values that are not numbers"):
        concept_pictures(images[:1], torch.full((1, 64, 96), torch.nan))


def test_a_caption_holds_all_of_a_long_path_between_its_margins():
    path = "/home/somebody/ComfyUI/models/profusion_residuals/training/mushroom_400_steps_00001_.safetensors"
    short, long = caption("mushroom", 640), caption(f"mushroom\n{path}\n1,496 bytes", 640)
    assert short.width == long.width == 640 and long.height > 3 * short.height - 2 * 640 // 32
    ink = 255 - np.asarray(long.convert("L")).astype(int)
    columns, rows = np.nonzero((ink > 128).any(0))[0], np.nonzero((ink > 128).any(1))[0]
    assert columns.min() > 10 and columns.max() < 630 and rows.min() > 10 and rows.max() < long.height - 10
    assert columns.max() > 500, "lines are used to their ends"


@pytest.mark.parametrize("text", ["", "W", "W" * 200, "one two " * 40, "a\n\nb"])
def test_any_text_has_a_caption(text):
    assert caption(text, 320).width == 320


@pytest.mark.parametrize("text", ["/x" * 2000, "x" * 4000, "\u200b" * 4000, "W\n" * 4000, "\n" * 100_000], ids=ascii)
def test_a_caption_is_no_work_however_long_its_text(text):
    started = time.process_time()
    drawn = caption(text)
    assert time.process_time() - started < 2
    assert drawn.width == 640 and drawn.height < 8500


def test_pictures_are_tiled_in_their_order():
    colours = [torch.tensor(colour).expand(10, 20, 3) for colour in ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0])]
    sheet = tiled(colours, columns=2, width=80)
    assert sheet.size == (80, 40)
    centres = [sheet.getpixel(at) for at in ((20, 10), (60, 10), (20, 30), (60, 30))]
    assert centres == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def test_a_picture_stays_as_it_is_above_its_caption():
    plot = loss_plot([0.5, 0.4, 0.3])
    both = captioned(plot, "3 steps")
    assert both.width == plot.width and both.height > plot.height
    assert both.crop((0, 0, *plot.size)).tobytes() == plot.tobytes()
    assert captioned(plot, "") is plot


def test_what_may_be_pictures_is_found_in_every_folder_and_judged_later(tmp_path, monkeypatch):
    for name in ("b/2.png", "a/1.jpg", "a/.hidden.png", ".cache/3.png", "c/unnamed", "d/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    for name in ("a/broken.png", "a/drawing.psd", "a/raw.dng", "a/notes.txt"):
        (tmp_path / name).write_bytes(b"nothing")
    look = os.scandir

    def denied(path):
        if str(path).endswith("/d"):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", denied)
    found = [str(path.relative_to(tmp_path)) for path in picture_files(tmp_path)]
    assert found == ["a/1.jpg", "a/broken.png", "a/drawing.psd", "a/raw.dng", "b/2.png", "c/unnamed", "d"]
    for name in ("a/broken.png", "d"):
        with pytest.raises(PictureError, match="cannot be read as a picture"):
            read_picture(tmp_path / name)
    with pytest.raises(OSError):
        picture_files(tmp_path / "d")


def test_what_is_not_learned_of_a_picture_is_pale():
    pictures, weights = torch.full((2, 16, 16, 3), 0.2), torch.zeros(2, 2, 2)
    weights[:, 0] = 1
    shown = masked(pictures, weights)
    assert shown.shape == pictures.shape and (shown[:, 0] < 0.25).all() and (shown[:, -1] > 0.85).all()
