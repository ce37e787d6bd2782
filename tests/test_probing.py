"""A noun's share of attention, from the maps of the layers."""

import pytest
import torch

from profusion.probing import LayerShare, NounShares, UnseenError, report


def seen(*maps, turns=1, layers=("a", "b")):
    shares = NounShares(layers)
    for _ in range(turns):
        for one in maps:
            shares.add("prompt", one[None])
    return shares


def test_shares_are_means_over_the_parts_of_each_layers_own_grid():
    fine = torch.zeros(4, 4)
    fine[:2, :2] = 0.4
    coarse = torch.tensor([[0.2, 0.1], [0.1, 0.0]])
    shares = seen(fine, coarse, turns=3)
    region = torch.zeros(4, 4)
    region[:2, :2] = 1
    one, other = shares.shares(region)
    assert (one.name, one.inside, one.outside) == ("a", pytest.approx(0.4), pytest.approx(0.0))
    assert (other.inside, other.outside) == (pytest.approx(0.2), pytest.approx(0.2 / 3))
    assert torch.equal(shares.region((4, 4))[:2, :2], torch.ones(2, 2)) and shares.mean((4, 4)).shape == (4, 4)


def test_pictures_and_turns_count_alike():
    shares = NounShares(["a"])
    shares.add("one", torch.tensor([[[0.1]], [[0.3]]]))
    shares.add("other", torch.tensor([[[0.6]]]))
    assert float(shares.maps()[0]) == pytest.approx(0.4)


@pytest.mark.parametrize("maps", [(), (torch.ones(2, 2),), (torch.ones(2, 2),) * 3])
def test_layers_that_were_not_seen_are_told(maps):
    with pytest.raises(UnseenError, match="of 2 attentions with text not all were seen"):
        seen(*maps).maps()


def test_several_sizes_are_told():
    with pytest.raises(UnseenError, match="evaluated at several sizes"):
        seen(torch.ones(2, 2), torch.ones(2, 2), torch.ones(4, 4))


@pytest.mark.parametrize(
    ("inside", "outside", "said"),
    [
        (0.2, 0.01, "outside.\n"),
        (0.009, 0.001, "That is less than 1 %: a residual at it has little to act through. Try another noun"),
        (0.2, 0.15, "That is much alike"),
        (0.2, float("nan"), "That is much alike"),
    ],
)
def test_the_report_says_what_it_means(inside, outside, said):
    text = report("cat", [LayerShare("input.1.0", inside, outside)])
    assert text.startswith(f"'cat' has {100 * inside:.2f} % of the attention inside its object") and said in text
    assert text.splitlines()[-1].split() == ["input.1.0", f"{100 * inside:.2f}", f"{100 * outside:.2f}"]
