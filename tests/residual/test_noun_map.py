"""The noun's map, against the attention that a UNet itself shows; and a soft mask made of it."""

import pytest
import torch

from profusion.diffusion import noise_predictor, training_sigmas
from profusion.infusion import cross_attention_layers
from profusion.models.configs import UNetConfig
from profusion.models.unet import UNet
from profusion.residual.noun_map import LEVELS, Seen, look, map_patches, soft_mask

SINGLE = UNetConfig(32, (1, 2), 1, (1, 1), 1, 24, num_heads=1)
LENGTH, ROWS = 11, (5, 6)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(3)
    return UNet(SINGLE).eval().requires_grad_(False)


def evaluated(unet, x, patches, probe=None):
    context = torch.randn(1, LENGTH, 24, generator=torch.Generator().manual_seed(1)).expand(len(x), -1, -1)
    options = {"patches": patches, "cond_or_uncond": [0]}
    if probe is not None:
        options["attention_probe"] = probe
    return unet(x, torch.full((len(x),), 300.0), context, transformer_options=options)


def test_the_map_is_the_attention_at_the_noun_and_the_model_is_as_it_was(unet):
    x, shown, seen = torch.randn(2, 4, 8, 8), {}, {}
    plain = evaluated(unet, x, {}, lambda layer, probabilities: shown.__setitem__(layer, probabilities))
    found = evaluated(unet, x, map_patches(ROWS, lambda layer, part, noun: seen.__setitem__(layer, (part, noun))))
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    assert list(seen) == [layer.name for layer in cross_attention_layers(dict(unet.named_parameters()))]
    for (part, noun), probabilities in zip(seen.values(), shown.values(), strict=True):
        at_noun = probabilities.view(2, -1, LENGTH)[..., list(ROWS)].sum(-1)
        torch.testing.assert_close(part.flatten(1), at_noun, rtol=1e-3, atol=1e-4)
        assert noun.shape == (2, 24)


def test_a_map_of_two_levels_is_the_mask_of_the_higher_one():
    seen = torch.full((8, 8), 0.1)
    seen[2:5, 2:5] = 0.7
    mask, found = soft_mask(seen)
    assert found and torch.equal(mask > 0.5, seen > 0.5)
    assert mask.amin() < 1e-6 and mask.amax() > 1 - 1e-6


def test_between_the_levels_a_mask_is_soft():
    seen = torch.full((8, 8), 0.1)
    seen[2:5, 2:5], seen[5, 5] = 0.7, 0.4
    mask, _ = soft_mask(seen)
    assert 0.3 < mask[5, 5] < 0.7


@pytest.mark.parametrize("seen", [torch.full((4, 4), 0.3), torch.linspace(0.30, 0.33, 16).view(4, 4)])
def test_a_flat_map_shows_no_object(seen):
    mask, found = soft_mask(seen)
    assert not found and torch.isfinite(mask).all()


def test_pictures_are_looked_at_one_by_one_and_the_noun_s_row_is_measured(unet):
    context = torch.randn(1, LENGTH, 24, generator=torch.Generator().manual_seed(1))
    rows = []

    def predict(x, sigma, prompt, patches):
        rows.append(len(x))
        options = {"patches": patches, "cond_or_uncond": [0]}
        network = noise_predictor(lambda x, t: unet(x, t, context, transformer_options=options))
        return network(x, sigma)

    latents = torch.randn(3, 4, 8, 8)
    seen = look(predict, latents, ROWS, training_sigmas(), torch.Generator().manual_seed(0))
    assert rows == [1] * 3 * len(LEVELS) and seen.masks.shape == (3, 8, 8) and len(seen.found) == 3
    assert seen.masks.amin() >= 0 and seen.masks.amax() <= 1
    own = context[0, list(ROWS)].mean(0)
    assert seen.row_size == pytest.approx(own.square().mean().sqrt().item(), rel=1e-5)
    again = look(predict, latents, ROWS, training_sigmas(), torch.Generator().manual_seed(0))
    assert torch.equal(again.masks, seen.masks)


def test_a_map_that_says_nothing_is_a_mask_of_everything():
    masks = torch.stack([torch.zeros(4, 4), torch.eye(4)])
    assert torch.equal(Seen(masks, (False, True), 1.0).weights(), torch.stack([torch.ones(4, 4), torch.eye(4)]))
