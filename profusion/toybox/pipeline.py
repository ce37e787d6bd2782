"""Toybox, the embedded text-to-image model: its four networks, their files, and text to pictures without a host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..diffusion import eps_denoiser, noise_predictor, sample_euler, sampling_sigmas
from ..infusion import Patches, Placement, cross_attention_layers, on_conditional
from ..models.tokenizer import START, id_to_text, tokenize, words_to_ids
from ..models.unet import UNet
from ..models.vae import VAE
from ..pictures import latent_masks
from ..prompt import NounError, find_noun
from ..residual import Residual
from ..residual.training import NOUN_PROMPTS, PredictWithPatches, Reference, ResidualTraining, TrainingOptions
from ..streams import Evaluate, two_stream_denoiser
from .configs import TOYBOX, TOYBOX_TEXT, TOYBOX_VAE, TOYBOX_VISION
from .drawing import SIZE

if TYPE_CHECKING:
    from ..models.clip import TextModel, VisionModel

WEIGHTS = Path(__file__).with_name("weights")
NETWORKS = ("unet", "vae", "text", "vision")
CELLS = SIZE // 8  # latent cells a side
GUIDANCE = 4.0
CUSTOMISED_GUIDANCE = 2.0  # a residual is amplified with the rest of the condition: what is right at 1 is garish at 4
STEPS = 30
Callback = Callable[[int, Tensor], None]
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
class Toybox:
    """The four networks, in evaluation mode and frozen."""

    unet: UNet
    vae: VAE
    text: TextModel
    vision: VisionModel

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

    def context(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts -> (B, 77, 128)."""
        return encode_prompts(self.text, prompts)

    def evaluator(self, context: Tensor, guidance: float = GUIDANCE) -> Evaluate:
        """The UNet under classifier-free guidance as `evaluate(x, sigma, patches) -> denoised`; context (B, 77,
        128)."""
        both_contexts = torch.cat([context, self.context("").expand_as(context)])

        def evaluate(x: Tensor, sigma: Tensor, patches: Patches) -> Tensor:
            options = {"patches": patches, "cond_or_uncond": [0, 1]}

            def predict_noise(x: Tensor, t: Tensor) -> Tensor:
                both = self.unet(torch.cat([x, x]), torch.cat([t, t]), both_contexts, transformer_options=options)
                conditional, unconditional = both.chunk(2)
                return unconditional + guidance * (conditional - unconditional)

            return eps_denoiser(predict_noise)(x, sigma)

        return evaluate

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        callback: Callback | None = None,
    ) -> Tensor:
        """One picture a prompt, each from its own CPU generator -> latents (B, 4, CELLS, CELLS)."""
        evaluate = self.evaluator(self.context(prompts), guidance)
        noise, sigmas = initial_noise(generators).to(self.device), sampling_sigmas(steps).to(self.device)
        return sample_euler(lambda x, sigma: evaluate(x, sigma, {}), noise, sigmas, callback)

    @torch.no_grad()
    def generate_customised(
        self,
        prompt: str,
        residuals: Sequence[Residual],
        generators: Sequence[torch.Generator],
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        strength: float = 1.0,
        shared_latent: bool = False,
        callback: Callback | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both streams of a prompt, a picture a generator -> plain and customised latents, (B, 4, CELLS, CELLS)
        each."""
        placements = [
            Placement(item.delta, item.layers, noun_rows(prompt, item.noun), strength=strength) for item in residuals
        ]
        context = self.context(prompt).expand(len(generators), -1, -1)
        denoise = two_stream_denoiser(self.evaluator(context, guidance), on_conditional(placements), shared_latent)
        noise = initial_noise(generators)
        plain, customised = sample_euler(denoise, torch.cat([noise, noise]), sampling_sigmas(steps), callback).chunk(2)
        return plain, customised

    def noise_predictor(self, prompts: Sequence[str]) -> PredictWithPatches:
        """How `ResidualTraining` evaluates Toybox with these prompts, whose contexts are made once."""
        contexts = self.context(prompts)

        def predict(x: Tensor, sigma: Tensor, prompt: int, patches: Patches) -> Tensor:
            context = contexts[prompt].expand(len(x), -1, -1)
            options = {"patches": patches, "cond_or_uncond": [0]}
            network = noise_predictor(lambda x, t: self.unet(x, t, context, transformer_options=options))
            return network(x, sigma)

        return predict

    def training(
        self,
        pictures: Tensor,
        masks: Tensor,
        noun: str,
        options: TrainingOptions,
        resume: Residual | None = None,
    ) -> ResidualTraining:
        """A residual's training on pictures (M, H, W, 3) in [0, 1] and masks (M, H, W); H and W multiples of 8."""
        prompts = [prompt.format(noun) for prompt in NOUN_PROMPTS]
        sides = [self.references(pictures, masks)]
        if options.flip:
            sides.append(self.references(pictures.flip(2), masks.flip(2)))
        layers = cross_attention_layers(dict(self.unet.named_parameters()))
        rows = [noun_rows(prompt, noun) for prompt in prompts]
        return ResidualTraining(
            self.noise_predictor(prompts),
            sides[0],
            rows,
            layers,
            noun,
            options,
            sides[-1] if options.flip else (),
            resume,
        )

    def references(self, pictures: Tensor, masks: Tensor) -> list[Reference]:
        """Pictures (M, H, W, 3) and masks (M, H, W) as a training takes them."""
        latents = self.vae.latents(pictures)
        weights = latent_masks(masks, latents.shape[-2:])
        return [Reference(latent, weight) for latent, weight in zip(latents, weights, strict=True)]


@torch.no_grad()
def encode_prompts(text: TextModel, prompts: str | Sequence[str]) -> Tensor:
    """Prompts through the text tower, (B, 77, width), on its device."""
    tokens = tokenize([prompts] if isinstance(prompts, str) else list(prompts))
    return text(tokens.to(next(text.parameters()).device))


def noun_rows(prompt: str, noun: str) -> tuple[int, ...]:
    """The context rows of a noun's last place in a prompt ("a photo of a photo"); NounError, which quotes the prompt,
    if it has none."""
    ids, wanted = words_to_ids(prompt), words_to_ids(noun)
    chunk = [(START, 0), *((token, 1) for token in ids)]
    spans = find_noun([chunk], wanted, lambda token: id_to_text(token).endswith("</w>"))
    if not spans:
        raise NounError(f"the noun {noun!r} is not in the prompt {prompt!r}; write it there as a word of its own")
    return spans[-1]


def initial_noise(generators: Sequence[torch.Generator], cells: int = CELLS) -> Tensor:
    """Unit noise (B, 4, cells, cells), each row from its own generator."""
    return torch.stack([torch.randn(4, cells, cells, generator=generator) for generator in generators])


def seeded(*seeds: int) -> list[torch.Generator]:
    """A CPU generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
