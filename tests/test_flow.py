"""Flow matching against its definition, and the sampler on a model whose answer is known."""

import pytest
import torch

from profusion.diffusion import euler
from profusion.flow import flow_sigmas, interpolated, velocity_denoiser


def test_the_path_is_straight_and_the_velocity_is_its_slope(device):
    clean, noise = torch.randn(2, 4, 3, 3).to(device), torch.randn(2, 4, 3, 3).to(device)
    sigma = torch.tensor([0.0, 0.25], device=device)
    x = interpolated(clean, noise, sigma)
    assert torch.equal(x[0], clean[0]) and torch.equal(x[1], 0.75 * clean[1] + 0.25 * noise[1])
    seen = []
    denoise = velocity_denoiser(lambda x, t: seen.append(t) or noise - clean)
    torch.testing.assert_close(denoise(x, sigma), clean)
    assert seen[0].tolist() == [0, 250]


def test_levels_fall_from_one_to_none_and_a_shift_keeps_them_high():
    even, shifted = flow_sigmas(10), flow_sigmas(10, shift=3.0)
    torch.testing.assert_close(even, torch.linspace(1, 0, 11))
    assert shifted[0] == 1 and shifted[-1] == 0 and (shifted[1:-1] > even[1:-1]).all()
    assert shifted[5] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    with pytest.raises(ValueError, match="steps=0"):
        flow_sigmas(0)


def test_euler_lands_on_the_mean_of_a_gaussian(device):
    """For data N(mu, s^2) the ideal denoiser is linear; the flow maps noise z to mu + s * z."""
    mu, s = 3.0, 0.5

    def ideal(x, sigma):
        sigma = sigma.view(-1, 1, 1, 1)
        spread = (1 - sigma) ** 2 * s**2 + sigma**2
        return mu + (1 - sigma) * s**2 / spread * (x - (1 - sigma) * mu)

    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)).to(device)
    x = euler(ideal, noise, flow_sigmas(400).to(device))
    assert torch.allclose(x, mu + s * noise, atol=0.02)
