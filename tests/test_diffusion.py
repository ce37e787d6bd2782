"""The schedule against its definition, and the sampler on a model whose answer is known."""

import math

import pytest
import torch

from profusion.diffusion import (
    alphas_cumprod,
    denoiser,
    eps_denoiser,
    noise_predictor,
    noised,
    sample_euler,
    sampling_sigmas,
    timestep_of,
    training_sigmas,
    variance_exploding,
    variance_preserving,
)


def test_schedule_is_sds():
    beta = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]
    assert math.isclose(alphas_cumprod()[0].item(), 1 - beta[0], rel_tol=1e-6)
    assert math.isclose(alphas_cumprod()[999].item(), math.prod(1 - b for b in beta), rel_tol=1e-4)
    assert math.isclose(training_sigmas()[-1].item(), 14.6146, rel_tol=1e-4)


def test_every_timestep_is_found_again(device):
    assert torch.equal(timestep_of(training_sigmas().to(device)), torch.arange(1000, device=device))


def test_sampling_starts_at_the_highest_noise_and_ends_at_none():
    sigmas = sampling_sigmas(30)
    assert len(sigmas) == 31 and sigmas[0] == training_sigmas()[-1] and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    with pytest.raises(ValueError, match="steps=0"):
        sampling_sigmas(0)


def test_euler_lands_on_the_mean_of_a_gaussian(device):
    """For data N(mu, s^2) the ideal denoiser is linear; the probability flow maps noise z to mu + s * z."""
    mu, s = 3.0, 0.5

    def ideal(x, sigma):
        sigma = sigma.view(-1, 1, 1, 1)
        return mu + (x - mu) * s**2 / (s**2 + sigma**2)

    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)).to(device)
    seen = []
    x = sample_euler(ideal, noise, sampling_sigmas(400).to(device), lambda step, denoised: seen.append(step))
    assert torch.allclose(x, mu + s * noise, atol=0.15)
    assert seen == list(range(400))


def test_the_two_scalings_undo_each_other_for_a_level_or_one_a_row(device):
    x, sigma = torch.randn(2, 4, 3, 3).to(device), torch.tensor([0.5, 9.0], device=device)
    scaled = variance_preserving(x, sigma)
    assert torch.equal(scaled[1], x[1] / (sigma[1] ** 2 + 1).sqrt())
    torch.testing.assert_close(variance_exploding(scaled, sigma), x)
    assert torch.equal(variance_preserving(x, sigma[0])[0], scaled[0])
    assert variance_preserving(x.half(), sigma[0]).dtype == torch.float16
    assert torch.equal(variance_preserving(x[..., 0, 0], sigma), scaled[..., 0, 0])


def test_noised_pictures_are_those_of_the_schedule(device):
    (clean, noise), t = torch.randn(2, 2, 4, 3, 3).to(device), torch.tensor([100, 800])
    sigma = training_sigmas()[t].to(device)
    expected = variance_preserving(clean + sigma.view(-1, 1, 1, 1) * noise, sigma)
    torch.testing.assert_close(noised(clean, noise, t), expected)
    torch.testing.assert_close(
        noise_predictor(lambda x, t: x)(clean + sigma.view(-1, 1, 1, 1) * noise, sigma), expected
    )


def test_eps_denoiser_undoes_the_scaling(device):
    clean, noise = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(device)
    sigma = training_sigmas()[torch.tensor([100, 800])].to(device)
    x = clean + sigma.view(-1, 1, 1, 1) * noise
    alpha_bar = alphas_cumprod()[torch.tensor([100, 800])].to(device).view(-1, 1, 1, 1)

    def predict_noise(scaled, t):
        assert t.tolist() == [100, 800]
        assert torch.allclose(scaled, alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise, atol=1e-5)
        return noise

    assert torch.allclose(eps_denoiser(predict_noise)(x, sigma), clean, atol=1e-5)


def test_a_network_that_predicts_v_is_the_same_denoiser_as_one_that_predicts_eps(device):
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 of an ideal network, by its definition."""
    generator = torch.Generator().manual_seed(3)
    x0, eps = (torch.randn(5, 4, 6, 6, generator=generator).to(device) for _ in range(2))
    timesteps = torch.tensor([0, 100, 500, 900, 999], device=device)
    sigma = training_sigmas().to(device)[timesteps]
    signal = alphas_cumprod().to(device)[timesteps].view(-1, 1, 1, 1)
    x = x0 + sigma.view(-1, 1, 1, 1) * eps

    def predict_v(x_t, t):
        assert torch.equal(t, timesteps)
        torch.testing.assert_close(x_t, noised(x0, eps, timesteps), rtol=1e-4, atol=1e-4)
        return signal.sqrt() * eps - (1 - signal).sqrt() * x0

    torch.testing.assert_close(denoiser(predict_v, "v")(x, sigma), x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(noise_predictor(predict_v, "v")(x, sigma), eps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(denoiser(lambda x_t, t: eps, "eps")(x, sigma), x0, rtol=1e-4, atol=1e-4)
