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
from .drawing import SIZE

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
CELLS = SIZE // 8  # latent cells a side
GUIDANCE = 4.0
CUSTOMISED_GUIDANCE = 2.0  # a residual is amplified with the rest of the condition: what is right at 1 is garish at 4
_TABLE = "text_model.embeddings.token_embedding.weight"
_TOKENS = "token_ids"
_STEP = ".step"
EIGHT_BITS = ("mmdit",)  # with it in fp16 all files together would be more than an extension should weigh


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
    state = _from_eight_bits(state)
    if network == "text":
        with safe_open(weight_file(network, folder), "pt") as file:
            tokens = file.get_tensor(_TOKENS)
        table = torch.zeros(TOYBOX_TEXT.vocabulary, TOYBOX_TEXT.width)
        table[tokens.long()] = state[_TABLE]
        state[_TABLE] = table
    return state


def save_network(network: str, module: nn.Module, folder: Path | None = None, tokens: Tensor | None = None) -> int:
    """Write one network's file, where `load_network` finds it: in fp16, and the matrices of those of EIGHT_BITS in 8
    bits; of the text tower's table the rows of `tokens` alone. Returns the bytes written."""
    state = {name: value.detach().float().cpu() for name, value in module.state_dict().items()}
    state = _in_eight_bits(state) if network in EIGHT_BITS else {name: value.half() for name, value in state.items()}
    state = {name: value.contiguous() for name, value in state.items()}
    if network == "text":
        state[_TABLE] = state[_TABLE][tokens].contiguous()
        state[_TOKENS] = tokens.to(torch.int32)
    folder = folder or WEIGHTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"toybox_{network}.safetensors"
    save_file(state, path, metadata={"format": "pt", "architecture": "Toybox", "network": network})
    return path.stat().st_size


def _in_eight_bits(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as whole numbers in -127..127, each row with its own step, which is beside them; the rest in fp16."""
    packed = {}
    for name, value in state.items():
        if value.ndim < 2:
            packed[name] = value.half()
            continue
        rows = value.flatten(1)
        step = rows.abs().amax(dim=1).clamp(min=1e-8) / 127
        packed[name] = (rows / step[:, None]).round().to(torch.int8).view(value.shape)
        packed[name + _STEP] = step
    return packed


def _from_eight_bits(state: dict[str, Tensor]) -> dict[str, Tensor]:
    steps = {name.removesuffix(_STEP): value for name, value in state.items() if name.endswith(_STEP)}
    return {
        name: value * steps[name].view(-1, *[1] * (value.ndim - 1)) if name in steps else value
        for name, value in state.items()
        if not name.endswith(_STEP)
    }


def save_weights(
    folder: str | Path | None, *, unet: nn.Module, vae: nn.Module, text: nn.Module, vision: nn.Module, tokens: Tensor
) -> dict[str, int]:
    """Write the four files. Returns bytes by network."""
    networks, folder = dict(zip(NETWORKS, (unet, vae, text, vision), strict=True)), Path(folder or WEIGHTS)
    return {name: save_network(name, module, folder, tokens) for name, module in networks.items()}


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
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.unet.parameters()).device

    @property
    def towers(self) -> tuple[TextModel, ...]:
        return (self.text,)

    @torch.no_grad()
    def context(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts -> (B, L, 128); see `encode_prompts`."""
        return encode_prompts([self.text], prompts)[0]

    def embedded(self, prompts: str | Sequence[str], size: tuple[int, int]) -> tuple[Tensor, None]:
        return self.context(prompts), None


def initial_noise(generators: Sequence[torch.Generator], cells: int = CELLS) -> Tensor:
    """Unit noise (B, 4, cells, cells), each row from its own generator."""
    return pipeline.initial_noise(generators, cells)
