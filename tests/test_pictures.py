"""Reading people's pictures, and drawing grids and plots."""

import pytest
import torch
from PIL import Image

from profusion.pictures import PictureError, from_image, grid, latent_masks, loss_plot, read_pictures, to_image


def test_pictures_are_read_by_name_with_alpha_as_mask(tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "b.jpg")
    half = Image.new("RGBA", (100, 100), (0, 0, 255, 255))
    half.paste((0, 255, 0, 0), (0, 0, 50, 100))
    half.save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    pictures, masks = read_pictures(tmp_path, 64)
    assert pictures.shape == (2, 64, 64, 3) and masks.shape == (2, 64, 64)
    assert masks[0, :, :28].max() < 0.01 and masks[0, :, 36:].min() == 1 and masks[1].min() == 1
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
