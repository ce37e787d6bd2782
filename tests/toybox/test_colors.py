"""Counting palette colours: right on drawn and blurred pictures, and seldom fooled."""

import numpy as np
import pytest
import torch

from profusion.toybox import world
from profusion.toybox.colors import color_names, palette_shares, wears
from profusion.toybox.drawing import SIZE


def nameable(count, seed):
    rng, pictures = np.random.default_rng(seed), []
    while len(pictures) < count:
        scene = world.sample_scene(rng, hold_out=False)
        look = scene.objects[0].appearance
        if len(scene.objects) == 1 and look is not None and look.named:
            pictures.append(world.render(scene))
    images = torch.from_numpy(np.stack([picture.image for picture in pictures])).float() / 255
    bodies = torch.from_numpy(np.stack([picture.bodies[0] for picture in pictures])).float() / 255
    return images, bodies, [picture.scene.objects[0].appearance for picture in pictures]


@pytest.mark.parametrize("cells, least", [(SIZE, 0.98), (SIZE * 5 // 12, 0.96)])
def test_true_captions_pass_and_others_do_not(cells, least):
    pictures, bodies, looks = nameable(50, 7)
    if cells < SIZE:
        pictures = torch.nn.functional.interpolate(pictures.movedim(-1, 1), size=cells, mode="bilinear", antialias=True)
        pictures = torch.nn.functional.interpolate(pictures, size=SIZE, mode="bicubic").clamp(0, 1).movedim(1, -1)
    shares = palette_shares(pictures, bodies).tolist()
    right = [wears(share, look) for share, look in zip(shares, looks, strict=True)]
    wrong = [wears(share, look) for share, look in zip(shares, looks[1:] + looks[:1], strict=True)]
    assert np.mean(right) >= least
    assert np.mean(wrong) <= 0.12


def test_a_blurred_edge_is_no_color_of_its_own():
    red, yellow = (torch.tensor(world.PALETTE[name]) / 255 for name in ("red", "yellow"))
    mixed = torch.linspace(0, 1, 12)[None, :, None]  # a ramp between the two, through orange
    stripes = torch.cat([red.expand(1, 12, 3), red + mixed * (yellow - red), yellow.expand(1, 12, 3)], dim=1)
    assert set(color_names(palette_shares(stripes[None], torch.ones(1, 1, 36))[0].tolist())) == {"red", "yellow"}


def test_shares_name_colors():
    names = list(world.PALETTE)
    shares = [0.0] * len(names)
    shares[names.index("blue")], shares[names.index("white")] = 0.7, 0.3
    blue_white = world.Appearance("dotted", world.PALETTE["white"], world.PALETTE["blue"], "white", "blue")
    plain_blue = world.Appearance("plain", world.PALETTE["blue"], None, "blue")
    plain_white = world.Appearance("plain", world.PALETTE["white"], None, "white")
    assert color_names(shares) == ("blue", "white")
    assert wears(shares, blue_white) and wears(shares, plain_blue) and not wears(shares, plain_white)


def test_an_empty_mask_has_no_colors():
    shares = palette_shares(torch.rand(1, SIZE, SIZE, 3), torch.zeros(1, SIZE, SIZE))
    assert shares.sum() == 0 and color_names(shares[0].tolist()) == ()


def test_colors_without_a_name_are_not_judged():
    with pytest.raises(ValueError, match="without a name"):
        wears([0.0] * 8, world.Appearance("plain", (1, 2, 3)))
