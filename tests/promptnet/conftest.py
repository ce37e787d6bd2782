"""A PromptNet, the UNet it serves and a text tower, all tiny."""

from types import SimpleNamespace

import pytest
import torch

from profusion.models.clip import TextModel
from profusion.models.configs import TextConfig, UNetConfig
from profusion.models.unet import UNet
from profusion.promptnet.network import PromptNet, PromptNetConfig, typical_embedding

SMALL = UNetConfig(32, (1, 2), 1, (1, 1), 1, 24, num_heads=2)
TEXT = TextConfig(24, 2, 2, 48)


@pytest.fixture(scope="session")
def small():
    """unet, text and vision width of a model; `promptnet(**changes)` makes one from its
    UNet, `stirred` a random one."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        unet = UNet(SMALL).eval().requires_grad_(False)
        text = TextModel(TEXT).eval().requires_grad_(False)
        text.text_model.embeddings.token_embedding.weight.mul_(0.1)

    def promptnet(**changes):
        config = PromptNetConfig(
            SMALL, **{"image_width": 20, "text_widths": (24,), "grid": 2, "projection": 8, **changes}
        )
        start, spread = typical_embedding(text.text_model.embeddings.token_embedding.weight)
        generator = torch.Generator().manual_seed(1)
        if config.text_widths != (24,):
            return PromptNet.from_unet(unet.state_dict(), config, generator)
        return PromptNet.from_unet(unet.state_dict(), config, generator, start, spread)

    def stirred(**changes):
        network, generator = promptnet(**changes), torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                noise = 0.05 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise if name.startswith(("output", "second_latent")) else 0.2 * noise)
        return network.eval().requires_grad_(False)

    return SimpleNamespace(unet=unet, text=text, promptnet=promptnet, stirred=stirred, config=SMALL)
