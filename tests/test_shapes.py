"""What Infusion finds in the networks of real checkpoints, without their memory."""

import pytest
import torch

from profusion.infusion import architecture_name, cross_attention_layers
from profusion.models.configs import SD15, SD21, SDXL
from profusion.models.unet import UNet

# name, configuration, cross-attentions, their context's width, parameters in all
CHECKPOINTS = [
    ("SD 1.x", SD15, 16, 768, 859_520_964),
    ("SD 2.x", SD21, 16, 1024, 865_910_724),
    ("SDXL", SDXL, 70, 2048, 2_567_463_684),
]


@pytest.mark.parametrize(("name", "config", "count", "width", "size"), CHECKPOINTS, ids=lambda value: str(value)[:6])
def test_the_layers_of_a_checkpoint_are_found(name, config, count, width, size):
    with torch.device("meta"):
        parameters = dict(UNet(config).named_parameters())
    layers = cross_attention_layers(parameters)
    assert sum(parameter.numel() for parameter in parameters.values()) == size
    assert len(layers) == count and {layer.context_dim for layer in layers} == {width}
    assert architecture_name(layers) == name
    kinds = [layer.name.split(".")[0] for layer in layers]
    assert (
        kinds == sorted(kinds, key=("input", "middle", "output").index)
        and len({*(layer.name for layer in layers)}) == count
    )
