"""Train PromptNet on pictures alone (ProFusion, arXiv 2305.13579, section 3.1): no captions, no regularisation.

    min_PromptNet  E || eps_theta(x_t, t, text("a photo of S*(z, c, t[, x_t])")) - eps ||^2

The UNet and the text encoder are frozen; gradients pass through both. Who evaluates them is the caller's affair, so
that the kernel's networks and a host's are trained by the same code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion import per_row, timestep_of, training_sigmas, variance_preserving
from ..keeping import digest
from ..loop import Group, LoopOptions, TrainingError, TrainingLoop, check_whole, generator_of
from ..losses import weighted_noise_error
from .file import load_training, save_promptnet
from .network import PromptNet
from .pseudo_word import PLACEHOLDER, split_prompt

WITHOUT_GRADIENT = (
    "something on the model or in the text encoder computes without one, as compiled models and kernels made for "
    "inference do. Use the model as it was before that"
)
_ADVICE = "Give what it was trained with, or begin anew in another file"
WORD_PROMPTS = (f"a photo of {PLACEHOLDER}", f"a picture of {PLACEHOLDER}", PLACEHOLDER)

PredictWithContext = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`predict_noise(x, sigma, context) -> eps`: x = x0 + sigma * eps of (B, C, H, W), sigma (B,), context (B, L, D)."""

EncodeWord = Callable[[int, Tensor], Tensor]
"""`encode_word(prompt, pseudo_word) -> context` (B, L, D) of the prompt of this index with S* (B, tokens, width) in
it."""


@dataclass(frozen=True)
class PromptNetOptions(LoopOptions):
    """How a PromptNet is trained; see `LoopOptions`. The learning rate is the paper's by default.

    prompts: each with S* in it. warmup: steps over which it rises. cosine: whether it then falls to nothing at the
    last step. clip: largest norm of the gradient. weight_cap: rows weigh min(1 + sigma^2, this), which is
    min(1 / alpha_bar, this); 1 is the paper's loss, and more of it attends to the noise at which a word matters most.
    level_bias: noise level k of n is drawn with a probability in proportion to k^this; 0 draws all alike, as the paper
    does.
    """

    steps: int = 2000
    learning_rate: float = 2e-5
    batch_size: int = 8
    seed: int = 0
    prompts: tuple[str, ...] = WORD_PROMPTS
    warmup: int = 0
    cosine: bool = False
    clip: float = 1.0
    weight_cap: float = 1.0
    level_bias: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "warmup")
        if self.warmup < 0 or not self.clip > 0 or not self.weight_cap >= 1:
            raise ValueError(
                f"warmup={self.warmup} must not be negative, clip={self.clip} must be above 0 and "
                f"weight_cap={self.weight_cap} at least 1"
            )
        if not 0 <= self.level_bias <= 10:
            raise ValueError(f"level_bias={self.level_bias} must lie in 0..10; 0 draws all noise levels alike")
        if not self.prompts:
            raise ValueError(f"prompts: give at least one that has {PLACEHOLDER} in it")
        for prompt in self.prompts:
            split_prompt(prompt)


@dataclass(frozen=True)
class PictureSet:
    """Pictures as PromptNet takes them: latents (N, C, H, W), scaled as the UNet's, and image_tokens (N, L, width)."""

    latents: Tensor
    image_tokens: Tensor

    def __post_init__(self) -> None:
        if self.latents.ndim != 4 or self.image_tokens.ndim != 3 or len(self.latents) != len(self.image_tokens):
            raise ValueError(
                f"latents {tuple(self.latents.shape)} and image tokens {tuple(self.image_tokens.shape)} must be "
                "(N, C, H, W) and (N, L, width) of the same pictures"
            )
        if not len(self.latents):
            raise TrainingError("no pictures to train on")
        if not (torch.isfinite(self.latents).all() and torch.isfinite(self.image_tokens).all()):
            raise TrainingError(
                "a picture's latent or image tokens are not finite: run the VAE and CLIP vision in float32"
            )

    def __len__(self) -> int:
        return len(self.latents)

    def fingerprint(self) -> str:
        """Says whether two sets are the same pictures."""
        data = self.latents.contiguous().cpu().view(torch.uint8).reshape(-1).numpy()
        return f"{len(self)} pictures {hashlib.sha256(data).hexdigest()[:16]}"


@dataclass(frozen=True)
class PictureBatch:
    """Rows of the pictures to be drawn (B,), noise (B, C, H, W), sigma (B,), the prompt of all rows, and rows of the
    pictures that PromptNet is shown (B,); default: the same."""

    rows: Tensor
    noise: Tensor
    sigma: Tensor
    prompt: int
    shown: Tensor | None = None


def noise_weight(sigma: Tensor, cap: float) -> Tensor:
    """min(1 / alpha_bar, cap) = min(1 + sigma^2, cap) of each row: (B,) -> (B,)."""
    return (1 + sigma.float() ** 2).clamp_max(cap)


@dataclass(frozen=True)
class DrawnNoise:
    """What a step draws beside its pictures: one prompt for all rows, sigma (B,) and unit noise (B, C, H, W)."""

    prompt: int
    sigma: Tensor
    noise: Tensor


def draw_noise(
    options: PromptNetOptions,
    sigmas: Tensor,
    shape: tuple[int, int, int],
    generator: torch.Generator,
    count: int | None = None,
) -> DrawnNoise:
    """A prompt, and for each of `count` rows (default: `batch_size`) a noise level of the rising `sigmas` (n,) and
    noise of (C, H, W)."""
    count = options.batch_size if count is None else count
    prompt = int(torch.randint(len(options.prompts), (), generator=generator))
    share = torch.rand(count, generator=generator) ** (1 / (1 + options.level_bias))
    sigma = sigmas[(share * len(sigmas)).long().clamp_max(len(sigmas) - 1)]
    return DrawnNoise(prompt, sigma, torch.randn((count, *shape), generator=generator))


def words_of(
    network: PromptNet,
    reference: Tensor,
    image_tokens: Tensor,
    sigma: Tensor,
    noisy: Tensor,
    timesteps: Callable[[Tensor], Tensor] = timestep_of,
) -> Tensor:
    """S* of references' latents (B, C, H, W) and image tokens (B, L, width), while x = x0 + sigma * eps is `noisy`
    (B, C, H, W) at sigma (B,): (B, tokens, text_width)."""
    seen = variance_preserving(noisy, sigma) if network.config.with_noise else None
    return network(reference, timesteps(sigma), image_tokens, seen)


def learning_rate_at(step: int, options: PromptNetOptions) -> float:
    """The learning rate of a step, counted from 0: a linear rise, then constant or half a cosine."""
    rise = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
    if not options.cosine or step < options.warmup:
        return options.learning_rate * rise
    share = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


class PromptNetTraining(TrainingLoop):
    """One training run: `steps()` does the work on `network`, `save` and `resume` interrupt it without a trace.

    pictures: each is its own reference, unless a batch says otherwise. timesteps: the model's timestep of a sigma
    (B,) -> (B,); sigmas: its noise levels (n,), each as likely to be drawn; both default to Stable Diffusion's. groups:
    what learns; default all of the network. identity: says whether two trainings of one model are the same, from their
    beginning on.
    """

    def __init__(
        self,
        network: PromptNet,
        predict_noise: PredictWithContext,
        encode_word: EncodeWord,
        pictures: PictureSet,
        options: PromptNetOptions,
        timesteps: Callable[[Tensor], Tensor] = timestep_of,
        sigmas: Tensor | None = None,
        groups: Sequence[Group] = (),
    ):
        self.network, self.pictures = network, pictures
        self._predict_noise, self._encode_word, self._timesteps = predict_noise, encode_word, timesteps
        self._device = network.start.device
        with torch.inference_mode(False):  # a host may call in inference mode, whose tensors autograd does not take
            self._sigmas = (training_sigmas() if sigmas is None else sigmas).to("cpu", torch.float32, copy=True)
        groups = groups or [Group("PromptNet", dict(network.named_parameters()), WITHOUT_GRADIENT)]
        super().__init__(options, groups, self._targets(pictures)[0].numel(), options.clip)
        compared = {name: value for name, value in asdict(options).items() if name not in self._free()}
        for name, value in self._later().items():  # a training from before there was this option is the same one
            if compared.get(name) == value:
                del compared[name]
        start = {**network.state_dict(), **self._learned()}
        self.identity = digest(compared, pictures.fingerprint(), pictures.image_tokens, start)

    def learning_rate(self) -> float:
        """See `learning_rate_at`."""
        return learning_rate_at(self.step, self.options)

    def draw(self, generator: torch.Generator, pictures: int | None = None) -> PictureBatch:
        """Rows of so many pictures (default: all), noise of a level each, and one prompt for all rows."""
        count = self.options.batch_size
        rows = torch.randint(len(self.pictures) if pictures is None else pictures, (count,), generator=generator)
        drawn = draw_noise(self.options, self._sigmas, tuple(self._targets(self.pictures).shape[1:]), generator)
        return PictureBatch(rows, drawn.noise.to(self._device), drawn.sigma.to(self._device), drawn.prompt)

    def loss(self, batch: PictureBatch) -> Tensor:
        """The loss of a batch of the pictures."""
        return self.loss_of(self.pictures, batch)

    def loss_of(self, pictures: PictureSet, batch: PictureBatch, word: Tensor | None = None) -> Tensor:
        """The loss of a batch of any pictures; `word` (tokens, width) takes the place of every S*."""
        target = self._on_device(self._targets(pictures)[batch.rows])
        noisy = target + per_row(batch.sigma, target) * batch.noise
        if word is None:
            rows = batch.rows if batch.shown is None else batch.shown
            reference, image_tokens = (
                self._on_device(pictures.latents[rows]),
                self._on_device(pictures.image_tokens[rows]),
            )
            pseudo_word = words_of(self.network, reference, image_tokens, batch.sigma, noisy, self._timesteps)
        else:
            pseudo_word = word.to(self._device).expand(len(noisy), -1, -1)
        predicted = self._predict_noise(noisy, batch.sigma, self._encode_word(batch.prompt, pseudo_word))
        return self._error(predicted, pictures, batch, noise_weight(batch.sigma, self.options.weight_cap))

    def _on_device(self, values: Tensor) -> Tensor:
        # A VAE may leave another memory order than a file does, and convolutions round differently by it.
        return values.to(self._device, torch.float32).contiguous()

    def _targets(self, pictures: PictureSet) -> Tensor:
        """Latents (N, C, H, W) of what is to be drawn: here, what PromptNet is shown."""
        return pictures.latents

    def _error(self, predicted: Tensor, pictures: PictureSet, batch: PictureBatch, weight: Tensor) -> Tensor:
        """The loss of a prediction (B, C, H, W) with these weights of its rows (B,)."""
        return weighted_noise_error(predicted, batch.noise, weight)

    @torch.no_grad()
    def loss_on(self, pictures: PictureSet, batches: int = 4, word: Tensor | None = None) -> float:
        """The mean loss on pictures, kept from training perhaps, always at the same noise; with `word` for every S*."""
        draws = [self.draw(generator_of(-1 - index), len(pictures)) for index in range(batches)]
        return sum(self.loss_of(pictures, draw, word).item() for draw in draws) / batches

    def save(self, path: str | Path, overwrite: bool = True) -> int:
        """Write a checkpoint, from which `resume` goes on bit for bit; returns its bytes. Raises PromptNetError."""
        options, pictures = json.dumps(asdict(self.options)), self.pictures.fingerprint()
        notes = {"options": options, "pictures": pictures, "identity": self.identity}
        return save_promptnet(self.network, path, "float32", notes, self.state(), overwrite)

    def resume(self, path: str | Path, same_start: bool = False) -> None:
        """Go on from a checkpoint of the same training. Raises PromptNetError, and TrainingError for another
        training's.

        same_start: refuse also one that began otherwise or went further; to be asked before the first step.
        """
        network, state, notes = load_training(path)
        self._check_same_training(network, notes)
        if same_start:
            if notes.get("identity", self.identity) != self.identity:
                raise TrainingError(
                    f"the checkpoint's training began with another PromptNet or image encoder. {_ADVICE}"
                )
            self.check_state(state)
        self.go_on(network.state_dict(), state)

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise TrainingError unless a `state()` can be of this training, before its first step."""
        if int(state["step"]) > self.options.steps:
            raise TrainingError(
                f"the checkpoint has {int(state['step'])} steps already, and {self.options.steps} are wanted. {_ADVICE}"
            )
        if not self.begins_like(state):
            raise TrainingError(
                "the first step gives another loss than the checkpoint's did: another model, or something on it. "
                f"{_ADVICE}"
            )

    def go_on(self, network: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Go on where the network had these values and the training this `state()`."""
        with torch.inference_mode(False), torch.no_grad():
            for name, value in self.network.state_dict().items():
                value.copy_(network[name])
        self.restore(state)

    def _free(self) -> tuple[str, ...]:
        """The options that may differ: more steps of a constant rate are the same training."""
        return () if self.options.cosine else ("steps",)

    def _later(self) -> dict[str, object]:
        """Options that checkpoints have not had from the first, and their values in those."""
        return {}

    def _check_same_training(self, network: PromptNet, notes: Mapping[str, str]) -> None:
        here = json.loads(json.dumps(asdict(self.options)))
        there = {**self._later(), **json.loads(notes.get("options", "{}"))}
        differing = [name for name in here if name not in self._free() and here[name] != there.get(name)]
        if differing:
            name = differing[0]
            raise TrainingError(
                f"the checkpoint was trained with {name}={there.get(name)}, not {here[name]}. {_ADVICE}"
            )
        if notes.get("pictures") != self.pictures.fingerprint():
            raise TrainingError(
                f"the checkpoint was trained on other pictures ({notes.get('pictures')}, here "
                f"{self.pictures.fingerprint()}). {_ADVICE}"
            )
        if network.config != self.network.config:
            raise TrainingError(f"the checkpoint is of a PromptNet of another size ({network.config}). {_ADVICE}")
