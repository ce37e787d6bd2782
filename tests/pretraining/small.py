"""A base model like Stable Diffusion's, far too small to draw, and a PromptNet for it."""

import torch

from profusion.models.clip import TextModel
from profusion.models.conditioning import TextTowers
from profusion.models.unet import UNet
from profusion.models.vae import VAE
from profusion.pretraining.engine import Engine, PretrainingOptions
from profusion.pretraining.objective import Objective
from profusion.pretraining.promptnet import config_for, new_promptnet
from profusion.stable_diffusion import StableDiffusion
from tests.shrunken import TEXTS, UNETS, drawn, vae_config

SIDE, WIDTH, TOKENS = 32, 24, 5


def filled(network, seed):
    network.load_state_dict(drawn(network, seed))
    return network.eval().requires_grad_(False)


def base(family="SD 1.x"):
    towers = tuple(filled(TextModel(config), 3 + index) for index, config in enumerate(TEXTS[family]))
    unet, vae = filled(UNet(UNETS[family]), 1), filled(VAE(vae_config(family)), 2)
    return StableDiffusion(unet, vae, TextTowers(towers), "eps", SIDE, family)


def network_for(model, layout="profusion", with_noise=False):
    widths = [tower.sizes.width for tower in model.towers]
    network = new_promptnet(model, config_for(model.unet.config, widths, WIDTH, 1, with_noise, layout))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # in the beginning, S* depends on nothing
        network.output.weight.normal_(generator=generator).mul_(0.05)
        if network.config.second_latent != "none":
            network.second_latent[2].weight.normal_(generator=generator).mul_(0.05)
    return network


def engine_for(ranks, family="SD 1.x", shard=False, checkpointing=False, with_noise=False, exact=False, **options):
    """exact: in float64, where rounding is out of the way."""
    model = base(family)
    network = network_for(model, with_noise=with_noise)
    for module in (model.unet, *model.towers, network) if exact else ():
        module.double()
    given = {"steps": 4, "learning_rate": 1e-3, "batch_size": 8, **options}
    chosen = PretrainingOptions(**given)
    objective = Objective(network, model, chosen.prompts)
    return Engine(objective, chosen, ranks, shard, checkpointing)


def pictures(rows=8, seed=0):
    """Latents and image tokens of a global batch."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 4, SIDE // 2, SIDE // 2, generator=generator)
    return latents, torch.randn(rows, TOKENS, WIDTH, generator=generator)
