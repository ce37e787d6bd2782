"""Variants of a picture: which cells are drawn anew, what the edge does, and that the object stays to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from profusion.augment import LEAST_SCALE, composite, moved, redrawn_cells, soft_edge, variant_prompts
from profusion.pictures import PictureError


def test_each_line_is_a_prompt_with_the_noun():
    assert variant_prompts("a %noun% on snow\n\n  a red %noun%, a %noun% \n", " cat ") == [
        "a cat on snow",
        "a red cat, a cat",
    ]
    assert variant_prompts("snow", "") == ["snow"]
    with pytest.raises(ValueError, match="one a line"):
        variant_prompts(" \n", "cat")
    with pytest.raises(ValueError, match="noun is empty"):
        variant_prompts("a %noun%", " ")


def test_a_cell_is_kept_where_the_object_covers_half_of_it():
    mask = torch.zeros(16, 24)
    mask[:8, :8], mask[:8, 8:12], mask[:8, 16:19], mask[8:, :8] = 1, 1, 1, 0.4
    assert redrawn_cells(mask, (2, 3)).tolist() == [[0, 0, 1], [1, 1, 1]]
    assert redrawn_cells(torch.zeros(8, 8), (1, 1)).tolist() == [[1]]
    with pytest.raises(PictureError, match="covers the whole picture"):
        redrawn_cells(torch.ones(16, 16), (2, 2))


def test_the_edge_fades_outside_the_mask_only():
    mask = torch.zeros(9, 20)
    mask[:, :10] = 1
    edge = soft_edge(mask, 3)
    assert torch.equal(edge[:, :10], mask[:, :10]) and torch.equal(edge[:, 13:], mask[:, 13:])
    torch.testing.assert_close(edge[4, 9:14], torch.tensor([1, 6 / 7, 4 / 7, 2 / 7, 0]))
    assert soft_edge(mask, 0) is mask


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 5))
def test_inside_the_mask_every_pixel_is_the_pictures(seed, feather):
    generator = torch.Generator().manual_seed(seed)
    picture, drawn = torch.rand(2, 12, 10, 3, generator=generator)
    mask = (torch.rand(12, 10, generator=generator) < 0.3).float()
    edge = soft_edge(mask, feather)
    result = composite(drawn, picture, edge)
    inside = mask == 1
    assert torch.equal(result[inside], picture[inside]) and torch.equal(result[edge == 0], drawn[edge == 0])
    low, high = torch.minimum(picture, drawn), torch.maximum(picture, drawn)
    assert ((result >= low - 1e-6) & (result <= high + 1e-6)).all()


def blob(height, width, top, left, side):
    """A picture that shows its own mask, an L without any symmetry."""
    mask = torch.zeros(height, width)
    mask[top : top + side, left : left + side // 3] = 1
    mask[top + 2 * side // 3 : top + side, left : left + side] = 1
    return mask[..., None].expand(-1, -1, 3), mask


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("shape", [(96, 96, 30, 30, 36), (64, 128, 10, 80, 40)])
def test_a_moved_object_keeps_its_mask_and_is_never_cut_off(shape, mirror):
    picture, mask = blob(*shape)
    centres = set()
    for seed in range(40):
        there, where = moved(picture, mask, torch.Generator().manual_seed(seed), mirror)
        assert there.shape == picture.shape and where.shape == mask.shape
        assert (there[..., 0] - where).abs().max() < 1e-5, f"{seed}: the mask went elsewhere"
        assert LEAST_SCALE**2 * 0.95 < where.sum() / mask.sum() < 1.02
        rows, columns = torch.arange(mask.shape[0]), torch.arange(mask.shape[1])
        centres.add(
            (int((where.sum(1) @ rows.float()) / where.sum()), int((where.sum(0) @ columns.float()) / where.sum()))
        )
    assert len(centres) > 25


def test_half_of_the_moved_objects_are_mirrored_where_they_may_be():
    """Left is where an L has its stem: there are more of its pixels left of its middle than right of it."""
    picture, mask = blob(96, 96, 30, 30, 36)

    def stands_left(seed, mirror):
        _, where = moved(picture, mask, torch.Generator().manual_seed(seed), mirror)
        columns = torch.nonzero(where.sum(0) > 0.5)[:, 0]
        middle = int(columns.min() + columns.max()) // 2
        return bool(where[:, :middle].sum() > where[:, middle:].sum())

    assert all(stands_left(seed, False) for seed in range(30))
    assert 8 < sum(stands_left(seed, True) for seed in range(30)) < 22


def test_an_object_that_fits_nowhere_is_as_far_inside_as_any():
    picture, mask = torch.rand(64, 64, 3), torch.ones(64, 64)
    there, where = moved(picture, mask, torch.Generator().manual_seed(0), True)
    assert there.isfinite().all() and where.mean() > 0.3
