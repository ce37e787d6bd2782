"""A small UNet's training of a residual, as the tests of it take it."""

import torch

from profusion.diffusion import noise_predictor
from profusion.infusion import cross_attention_layers
from profusion.models.configs import UNetConfig
from profusion.residual.training import Reference, ResidualTraining, TrainingOptions

SMALL = UNetConfig(32, (1, 2), 1, (1, 1), 1, 24, num_heads=2)
LENGTH, ROWS = 11, ((4,), (5, 6))


def device_of(unet):
    return next(unet.parameters()).device


def predictor(unet, note=lambda *_: None):
    """The UNet as a training sees it, with two prompts."""
    contexts = torch.randn(2, LENGTH, SMALL.context_dim, generator=torch.Generator().manual_seed(1))
    contexts = contexts.to(device_of(unet))

    def predict(x, sigma, prompt, patches):
        note(x, sigma, prompt, patches)
        options = {"patches": patches, "cond_or_uncond": [0]}
        context = contexts[prompt].expand(len(x), -1, -1)
        return noise_predictor(lambda x, t: unet(x, t, context, transformer_options=options))(x, sigma)

    return predict


def references(count=2, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [Reference(torch.randn(4, 8, 8, generator=generator), torch.ones(8, 8)) for _ in range(count)]


def training(unet, options=None, predict=None, **inputs):
    layers = cross_attention_layers(dict(unet.named_parameters()))
    inputs = {"references": references(), "flipped": references(seed=3), **inputs}
    for name in ("references", "flipped"):
        inputs[name] = [Reference(item.latent.to(device_of(unet)), item.mask) for item in inputs[name]]
    arguments = inputs.pop("references"), ROWS, layers, "ball", options or TrainingOptions(steps=4, batch_size=2)
    return ResidualTraining(predict or predictor(unet), *arguments, **inputs)


def trained(unet, steps, **options):
    run = training(unet, TrainingOptions(steps=steps, batch_size=2, **options))
    return run, list(run.steps())


def same(one, other):
    assert torch.equal(one.delta, other.delta) and one.steps == other.steps
    assert one.training_state.keys() == other.training_state.keys()
    for name, value in one.training_state.items():
        assert torch.equal(value, other.training_state[name])
