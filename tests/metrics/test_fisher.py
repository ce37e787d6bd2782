"""Latent Fisher divergence: closed forms, exact zeros, and Infusion's promise on prompts without the concept."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from profusion.diffusion import training_sigmas
from profusion.infusion import Placement, cross_attention_layers, customised_patches, foundation_patches
from profusion.metrics import MetricError, fisher_divergence, noisy_latents, predictions, unit_latents
from profusion.toybox.pipeline import Toybox, noun_rows

SIZE = (4, 3, 2)
ELEMENTS = math.prod(SIZE)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy(draws=5, prompts=2, seed=0, device="cpu", **options):
    generator = seeded(seed)
    latents = [latent.to(device) for latent in unit_latents(prompts, SIZE, 3, generator)]
    return noisy_latents(latents, draws, generator, **options)


def test_a_closed_form(device):
    """eps' = k z_t against eps = 0, where z_t = x / sqrt(1 + sigma^2) is unit normal: F = k^2 C H W / 2."""
    where = noisy(draws=2000, prompts=1, device=device)
    customised = predictions(lambda x, sigma, prompt: 0.3 * x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt(), where)
    found = fisher_divergence(torch.zeros_like(where.x), customised)
    error = found.samples.std().item() / 2000**0.5
    assert abs(found.value - 0.3**2 * ELEMENTS / 2) < 4 * error < 0.05
    assert found.per_element == found.value / ELEMENTS


def test_the_sum_over_a_latent_and_the_mean_over_draws():
    base, customised = torch.zeros(2, *SIZE), torch.ones(2, *SIZE)
    customised[1] *= 3
    found = fisher_divergence(base, customised)
    assert found.samples.tolist() == [ELEMENTS / 2, 9 * ELEMENTS / 2] and found.value == 5 * ELEMENTS / 2
    assert found.elements == ELEMENTS


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 7), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_identical_predictions_are_exactly_0_apart_and_the_divergence_is_symmetric(seed, batch, dtype):
    generator = seeded(seed)
    one, other = (torch.randn(batch, *SIZE, generator=generator).to(dtype) for _ in range(2))
    assert fisher_divergence(one, one.clone()).value == 0.0
    assert fisher_divergence(one, other).value == fisher_divergence(other, one).value > 0


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 3))
def test_chunks_hold_one_prompt_and_change_nothing(batch, draws, prompts):
    where, seen, reported = noisy(draws, prompts), [], []

    def predict(x, sigma, prompt):
        assert len(x) == len(sigma) <= batch
        seen.extend([prompt] * len(x))
        return x * (prompt + 1)

    found = predictions(predict, where, batch, reported.append)
    assert seen == list(where.prompts) == [prompt for prompt in range(prompts) for _ in range(draws)]
    factors = torch.tensor(seen, dtype=torch.float32).view(-1, 1, 1, 1) + 1
    assert torch.equal(found, where.x * factors) and reported[-1] == prompts * draws


def test_draws_are_noised_latents_at_uniform_timesteps():
    clean = torch.full((1, *SIZE), 100.0)
    where = noisy_latents([clean], 3000, seeded())
    noise = (where.x - clean) / where.sigma.view(-1, 1, 1, 1)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    levels = training_sigmas()
    timesteps = (levels[None] - where.sigma[:, None]).abs().argmin(dim=1)
    assert torch.equal(levels[timesteps], where.sigma)
    shares = torch.histc(timesteps.float(), 10, 0, 1000) / 3000
    assert (shares - 0.1).abs().max() < 0.025


def test_the_same_draws_on_every_device(device):
    there, here = noisy(device=device), noisy()
    assert there.x.device.type == there.sigma.device.type == device.type
    torch.testing.assert_close(there.x.cpu(), here.x)
    assert torch.equal(there.sigma.cpu(), here.sigma)


def test_the_same_generator_gives_the_same_draws_and_more_of_them_continue():
    assert torch.equal(noisy(seed=3).x, noisy(seed=3).x) and not torch.equal(noisy(seed=3).x, noisy(seed=4).x)
    latents = unit_latents(1, SIZE, 2, seeded())
    few, many = (noisy_latents(latents, draws, seeded(1)) for draws in (2, 6))
    assert torch.equal(few.x, many.x[:2]) and torch.equal(few.sigma, many.sigma[:2])


@torch.no_grad()
def test_infusion_is_exactly_0_on_prompts_without_the_concept_and_not_on_one_with_it():
    toybox, noun = Toybox.load(), "ball"
    prompts = ["a photo of a cup on grass", "a star at night", f"a photo of a {noun} on snow"]
    layers = cross_attention_layers(dict(toybox.unet.named_parameters()))
    delta = torch.randn(len(layers), 1, layers[0].context_dim, generator=seeded(1))
    placed = Placement(delta, tuple(layer.name for layer in layers), noun_rows(prompts[2], noun))
    predict = toybox.noise_predictor(prompts)

    def infused(x, sigma, prompt):
        queries = {}
        predict(x, sigma, prompt, foundation_patches(queries))
        placements = [placed] if noun in prompts[prompt] else []
        return predict(x, sigma, prompt, customised_patches(queries, lambda options, chunk: placements))

    generator = seeded()
    where = noisy_latents(unit_latents(3, (4, 12, 12), 1, generator), 2, generator)
    base = predictions(lambda x, sigma, prompt: predict(x, sigma, prompt, {}), where, 2)
    found = fisher_divergence(base, predictions(infused, where, 2)).samples.tolist()
    assert found[:4] == [0.0] * 4 and min(found[4:]) > 0


@pytest.mark.parametrize(
    ("latents", "draws", "message"),
    [
        ([], 1, "no prompts"),
        ([torch.zeros(1, *SIZE)], 0, "draws=0"),
        ([torch.zeros(1, *SIZE), torch.zeros(1, 4, 2, 2)], 1, "of one size"),
        ([torch.zeros(0, *SIZE)], 1, "m > 0"),
        (
            [torch.zeros(1, *SIZE), torch.full((1, *SIZE), math.nan)],
            1,
            "prompt 2: latent 1 of 1 has values that are not finite",
        ),
    ],
)
def test_latents_that_cannot_be_noised(latents, draws, message):
    with pytest.raises(MetricError, match=message):
        noisy_latents(latents, draws, seeded())


def test_predictions_that_cannot_be_compared():
    good, bad = torch.zeros(2, *SIZE), torch.zeros(2, *SIZE)
    bad[1, 0, 0, 0] = math.inf
    with pytest.raises(MetricError, match="at the same latents"):
        fisher_divergence(good, good[:1])
    with pytest.raises(MetricError, match="customised model's prediction 2 of 2 .*float32"):
        fisher_divergence(good, bad)
