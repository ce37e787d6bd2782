"""A PromptNet's tensors by its configuration are those of the network, and its sizes have bounds."""

from dataclasses import replace

import pytest
import torch

from profusion.models.configs import SD15, SDXL, UNetConfig
from profusion.promptnet.network import SD15_PROMPTNET, SD21_PROMPTNET, SDXL_PROMPTNET, PromptNet, PromptNetConfig
from profusion.promptnet.shapes import promptnet_shapes
from profusion.toybox.configs import TOYBOX_PROMPTNET

DEEP = UNetConfig(32, (1, 3, 2), 3, (0, 2, 1), 4, 40, head_channels=16, use_linear=True, in_channels=9)
CONFIGS = {
    "SD 1.x": SD15_PROMPTNET,
    "SD 2.x": SD21_PROMPTNET,
    "SDXL": SDXL_PROMPTNET,
    "Toybox": TOYBOX_PROMPTNET,
    "noisy": replace(TOYBOX_PROMPTNET, second_latent="noisy", tokens=3),
    "deep": PromptNetConfig(DEEP, 20, (24, 8), 2, 5, 6, "reference", normalise=False),
    "one level": PromptNetConfig(UNetConfig(32, (2,), 1, (1,), 0, 8, num_heads=2), 20, (24,)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_those_of_the_network(name):
    with torch.device("meta"):
        state = PromptNet(CONFIGS[name]).state_dict()
    listed = list(promptnet_shapes(CONFIGS[name]))
    assert len(listed) == len(state)
    assert dict(listed) == {name: tuple(value.shape) for name, value in state.items()}


def test_whoever_has_enough_stops():
    config = replace(SD15_PROMPTNET, unet=replace(SD15, middle_depth=64, transformer_depth=(64, 64, 64, 64)))
    shapes = promptnet_shapes(config)
    assert len([next(shapes) for _ in range(100)]) == 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_channels", 32 * 1000),
        ("model_channels", 64.0),
        ("model_channels", 0),
        ("channel_mult", (1, 2, 65, 4)),
        ("channel_mult", (1, 2, -1, 4)),
        ("channel_mult", (1, True, 2, 2)),
        ("num_res_blocks", 10**9),
        ("num_res_blocks", 0),
        ("transformer_depth", (65, 1, 1, 1)),
        ("middle_depth", 10**6),
        ("middle_depth", "1"),
        ("context_dim", 10**9),
        ("in_channels", 0),
        ("num_heads", 10**9),
        ("num_heads", 7),
    ],
)
def test_a_unets_sizes_have_bounds(field, value):
    with pytest.raises(ValueError, match=field):
        replace(SD15, **{field: value})


def test_a_unet_has_at_most_eight_levels():
    with pytest.raises(ValueError, match="1 to 8 levels"):
        replace(SD15, channel_mult=(1,) * 9, transformer_depth=(1,) * 9)
    with pytest.raises(ValueError, match="1 to 8 levels"):
        replace(SD15, channel_mult=(), transformer_depth=())
    with pytest.raises(ValueError, match="head_channels=7"):
        replace(SDXL, head_channels=7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_width", 10**9),
        ("text_widths", (768,) * 9),
        ("text_widths", (10**9,)),
        ("text_widths", ("768",)),
        ("tokens", 10**9),
        ("tokens", 1.5),
        ("grid", 10**6),
        ("projection", 10**6),
        ("holds_position", 1),
        ("normalise", "yes"),
    ],
)
def test_a_promptnets_sizes_have_bounds(field, value):
    with pytest.raises(ValueError, match=field):
        replace(SD15_PROMPTNET, **{field: value})
