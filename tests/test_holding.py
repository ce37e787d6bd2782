"""A held background: where the noun is found, and what is left of C around it."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from profusion import holding
from profusion.attending import UNET
from profusion.holding import (
    FREE,
    HELD,
    SOFTLY,
    Holding,
    NounMaps,
    attention_probabilities,
    cross_attention,
    feathered,
    held,
    noun_map,
    region_of,
    winners,
)
from profusion.infusion import Placement, cross_attention_layers, on_conditional
from profusion.models.attention import attention_map
from profusion.models.configs import UNetConfig
from profusion.models.unet import UNet
from profusion.streams import two_stream_denoiser
from profusion.stride import Stride


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet(UNetConfig(32, (1, 2), 1, (1, 1), 1, 16, num_heads=2)).eval().requires_grad_(False)


def test_a_nouns_map_is_what_the_layer_computes(unet):
    """Of every layer, by its name: its own attention, seen by its probe."""
    layers = [layer.name for layer in cross_attention_layers(dict(unet.named_parameters()))]
    seen, probed = {}, {}

    def note(n, context, value, options):
        kind, block = options["block"]
        name = f"{kind}.{block}.{options['block_index']}"
        seen[name] = noun_map(cross_attention(unet, name), n, context, torch.tensor([3, 4]))
        return n, context, value

    def probe(layer, probabilities):
        probed[".".join(map(str, layer))] = probabilities[..., 3:5].sum(dim=-1).mean(dim=1)

    options = {"patches": {"attn2_patch": [note]}, "attention_probe": probe}
    unet(torch.randn(2, 4, 8, 8), torch.tensor([500.0, 400.0]), torch.randn(2, 7, 16), transformer_options=options)
    assert list(seen) == layers == list(probed)
    for name in layers:
        torch.testing.assert_close(seen[name], probed[name])


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 400), (torch.bfloat16, 10)])
def test_a_map_is_in_float32_whatever_the_model_computes_in(unet, dtype, scale):
    """Scores of half the bits are off by whole parts of a map, and beyond 65504 are none."""
    attention = copy.deepcopy(cross_attention(unet, "middle.0.0")).to(dtype)
    attention.to_q.weight.mul_(scale)
    attention.to_k.weight.mul_(scale)
    n, context = torch.randn(2, 16, attention.to_q.in_features).to(dtype), torch.randn(2, 7, 16).to(dtype)
    query, key = attention.to_q(n), attention.to_k(context)
    expected = attention_map(query.double(), key.double(), attention.heads).mean(dim=1)
    found = attention_probabilities(attention, n, context)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)


def test_maps_of_many_pictures_are_made_a_few_at_a_time(unet, monkeypatch):
    attention = cross_attention(unet, "middle.0.0")
    n, context = torch.randn(5, 16, attention.to_q.in_features), torch.randn(5, 7, 16)
    whole = attention_probabilities(attention, n, context)
    sizes = []

    def noted(query, key, heads):
        sizes.append(len(query))
        return attention_map(query, key, heads)

    monkeypatch.setattr(holding, "attention_map", noted)
    for at_once, expected in ((1, [1] * 5), (2 * attention.heads * 16 * 7, [2, 2, 1])):
        sizes.clear()
        monkeypatch.setattr(holding, "_AT_ONCE", at_once)
        torch.testing.assert_close(attention_probabilities(attention, n, context), whole)
        assert sizes == expected


def test_a_region_is_what_is_above_a_share_of_the_largest_and_grown():
    maps = torch.zeros(2, 7, 7)
    maps[0, 3, 3], maps[0, 0, 0], maps[1, 6, 6] = 1.0, 0.3, 1e-3
    region = region_of(maps, 0.35, 1)
    assert region[0].sum() == 9 and region[0, 2:5, 2:5].all()
    assert region[1].sum() == 4 and region[1, 5:, 5:].all()
    assert region_of(maps, 0.2, 0)[0].sum() == 2


def test_a_feather_falls_in_even_steps():
    region = torch.zeros(1, 1, 9)
    region[..., 4] = 1
    torch.testing.assert_close(feathered(region, 2)[0, 0], torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0, 0]))


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 4, 1, 3, 3)])
def test_what_is_held_is_to_the_bit(shape):
    customised, foundation = torch.randn(shape), 1e4 * torch.randn(shape)
    region = torch.tensor([[0.0, 0.5, 1.0]] * 3).expand(2, 3, 3)
    both = held(customised, foundation, region)
    assert torch.equal(both[..., 0], foundation[..., 0]) and torch.equal(both[..., 2], customised[..., 2])
    torch.testing.assert_close(both[..., 1], (customised + foundation)[..., 1] / 2)
    assert torch.equal(held(foundation, foundation, region), foundation)


def test_maps_are_means_over_layers_of_all_sizes():
    """One picture alone, an area, and cells of half the size."""
    maps, whole = NounMaps(2, (8, 8)), torch.rand(2, 8, 8)
    maps.add("ball", whole)
    maps.add("ball", 3 * whole)
    assert torch.equal(maps.maps("ball"), 2 * whole)
    assert torch.equal(maps.region(), region_of(2 * whole))
    small = F.avg_pool2d(whole, 2)
    alone = NounMaps(2, (8, 8))
    alone.add("ball", small[1:], pictures=[1])
    assert alone.region()[1].any()
    partly = NounMaps(1, (8, 8))
    partly.add("ball", torch.ones(1, 2, 2), area=(4, 6, 4, 2))
    expected = torch.zeros(8, 8)
    expected[3:, 1:] = 1  # its cells and one around
    assert torch.equal(partly.region()[0], expected)


def test_regions_of_concepts_come_together_and_a_users_is_taken_as_it_is():
    maps = NounMaps(2, (8, 8))
    assert maps.region() is None
    one, other, given = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8), torch.zeros(2, 16, 16)
    one[:, 1, 1], other[:, 6, 6] = 1, 1
    given[0, 9, 1], given[1, 15, 15] = 1, 1
    maps.add("one", one)
    maps.add("given", other, region=given)
    expected = region_of(one)
    expected[0, 4, 0] = expected[1, 7, 7] = 1
    assert torch.equal(maps.region(), expected)


def placements(unet, strength=1.0):
    layers = tuple(layer.name for layer in cross_attention_layers(dict(unet.named_parameters())))
    return [Placement(3 * torch.randn(len(layers), 1, 16, generator=torch.manual_seed(2)), layers, (3,), strength)]


def drawn(unet, background, strength=1.0, steps=3, placed=None, apart=False, stride=None, calls=None):
    """(plain, C) after a few steps of halving noise, and the region."""
    x = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(1)).repeat(2, 1, 1, 1)
    context = torch.randn(1, 7, 16, generator=torch.manual_seed(3)).expand(2, -1, -1)

    def evaluate(x, sigma, patches):
        if calls is not None:
            calls.append(float(sigma[0]))
        return unet(x, 100 * sigma, context, transformer_options={"patches": patches, "cond_or_uncond": [0]})

    holding = None
    if background != FREE:
        holding = Holding(background, partial(UNET.looking, unet), 2, (8, 8), apart)
    placed = placements(unet, strength) if placed is None else placed
    denoise = two_stream_denoiser(evaluate, on_conditional(placed), holding=holding, stride=stride)
    for step in range(steps):
        denoised = denoise(x, torch.full((4,), float(steps - step)))
        x = denoised + 0.5 * (x - denoised)
    plain, customised = x.chunk(2)
    return plain, customised if holding is None else holding.finished(customised, plain), holding and holding.region()


@pytest.fixture
def narrow(monkeypatch):
    """A random model's maps are all but even: the region is where they are largest."""
    monkeypatch.setattr(region_of, "__defaults__", (0.95, 0))


def test_c_is_f_to_the_bit_around_the_noun(unet, narrow):
    plain, customised, region = drawn(unet, HELD)
    outside = (region == 0)[:, None].expand_as(plain)
    assert outside.any() and region.any()
    assert torch.equal(customised[outside], plain[outside]) and not torch.equal(customised, plain)
    free_plain, free, _ = drawn(unet, FREE)
    assert torch.equal(free_plain, plain) and not torch.equal(free[outside], plain[outside])


def test_softly_has_an_edge_and_moves_less_than_free(unet, narrow):
    plain, customised, region = drawn(unet, SOFTLY)
    assert ((region > 0) & (region < 1)).any()
    assert 0 < (customised - plain).norm() < (drawn(unet, FREE)[1] - plain).norm()


@pytest.mark.parametrize("background", [HELD, SOFTLY])
def test_with_nothing_to_add_both_streams_are_the_plain_run(unet, background):
    plain, customised, region = drawn(unet, background, strength=0.0)
    assert torch.equal(plain, customised) and region is None


def test_what_cannot_be_held_is_refused(unet):
    with pytest.raises(ValueError, match="give 'held softly' or 'held'"):
        Holding(FREE, partial(UNET.looking, unet), 1, (8, 8))
    with pytest.raises(ValueError, match="draws no picture of its own"):
        two_stream_denoiser(lambda *_: None, on_conditional([]), True, Holding(HELD, lambda _: None, 1, (8, 8)))


def test_a_cell_is_the_nouns_that_is_largest_there_of_its_own_map():
    maps = torch.tensor([[[[0.8, 0.4, 0.3]]], [[[0.05, 0.1, 0.09]]]])
    anywhere = torch.zeros(2, 1, 1, 3)
    assert winners(maps, anywhere)[:, 0, 0].tolist() == [[1, 0, 0], [0, 1, 1]]
    own = anywhere.clone()
    own[0, ..., 2] = 1
    assert winners(maps, own)[:, 0, 0].tolist() == [[1, 0, 1], [0, 1, 0]]
    own[1, ..., 2] = 1
    assert winners(maps, own)[:, 0, 0].tolist() == [[1, 0, 0], [0, 1, 1]]
    assert torch.equal(winners(torch.zeros(2, 1, 1, 3), anywhere).sum(dim=0), torch.ones(1, 1, 3))


def two_placements(unet):
    """At two nouns, on the two sides of the picture."""
    (one,) = placements(unet)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    other = replace(one, delta=one.delta.flip(0), rows=(5,), region=left.flip(1))
    return [replace(one, region=left), other]


def test_apart_each_concept_is_what_it_is_alone_to_the_bit(unet):
    both = two_placements(unet)
    plain, apart, _ = drawn(unet, HELD, placed=both, apart=True)
    _, together, _ = drawn(unet, HELD, placed=both)
    for placement in both:
        _, alone, region = drawn(unet, HELD, placed=[placement])
        own = (region > 0)[:, None].expand_as(plain)
        assert torch.equal(apart[own], alone[own]) and not torch.equal(apart[own], plain[own])
        assert not torch.equal(together[own], alone[own])


@pytest.mark.parametrize("background", [HELD, SOFTLY])
def test_concepts_apart_are_held_as_others_are(unet, narrow, background):
    """Where they are found in the maps too."""
    both = [replace(placement, region=None) for placement in two_placements(unet)]
    plain, apart, region = drawn(unet, background, placed=both, apart=True)
    _, _, together = drawn(unet, background, placed=both)
    if background == HELD:
        assert torch.equal(region, together)
    outside = (region == 0)[:, None].expand_as(plain)
    assert outside.any() and torch.equal(apart[outside], plain[outside]) == (background == HELD)
    assert (apart != plain)[(region == 1)[:, None].expand_as(plain)].all()


@pytest.mark.parametrize("background", [HELD, SOFTLY])
def test_one_concept_apart_is_as_it_is(unet, narrow, background):
    for mine, other in zip(drawn(unet, background, apart=True), drawn(unet, background), strict=True):
        assert torch.equal(mine, other)


def test_with_a_stride_the_concepts_that_are_due_have_an_evaluation_each(unet):
    """Two at steps that are C's and none between, where what each differs by from F is carried on by itself."""
    both, calls, steps = two_placements(unet), [], 7
    levels = [float(steps - step) for step in range(steps + 1)]
    plain, apart, _ = drawn(unet, HELD, steps=steps, placed=both, apart=True, stride=Stride(3, levels), calls=calls)
    assert calls == [7.0] * 3 + [6.0] + [5.0] * 3 + [4.0, 3.0] + [2.0] * 3 + [1.0]
    for placement in both:
        _, alone, region = drawn(unet, HELD, steps=steps, placed=[placement], stride=Stride(3, levels))
        own = (region > 0)[:, None].expand_as(plain)
        assert torch.equal(apart[own], alone[own]) and not torch.equal(apart[own], plain[own])
    _, whole, _ = drawn(unet, HELD, steps=steps, placed=both, apart=True)
    assert not torch.equal(apart, whole)


class Shared:
    """A holding whose cells change from one noun to the other at some evaluation of F."""

    def __init__(self, changes_at):
        self.evaluations, self.changes_at = 0, changes_at

    def watching_foundation(self, patches, placements_for):
        self.evaluations += 1
        return patches

    def watching_customised(self, patches, placements_for, noun):
        return {**patches, "noun": noun}

    def nouns(self):
        return [0, 1]

    def seen_by(self, noun, customised, foundation):
        return customised

    def joined(self, drawn):
        return drawn[self.evaluations >= self.changes_at]

    def denoised(self, drawn, plain):
        return drawn


def test_a_cell_that_goes_over_to_another_noun_is_carried_on_by_what_that_one_differed_by():
    growth = (1.0, 10.0)  # of each noun's difference, in a step

    def evaluate(x, sigma, patches):
        return torch.zeros_like(x) if "noun" not in patches else torch.full_like(x, growth[patches["noun"]] * sigma[0])

    stride = Stride(2, [4.0, 3.0, 2.0, 1.0, 0.0])
    denoise = two_stream_denoiser(evaluate, on_conditional([]), holding=Shared(changes_at=2), stride=stride)
    found = [
        float(denoise(torch.zeros(2, 4, 8, 8), torch.full((2,), level))[1].mean()) for level in (4.0, 3.0, 2.0, 1.0)
    ]
    assert found == [4.0, 4.0, 20.0, 10.0]
