"""Six-bit storage: exact where it must be, and an error that the layer it is used in does not notice."""

import pytest
import torch
from torch.nn import functional as F

from profusion.residual import packing

SCALES = (1e-35, 1e-20, 1e-3, 1.0, 1e6, 1e30)


def values(kind: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """Test data by the name of its distribution."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "heavy":  # Student's t with 3 degrees of freedom
        return normal / torch.randn(3, *shape, generator=generator).square().mean(dim=0).sqrt()
    if kind == "uniform":
        return torch.rand(shape, generator=generator) - 0.5
    return {"gaussian": normal, "signs": normal.sign() * 0.02}[kind]


def stored(original: torch.Tensor) -> torch.Tensor:
    return packing.dequantise(*packing.quantise(original), original.shape[1])


def test_four_codes_take_three_bytes_and_come_back():
    codes = torch.randint(0, 64, (3, 5, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = packing.pack(codes)
    assert packed.shape == (3, 5, 48)
    assert packed.dtype == torch.uint8
    assert torch.equal(packing.unpack(packed), codes)
    assert packing.pack(torch.tensor([1, 2, 3, 63], dtype=torch.uint8)).tolist() == [0b10000001, 0b00110000, 0b11111100]


def test_levels_rise_and_are_symmetric():
    assert len(packing.LEVELS) == 64
    assert (packing.LEVELS.diff() > 0).all()
    assert torch.equal(packing.LEVELS, -packing.LEVELS.flip(0))
    assert packing.LEVELS[-1] == 1


@pytest.mark.parametrize("kind, most", [("gaussian", 0.019), ("heavy", 0.024), ("uniform", 0.017), ("signs", 0.001)])
@pytest.mark.parametrize("scale", SCALES)
def test_error_is_small_whatever_the_scale(kind, most, scale):
    original = values(kind, 16, 768)
    error = (stored(original * scale) / scale - original).norm() / original.norm()
    assert error < most


@pytest.mark.parametrize("width", [1, 31, 32, 33, 100, 768])
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "uniform", "signs"])
def test_storing_twice_is_storing_once(kind, width):
    once = stored(values(kind, 7, width))
    assert once.shape == (7, width)
    assert torch.equal(stored(once), once)


def test_zeros_stay_zeros_without_a_sign():
    original = values("gaussian", 4, 96)
    original[1] = 0
    original[2, 32:64] = 0
    result = stored(original)
    assert torch.equal(result == 0, original == 0)
    assert not torch.signbit(result[1]).any()


def test_the_largest_and_the_smallest_floats_survive():
    extremes = torch.tensor([[3.4e38, -3.4e38, 1e-45] + [0.0] * 29, [1e-45] * 32])
    assert torch.isfinite(stored(extremes)).all()


@pytest.mark.parametrize("kind", ["gaussian", "heavy"])
@pytest.mark.parametrize("strength", [1, 10])
def test_a_cross_attention_moves_by_two_percent_of_what_the_residual_moves_it(kind, strength):
    """SD 1.5's shapes: 77 tokens of 768, 8 heads, 320 channels, the residual on the value of one token."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    n, context = normal(256, 320), normal(77, 768)
    to_q, to_k, to_v = normal(320, 320) / 320**0.5, normal(768, 320) / 768**0.5, normal(768, 320) / 768**0.5

    def layer(delta: torch.Tensor) -> torch.Tensor:
        value = context.clone()
        value[4] += delta
        projected = n @ to_q, context @ to_k, value @ to_v
        return F.scaled_dot_product_attention(*(x.unflatten(-1, (8, -1)).transpose(0, 1) for x in projected))

    delta = values(kind, 1, 768) * strength
    plain, exact, six_bits = layer(torch.zeros(768)), layer(delta[0]), layer(stored(delta)[0])
    assert (six_bits - exact).norm() < 0.025 * (exact - plain).norm()
