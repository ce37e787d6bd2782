"""Training a PromptNet from the beginning in the host: from the encoder of a MODEL's own UNet, on many pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...profusion.infusion import (
    UnsupportedModelError,
    architecture_name,
    check_context_width,
)
from ...profusion.keeping import Partial, digest
from ...profusion.loop import TrainingError, generator_of, pauses
from ...profusion.models.tokenizer import LENGTH, words_to_ids
from ...profusion.pictures import captioned, loss_plot, stacked, tiled
from ...profusion.promptnet.file import save_promptnet
from ...profusion.promptnet.finetune import trainable_copy
from ...profusion.promptnet.network import PromptNet, PromptNetConfig, PromptNetError, check_fits, typical_embedding
from ...profusion.promptnet.pseudo_word import split_prompt
from ...profusion.promptnet.shapes import promptnet_shapes
from ...profusion.promptnet.training import PromptNetOptions, PromptNetTraining
from ...profusion.promptnet.unfinished import Unfinished
from ...profusion.toybox.configs import TOYBOX_PROMPTNET
from .budget import ADAMW_BYTES, Budget, make_room, plan_training
from .display import Progress
from .drawing import Sampling, draw
from .evaluation import TrainedModel, differentiable, noise_levels, resident, resident_clip
from .families import promptnet_layers
from .files import PROMPTNETS, check_writable, folders, listed_name, save_numbered
from .identity import model_digest
from .picture_folders import EncodedSet, Source, encoded, set_bytes
from .weights import copied, own_unet, own_weights
from .words import (
    EncodedPictures,
    LoadedPromptNet,
    WordEncoder,
    WordInPrompt,
    embedding_names,
    handed_to_the_host,
    latent_format,
    seen_latents,
    text_widths,
    tokens_with_words,
    usual_dtype,
)

if TYPE_CHECKING:
    from PIL import Image

PREVIEW_EVERY = 10
CHECK_EVERY = 100  # steps; a check takes as long as about three of them
_SIZES = {"Toybox": TOYBOX_PROMPTNET}  # of PromptNets that have other sizes than those of real models


@dataclass(frozen=True)
class Beginning:
    """How a new PromptNet begins. tokens: pseudo-words in S*; 0: as is usual for the model. with_noise: S* also looks
    at the latent being denoised. word: what S* starts as; empty: the mean of all words."""

    tokens: int = 0
    with_noise: bool = False
    word: str = ""


class Pretraining:
    """One training of a PromptNet in the host, from a MODEL's own encoder on or going on from another PromptNet. It
    alters nothing that came in."""

    def __init__(
        self,
        model: ModelPatcher,
        clip: CLIP,
        clip_vision: ClipVisionModel,
        vae: VAE,
        given: Sequence[Source],
        options: PromptNetOptions,
        beginning: Beginning,
        promptnet: LoadedPromptNet | None = None,
        checkpointing: str = "auto",
        warn: Callable[[str], None] | None = None,
    ):
        """given: the pictures. checkpointing: see `plan_training`. warn: told what takes no part; default the log.

        What does not fit is refused before the pictures are encoded, which is done here.
        """
        layers, prompt = promptnet_layers(model), options.prompts[0]
        noise_levels(model)
        self._model, self._clip, self._clip_vision, self._vae = model, clip, clip_vision, vae
        self._promptnet = promptnet
        base, tokens = resident(model), _tokens_of(clip_vision)
        if promptnet is None:
            unet, weights = own_unet(base)
            self.config = _new_config(unet, tokens[1], text_widths(clip, prompt), beginning)
        else:
            self.config, weights = promptnet.config, {}
            check_fits(self.config, architecture_name(layers), text_widths(clip, prompt), tokens[1])
            _check_beginning(self.config, beginning)
        self.side = self.config.frame * vae.spacial_compression_encode()
        latent = self._check_latents()
        self._check_memory(len(given), latent, tokens)
        self._words = WordEncoder(resident_clip(clip), self.config, options.prompts, differentiable)
        self.word, spread = _starting_word(clip, self.config, prompt, beginning.word)
        conditionings = self._words.conditionings(self.word)
        check_context_width(conditionings[0][0][0].shape[-1], layers)
        learned = _bytes_to_learn(self.config)
        self._shape = options.batch_size, *latent
        budget = plan_training(
            model, self._shape, checkpointing, [self._words.patcher], learned, finetuning=True, any_size=False
        )
        self._words.check(self.word)
        if promptnet is None:
            network = PromptNet.from_unet(weights, self.config, generator_of(options.seed), self.word, spread)
        else:
            network = trainable_copy(promptnet.network, "cpu")
        self.given = self._encoded(given)
        self.about = self._about(beginning.word)
        make_room(learned, model.load_device)
        with torch.inference_mode(False):
            network = network.to(model.load_device).eval()
        self._evaluate(base, conditionings, budget, network, options, warn)

    def _evaluate(
        self,
        base: ModelPatcher,
        conditionings: Sequence[list],
        budget: Budget,
        network: PromptNet,
        options: PromptNetOptions,
        warn: Callable[[str], None] | None,
    ) -> None:
        """Make the training, and what it evaluates."""
        self._trained = TrainedModel(
            base,
            conditionings,
            [self._words.patcher],
            budget.step,
            checkpointing=budget.checkpointing,
            learning=[network],
            warn=warn,
            any_size=False,
        )
        self.training = PromptNetTraining(
            network,
            self._predict_noise,
            self._words.encode,
            self.given.pictures,
            options,
            self._model.get_model_object("model_sampling").timestep,
            self._trained.sigmas,
        )

    def _predict_noise(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        return self._trained.predict_noise_with(x, sigma, self._words.prompt, context)

    def _check_latents(self) -> tuple[int, ...]:
        """The shape of one latent. Raises for a VAE or a model whose latents are none of SD's."""
        latent = seen_latents(self.config, self._vae, _grey(self.side))
        theirs, ones = self._model.get_model_object("latent_format"), torch.ones_like(latent)
        if not torch.allclose(theirs.process_in(ones), latent_format(self.config)().process_in(ones)):
            raise UnsupportedModelError(
                f"{type(self._model.model).__name__} scales its latents in a way of its own ({type(theirs).__name__}), "
                f"and a PromptNet of {self.config.architecture} reads those of SD: take another model"
            )
        return tuple(latent.shape[1:])

    def _check_memory(self, count: int, latent: Sequence[int], tokens: Sequence[int]) -> None:
        """Raise TrainingError where the encoded pictures do not fit into main memory."""
        size, free = set_bytes(count, latent, tokens), _free_memory()
        if size > free:
            fit = math.floor(free / set_bytes(1, latent, tokens))
            raise TrainingError(
                f"{count} encoded pictures take {size / 1e9:.1f} GB of main memory, and {free / 1e9:.1f} GB are free: "
                f"give at most {fit}"
            )

    def _encoded(self, given: Sequence[Source]) -> EncodedSet:
        """The pictures, encoded. Cancel stops it."""
        progress = Progress(len(given))

        def encode(pictures: Tensor) -> tuple[Tensor, Tensor]:
            tokens = self._clip_vision.encode_image(pictures)["last_hidden_state"]
            return seen_latents(self.config, self._vae, pictures), tokens

        return encoded(given, self.side, encode, progress.advance)

    def _about(self, word: str) -> str:
        config, kind = self.config, "made at every step" if self.config.with_noise else "made before sampling"
        numbers = _numbers(config) / 1e6
        words = f"{config.tokens} pseudo-word{'s' * (config.tokens > 1)}"
        begun = f"from '{self._promptnet.name}' on" if self._promptnet else f"from {word or 'the mean word'} on"
        return f"{config.architecture}: {words}, {kind}, {numbers:,.1f} million numbers, {begun}\n{self.given.note}"

    def evaluating(self, work: Callable[[], None]) -> None:
        """Do `work()` with the model and the text encoder loaded, and autograd going through both."""

        def inside() -> None:
            with self._words.running():
                work()

        self._trained.run(inside, self._shape)

    def identity(self) -> str:
        """What must be the same for one training to go on as another, also after a restart."""
        return digest(self.training.identity, model_digest(self._model), model_digest(self._words.patcher))

    def losses(self) -> tuple[float, float]:
        """The loss on the pictures kept apart, if there are any, with S* and with one word for all: while
        `evaluating`."""
        pictures = self.given.apart or self.given.pictures
        with torch.inference_mode(False):
            return self.training.loss_on(pictures), self.training.loss_on(pictures, word=self.word)

    def promptnet(self, name: str) -> LoadedPromptNet:
        """What has been learned so far, in the precision of the PromptNet that came in, or the host's usual one."""
        dtype = usual_dtype() if self._promptnet is None else self._promptnet.network.start.dtype
        offload = comfy.model_management.unet_offload_device()
        return handed_to_the_host(trainable_copy(self.training.network, offload, dtype).requires_grad_(False), name)

    def draw(self, prompt: str, sampling: Sampling) -> Tensor:
        """Pictures (n, H, W, 3) of a prompt with S* of each of the shown ones, each from the training's seed."""
        promptnet, drawn = self.promptnet("sample"), []
        negative = self._clip.encode_from_tokens_scheduled(self._clip.tokenize(""))
        pictures = self.given.apart or self.given.pictures
        for row in range(len(self.given.shown)):
            seen = EncodedPictures(pictures.latents[row : row + 1], pictures.image_tokens[row : row + 1].float())
            positive = WordInPrompt(promptnet, self._clip, seen, prompt).conditioning()
            latent = torch.zeros(1, *self._shape[1:])
            samples = draw(self._model, positive, negative, latent, self.training.options.seed, sampling)
            drawn.append(self._vae.decode(samples).float().cpu())
        return torch.cat(drawn)


def _tokens_of(clip_vision: ClipVisionModel) -> tuple[int, int]:
    """How many image tokens an image encoder makes, and of which width."""
    tokens = clip_vision.encode_image(_grey(64))["last_hidden_state"]
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        raise PromptNetError("the CLIP vision model gives no image tokens: load CLIP ViT-L or ViT-H")
    return tuple(tokens.shape[1:])


def _grey(side: int) -> Tensor:
    return torch.full((1, side, side, 3), 0.5)


def _free_memory() -> float:
    return comfy.model_management.get_free_memory(torch.device("cpu"))


def _new_config(unet, image_width: int, widths: Sequence[int], beginning: Beginning) -> PromptNetConfig:
    config = PromptNetConfig(unet, image_width, tuple(widths))
    usual = _SIZES.get(config.architecture, config)
    return replace(
        usual,
        unet=unet,
        image_width=image_width,
        text_widths=tuple(widths),
        tokens=beginning.tokens or usual.tokens,
        second_latent="noisy" if beginning.with_noise else "none",
    )


def _check_beginning(config: PromptNetConfig, beginning: Beginning) -> None:
    """Raise PromptNetError for what only a new PromptNet can take."""
    wanted = beginning.tokens not in (0, config.tokens) and f"tokens={beginning.tokens}"
    wanted = wanted or (beginning.with_noise and not config.with_noise and "with_noise")
    wanted = wanted or (beginning.word and f"start_word={beginning.word!r:.40}")
    if wanted:
        raise PromptNetError(
            f"{wanted} is for a new PromptNet, and one is connected, which keeps what it has ({config.tokens} "
            f"pseudo-words{', with noise' * config.with_noise}): disconnect it, or leave this as it was"
        )


def _starting_word(clip: CLIP, config: PromptNetConfig, prompt: str, word: str) -> tuple[Tensor, Tensor]:
    """S* as a word's embedding or the mean word's, (tokens, width), with its position where it holds that; and how far
    words lie apart, (width,)."""
    nothing = torch.zeros(1, config.tokens, config.text_width)
    rows = [row % LENGTH for row in tokens_with_words(clip, config, prompt, nothing)[1]]
    starts, spreads, ids = [], [], words_to_ids(word)
    for name in embedding_names(clip, prompt):
        tables = own_weights(clip.patcher, name)
        table = copied(tables["token_embedding.weight"])
        mean, spread = typical_embedding(table)
        start = table[ids].mean(dim=0) if ids else mean
        if not start.any():
            raise PromptNetError(f"the text encoder was never taught the word {word!r:.80}: take another, or none")
        start = start.expand(config.tokens, -1)
        starts.append(start + copied(tables["position_embedding.weight"])[rows] if config.holds_position else start)
        spreads.append(spread)
    return torch.cat(starts, dim=-1), torch.cat(spreads)


def _numbers(config: PromptNetConfig) -> int:
    """How many numbers learn."""
    shapes = promptnet_shapes(config)
    return sum(math.prod(shape) for name, shape in shapes if name not in ("start", "spread"))


def _bytes_to_learn(config: PromptNetConfig) -> int:
    return ADAMW_BYTES * _numbers(config)


@dataclass(frozen=True)
class WordSamples:
    """The pictures that are drawn of a few references: a prompt with S*, every so many steps (0: at the end)."""

    prompt: str
    every: int
    sampling: Sampling

    def __post_init__(self) -> None:
        split_prompt(self.prompt)


def check_prefix(prefix: str) -> None:
    """Raise PromptNetError, before anything long is done, where no file can be written under this prefix."""
    check_writable(PROMPTNETS, prefix, 1, PromptNetError)


class PretrainingRun:
    """One training: the training, what is shown of it, and its files.

    While it runs, PROMPTNETS has training/pretrain_<digits>.safetensors, from which the same inputs go on.
    """

    def __init__(self, pretraining: Pretraining, prefix: str, samples: WordSamples, warn: Callable[[str], None]):
        """warn: told where the training so far cannot be written while it runs."""
        self.pretraining, self._prefix, self._samples = pretraining, prefix, samples
        self._progress = Progress(pretraining.training.options.steps)
        identity = pretraining.identity()
        self._unfinished = Unfinished(pretraining.training, "pretrain", identity, folders(PROMPTNETS), warn)
        self._drawn: list[Tensor] = []  # the newest first
        self._checked = ""
        self.path: Path | None = None

    @property
    def name(self) -> str:
        """The saved PromptNet, as PromptNet Loader lists it."""
        return listed_name(PROMPTNETS, self.path)

    def train(self) -> str:
        """Train, save, and say what was saved. What has been learned is on the disk before each sample."""
        training, partial = self.pretraining.training, self._unfinished.partial
        self.pretraining.evaluating(self._unfinished.go_on)
        for stop in pauses(training.step, training.options.steps, self._samples.every):
            self.pretraining.evaluating(lambda stop=stop: self._train_until(stop, partial))
            if stop == training.options.steps:
                self.path, size = self._save(self._prefix)
                self._unfinished.finished()
            else:
                partial.at_a_pause()
            self._drawn.insert(0, self.pretraining.draw(self._samples.prompt, self._samples.sampling))
            self._progress.report(stop, self._preview())
        return f"{self._unfinished.said}{self._checked}\n{self.path}\n{size:,} bytes"

    def _train_until(self, stop: int, partial: Partial) -> None:
        training = self.pretraining.training
        for _ in training.steps(partial) if training.step < stop else ():
            done = training.step
            if done % CHECK_EVERY == 0 or done == training.options.steps:
                self._check()
            worth_showing = done % PREVIEW_EVERY == 0 or done in (1, stop)
            self._progress.report(done, self._preview() if worth_showing else None)
            if done == stop:
                return
        self._check()  # a training that had been finished, but not saved

    def _check(self) -> None:
        with_word, without = self.pretraining.losses()
        given = self.pretraining.given
        on = (
            f"{len(given.apart)} pictures kept apart"
            if given.apart
            else "the pictures themselves (too few to keep any)"
        )
        self._checked = (
            f"step {self.pretraining.training.step}: on {on} the loss is {with_word:.4f} with S* and {without:.4f} "
            "with the word it starts as"
        )

    def plot(self) -> Image.Image:
        training = self.pretraining.training
        return loss_plot(training.losses, training.options.steps, title="loss (eps error)")

    def samples(self) -> Tensor:
        """Every sample, (n, H, W, 3), the newest first, and the pictures that they are of."""
        return torch.cat([*self._drawn, self.pretraining.given.shown])

    def _preview(self) -> Image.Image:
        """The references, the newest samples of them, and the plot so far."""
        shown = self.pretraining.given.shown
        sheet = [tiled([*shown, *self._drawn[0]], columns=len(shown))] if self._drawn else []
        return captioned(stacked([*sheet, self.plot()]), self._checked)

    def _save(self, prefix: str, everywhere: bool = False) -> tuple[Path, int]:
        training = self.pretraining.training
        notes = {
            "steps": str(training.step),
            "seed": str(training.options.seed),
            "pictures": training.pictures.fingerprint(),
        }

        def write(path: Path) -> tuple[Path, int]:
            return path, save_promptnet(training.network, path, "float16", notes, None, False)

        return save_numbered(PROMPTNETS, prefix, write, everywhere)

    def keep(self) -> str:
        """After a failure: keep what has been learned, and say what is where."""
        try:
            return self._kept()
        finally:
            self._unfinished.partial.leave()  # to the next run, perhaps of another server

    def _kept(self) -> str:
        done, last = self.pretraining.training.step, self.pretraining.training.options.steps
        if self.path is not None:
            return f"The training is finished, and saved as {self.path}"
        if not done:
            return "Nothing had been learned yet."
        try:
            path, size = self._save(self._prefix if done == last else f"{self._prefix}_partial_{done}_steps", True)
        except Exception as problem:  # whatever it is, the training itself may still be kept
            said = f"What the {done} steps so far have learned could not be saved as a PromptNet: {problem}"
        else:
            said = f"What the {done} steps so far have learned:\n{path}\n{size:,} bytes"
            if done == last:
                self._unfinished.finished()
                return said
        return f"{said}\n{self._unfinished.keep()}"
