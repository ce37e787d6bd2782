"""Toybox, the embedded text-to-image model: its four networks, their files, and text to pictures without a host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import pipeline
from ..diffusion import Prediction
from ..models.conditioning import encode_prompts
from ..models.unet import UNet
from ..models.vae import VAE
from ..pipeline import STEPS, Pipeline, noun_rows, seeded
from .configs import TOYBOX, TOYBOX_TEXT, TOYBOX_VAE, TOYBOX_VISION

if TYPE_CHECKING:
    from ..models.clip import TextModel, VisionModel

__all__ = [
    "CUSTOMISED_GUIDANCE",
    "GUIDANCE",
    "NETWORKS",
    "SIZE",
    "STEPS",
    "WEIGHTS",
    "Toybox",
    "initial_noise",
    "load_network",
    "noun_rows",
    "save_weights",
    "seeded",
    "weight_file",
]

WEIGHTS = Path(__file__).with_name("weights")
NETWORKS = ("unet", "vae", "text", "vision")
SIZE = 96  # pixels a side
GUIDANCE = 4.0
CUSTOMISED_GUIDANCE = 2.0  # a residual is amplified with the rest of the condition: what is right at 1 is garish at 4
_TABLE = "text_model.embeddings.token_embedding.weight"
_TOKENS = "token_ids"


_REINSTALL = "They ship with the pack: reinstall it, or train them with `python -m training.toybox` from a checkout."
_ADVICE = {
    "judge": "Only the demo and the benchmarks need the judge, so it is no part of an installed pack: `git clone` the "
    "repository and run them there."
}


def weight_file(network: str, folder: Path | None = None) -> Path:
    """Where a network's weights are; FileNotFoundError says what is missing and how to get it."""
    path = (folder or WEIGHTS) / f"toybox_{network}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"Toybox weights not found: {path}. {_ADVICE.get(network, _REINSTALL)}")
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
    for network, module in zip(NETWORKS, (unet, vae, text, vision), strict=True):
        state = {name: value.detach().half().contiguous() for name, value in module.state_dict().items()}
        if network == "text":
            state[_TABLE] = state[_TABLE][tokens].contiguous()
            state[_TOKENS] = tokens.to(torch.int32)
        path = folder / f"toybox_{network}.safetensors"
        save_file(state, path, metadata={"format": "pt", "architecture": "Toybox", "network": network})
        sizes[network] = path.stat().st_size
    return sizes


@dataclass
class Toybox(Pipeline):
    """The four networks, in evaluation mode and frozen."""

    unet: UNet
    vae: VAE
    text: TextModel
    vision: VisionModel
    size: ClassVar[int] = SIZE
    prediction: ClassVar[Prediction] = "eps"
    guidance: ClassVar[float] = GUIDANCE
    customised_guidance: ClassVar[float] = CUSTOMISED_GUIDANCE
    base: ClassVar[str] = "Toybox"
    path: ClassVar[None] = None

    @classmethod
    def load(cls, folder: Path | None = None) -> Toybox:
        """Load the shipped weights, or those of another folder; RuntimeError if a file does not fit its network."""
        from ..models.clip import TextModel, VisionModel  # with transformers, which the pack does not wait for

        networks = (UNet(TOYBOX), VAE(TOYBOX_VAE), TextModel(TOYBOX_TEXT), VisionModel(TOYBOX_VISION))
        for name, network in zip(NETWORKS, networks, strict=True):
            network.load_state_dict(load_network(name, folder), strict=True)
            network.eval().requires_grad_(False)
        return cls(*networks)

    @property
    def towers(self) -> tuple[TextModel, ...]:
        return (self.text,)

    @torch.no_grad()
    def context(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts -> (B, L, 128); see `encode_prompts`."""
        return encode_prompts([self.text], prompts)[0]

    def embedded(self, prompts: str | Sequence[str], size: tuple[int, int]) -> tuple[Tensor, None]:
        return self.context(prompts), None


def initial_noise(generators: Sequence[torch.Generator], cells: int = SIZE // 8) -> Tensor:
    """Unit noise (B, 4, cells, cells), each row from its own generator."""
    return pipeline.initial_noise(generators, cells)
