"""Variants of a picture: which cells are drawn anew, what the edge does, and that the object stays to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from profusion.augment import composite, redrawn_cells, soft_edge, variant_prompts
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
