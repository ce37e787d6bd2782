"""What a training step keeps for its backward pass, beside a plain backward pass of the same model.

    python -m benchmarks.training_memory [--model sd15|toybox] [--cells 8 16]

The weights are random: memory does not depend on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from profusion.diffusion import noise_predictor
from profusion.infusion import Patches, Placement, cross_attention_layers, customised_patches
from profusion.models.configs import SD15
from profusion.models.unet import UNet
from profusion.residual.training import Reference, ResidualTraining, TrainingOptions, masked_noise_error
from profusion.toybox.configs import TOYBOX

MODELS = {"sd15": SD15, "toybox": TOYBOX}
ROWS = (5,)


def saved_numbers(work: Callable[[], Tensor], apart_from: nn.Module) -> int:
    """How many numbers autograd keeps for the backward pass of `work()`, each memory counted once, weights not at all."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in apart_from.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor.untyped_storage().nbytes() // 4, tensor  # held, so that no place is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(size for size, _ in kept.values())


def measure(unet: UNet, cells: int) -> tuple[int, int]:
    """Numbers that a step at batch 1 keeps, and those that the plain model's would, on a latent of cells x cells."""
    layers = cross_attention_layers(dict(unet.named_parameters()))
    context = torch.randn(1, 77, unet.config.context_dim)

    def predict(x: Tensor, sigma: Tensor, prompt: int, patches: Patches) -> Tensor:
        options = {"patches": patches, "cond_or_uncond": [0]}
        return noise_predictor(lambda x, t: unet(x, t, context, transformer_options=options))(x, sigma)

    references = [Reference(torch.randn(4, cells, cells), torch.ones(cells, cells))]
    training = ResidualTraining(predict, references, [ROWS], layers, "cat", TrainingOptions(batch_size=1))
    batch = training.batch()

    def plain() -> Tensor:
        placement = Placement(training.delta, tuple(layer.name for layer in layers), ROWS)
        patches = customised_patches({}, lambda options, chunk: (placement,))
        own_queries = {**patches, "attn2_patch": patches["attn2_patch"][1:]}
        return masked_noise_error(predict(batch.noisy, batch.sigma, 0, own_queries), batch.noise, batch.mask)

    return saved_numbers(lambda: training.loss(batch), unet), saved_numbers(plain, unet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="toybox")
    parser.add_argument("--cells", type=int, nargs="+", default=[8, 16])
    arguments = parser.parse_args()
    unet = UNet(MODELS[arguments.model]).requires_grad_(False)
    for cells in arguments.cells:
        step, plain = measure(unet, cells)
        print(
            f"{arguments.model}, latent {cells}x{cells}: a step keeps {step:,} numbers, {step / cells**2:,.0f} a cell; "
            f"the plain model {plain:,} ({(step - plain) / plain:+.2%})"
        )


if __name__ == "__main__":
    main()
