"""Toybox, the embedded text-to-image model: its four networks, their files, and text to pictures without a host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from profusion.diffusion import eps_denoiser, sample_euler, sampling_sigmas
from profusion.models.clip import TextModel, VisionModel
from profusion.models.configs import TOYBOX, TOYBOX_TEXT, TOYBOX_VAE, TOYBOX_VISION
from profusion.models.tokenizer import tokenize
from profusion.models.unet import UNet
from profusion.models.vae import VAE

WEIGHTS = Path(__file__).with_name("weights")
NETWORKS = ("unet", "vae", "text", "vision")
SIZE = 96  # pixels a side
GUIDANCE = 4.0
STEPS = 30
_TABLE = "text_model.embeddings.token_embedding.weight"
_TOKENS = "token_ids"


def weight_file(network: str, folder: Path | None = None) -> Path:
    """Where a network's weights are; FileNotFoundError says what is missing and how to get it."""
    path = (folder or WEIGHTS) / f"toybox_{network}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"Toybox weights not found: {path}. They ship with the pack: reinstall it, or train them with "
            "`python -m training.toybox` from a checkout."
        )
    return path


def load_network(network: str, folder: Path | None = None) -> dict[str, Tensor]:
    """A network's state dict in float32, under the host's names, the whole token table rebuilt.

    The file keeps only the embedding rows of words that Toybox was taught; every other word is a row of zeros, which
    means nothing to it.
    """
    state = {name: value.float() for name, value in load_file(weight_file(network, folder)).items() if name != _TOKENS}
    if network == "text":
        with safe_open(weight_file(network, folder), "pt") as file:
            tokens = file.get_tensor(_TOKENS)
        table = torch.zeros(TOYBOX_TEXT.vocabulary, TOYBOX_TEXT.width)
        table[tokens.long()] = state[_TABLE]
        state[_TABLE] = table
    return state


def save_weights(
    folder: str | Path | None, *, unet: nn.Module, vae: nn.Module, text: nn.Module, vision: nn.Module, tokens: Tensor
) -> dict[str, int]:
    """Write the four files in fp16; `tokens` are the ids whose embedding rows are kept. Returns bytes by network."""
    folder = Path(folder or WEIGHTS)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for network, module in zip(NETWORKS, (unet, vae, text, vision)):
        state = {name: value.detach().half().contiguous() for name, value in module.state_dict().items()}
        if network == "text":
            state[_TABLE] = state[_TABLE][tokens].contiguous()
            state[_TOKENS] = tokens.to(torch.int32)
        path = folder / f"toybox_{network}.safetensors"
        save_file(state, path, metadata={"format": "pt", "architecture": "Toybox", "network": network})
        sizes[network] = path.stat().st_size
    return sizes


@dataclass
class Toybox:
    """The four networks, in evaluation mode and frozen."""

    unet: UNet
    vae: VAE
    text: TextModel
    vision: VisionModel

    @classmethod
    def load(cls, folder: Path | None = None) -> Toybox:
        """Load the shipped weights, or those of another folder; RuntimeError if a file does not fit its network."""
        networks = (UNet(TOYBOX), VAE(TOYBOX_VAE), TextModel(TOYBOX_TEXT), VisionModel(TOYBOX_VISION))
        for name, network in zip(NETWORKS, networks):
            network.load_state_dict(load_network(name, folder), strict=True)
            network.eval().requires_grad_(False)
        return cls(*networks)

    @torch.no_grad()
    def context(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts -> (B, 77, 128)."""
        return self.text(tokenize([prompts] if isinstance(prompts, str) else list(prompts)))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """One picture a prompt, each from its own generator -> latents (B, 4, 12, 12). Classifier-free guidance."""
        context, empty = self.context(prompts), self.context("").expand(len(prompts), -1, -1)

        def predict_noise(x: Tensor, t: Tensor) -> Tensor:
            both = self.unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([context, empty]))
            conditional, unconditional = both.chunk(2)
            return unconditional + guidance * (conditional - unconditional)

        return sample_euler(eps_denoiser(predict_noise), initial_noise(generators), sampling_sigmas(steps), callback)


def initial_noise(generators: Sequence[torch.Generator], cells: int = SIZE // 8) -> Tensor:
    """Unit noise (B, 4, cells, cells), each row from its own generator."""
    return torch.stack([torch.randn(4, cells, cells, generator=generator) for generator in generators])


def seeded(*seeds: int) -> list[torch.Generator]:
    """A CPU generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
