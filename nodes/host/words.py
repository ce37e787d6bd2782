"""PromptNet in the host: pictures into S*, and S* into a prompt as this CLIP encodes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.utils
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor, nn

from ...profusion.diffusion import noised
from ...profusion.files import is_safetensors
from ...profusion.kinds import PROMPTNET, another_kind
from ...profusion.patched import SavableWeights, names_on
from ...profusion.problems import known, why
from ...profusion.promptnet.file import SUFFIX, load_promptnet, official_promptnet
from ...profusion.promptnet.network import (
    KNOTS,
    PromptNet,
    PromptNetConfig,
    PromptNetError,
    check_fits,
    interpolated,
    merged,
    parts,
)
from ...profusion.promptnet.pseudo_word import ALONE, WORD_KEY, placed, with_stand_in, without_position
from ...profusion.promptnet.released import check_archive, config_beside
from ...profusion.references import NATIVE, Shown, framed, grey_around

WORD = WORD_KEY
Differentiable = Callable[[nn.Module], AbstractContextManager]


@dataclass(frozen=True)
class LoadedPromptNet:
    """A PROMPTNET: the network, and the host's handle by which it comes to the device and leaves it."""

    network: PromptNet
    patcher: ModelPatcher
    name: str

    @property
    def config(self) -> PromptNetConfig:
        return self.network.config


def load(path: Path, warn: Callable[[str], None]) -> LoadedPromptNet:
    """Read a PromptNet's file, in half precision where the host would run a UNet so. warn: told of a config.json beside
    it that was not used."""
    dtype = usual_dtype()
    poll = comfy.model_management.throw_exception_if_processing_interrupted
    ours = path.suffix == SUFFIX or (path.is_file() and is_safetensors(path))  # whatever it was renamed to
    network = load_promptnet(path, dtype, poll=poll, warn=warn) if ours else _released(path, dtype, warn)
    return handed_to_the_host(network, path.stem)


def usual_dtype() -> torch.dtype:
    """Half precision where the host would run a UNet so."""
    device = comfy.model_management.get_torch_device()
    half = comfy.model_management.should_use_fp16(device, prioritize_performance=False)
    return torch.float16 if half else torch.float32


def _released(path: Path, dtype: torch.dtype, warn: Callable[[str], None]) -> PromptNet:
    """The authors' checkpoint as they released it: a .bin of torch's, which the host reads as tensors alone."""
    try:
        check_archive(path)
        tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
        return official_promptnet(tensors, dtype, beside=config_beside(path, warn), warn=warn)
    except Exception as problem:  # torch raises whatever a damaged file makes of it
        advice = f"A {path.suffix} file must be the authors' released checkpoint; other PromptNets are {SUFFIX} files."
        reason = another_kind(path, PROMPTNET) or f"{why(problem)}. {advice}"
        raise PromptNetError(f"The PromptNet file '{path}' cannot be loaded: {reason}") from problem


def handed_to_the_host(network: PromptNet, name: str) -> LoadedPromptNet:
    """A PROMPTNET of a network that is where the host keeps what it does not use."""
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return LoadedPromptNet(network, ModelPatcher(network, device, offload), name)


@dataclass(frozen=True)
class EncodedPictures:
    """Pictures of one thing as a PromptNet takes them: latents (P, C, h, w), image tokens (P, L, width) and, where some
    pictures count more, weights. pictures: what it sees, (P, H, W, 3); note: what was done to them, in words."""

    latents: Tensor
    image_tokens: Tensor
    weights: tuple[float, ...] | None = None
    pictures: Tensor | None = None
    note: str = ""


def encode_pictures(
    config: PromptNetConfig,
    vae: VAE,
    clip_vision: ClipVisionModel,
    given: Sequence[Shown],
    only_object: bool = False,
) -> EncodedPictures:
    """Pictures of any sizes, each brought to the square that the PromptNet was trained on.

    only_object: turn grey what is around the object. Raises PromptNetError for what does not fit.
    """
    pictures, weights, note = framed(given, config.frame * vae.spacial_compression_encode())
    pictures = grey_around(pictures, weights) if only_object else pictures
    tokens = clip_vision.encode_image(pictures)["last_hidden_state"]
    check_fits(config, image_width=tokens.shape[-1])
    latents = seen_latents(config, vae, pictures)
    return EncodedPictures(latents, tokens, None, pictures, note)


def seen_latents(config: PromptNetConfig, vae: VAE, pictures: Tensor) -> Tensor:
    """Latents (P, C, h, w) of pictures (P, H, W, 3), scaled as the UNet takes them that a PromptNet serves.

    Raises PromptNetError where the VAE is another model's.
    """
    latents = latent_format(config)().process_in(vae.encode(pictures).float())
    if latents.ndim != 4 or latents.shape[1] != config.unet.in_channels:
        raise PromptNetError(
            f"the VAE makes latents of shape {tuple(latents.shape[1:])} and the PromptNet, of {config.architecture}, "
            f"takes {config.unet.in_channels} channels: load the VAE of the model that it was trained for"
        )
    return latents


def latent_format(config: PromptNetConfig) -> type[comfy.latent_formats.LatentFormat]:
    """SDXL's, or that of SD 1.x and 2.x; of models without a name, those with a vector of sizes have SDXL's."""
    like_sdxl = config.architecture == "SDXL" or (
        config.architecture not in NATIVE and config.unet.adm_channels is not None
    )
    return comfy.latent_formats.SDXL if like_sdxl else comfy.latent_formats.SD15


class WordInPrompt:
    """A prompt with S*, at any noise level; `conditioning` says it to any sampler.

    S* and the text encoder's context are made here, at a few timesteps, and interpolated between them at any level; a
    PromptNet that looks at the noisy latent is asked at every call instead.
    """

    def __init__(self, promptnet: LoadedPromptNet, clip: CLIP, reference: EncodedPictures, prompt: str):
        self.prompt, self._promptnet, self._clip, self._reference = prompt, promptnet, clip, reference
        check_fits(promptnet.config, text_widths=text_widths(clip, prompt))
        self._knots = torch.tensor(KNOTS)
        # The first picture with noise stands for the latent being denoised, which is not there yet.
        noisy = _noised(reference.latents[:1], self._knots) if promptnet.config.with_noise else None
        comfy.model_management.load_model_gpu(promptnet.patcher)
        self._words = self._words_at(self._knots, noisy)

    @property
    def looks_at_noise(self) -> bool:
        """Whether S* depends on the latent being denoised."""
        return self._promptnet.config.with_noise

    @property
    def models(self) -> list[ModelPatcher]:
        """The host's handles of PromptNet and the text encoder, which `live_context` needs loaded."""
        return [self._promptnet.patcher, self._clip.patcher]

    def conditioning(self) -> list:
        """A CONDITIONING for any sampler: its S* is the mean over the timesteps.

        It has one entry, or one for each range of sampling for which the text encoder's hooks have values of their own.
        """
        static = self._words.mean(dim=0, keepdim=True)
        made, rows = self._encode(self.prompt, torch.cat([static, self._words]))
        words = [SpokenWord(self, index, rows, contexts) for index, (contexts, _) in enumerate(made)]
        return [[word.context, {**extras, WORD: word}] for word, (_, extras) in zip(words, made, strict=True)]

    def in_prompt(self, prompt: str) -> Tensor:
        """The context (1, L, D) of another prompt with the same static S*."""
        made, _ = self._encode(prompt, self._words.mean(dim=0, keepdim=True))
        return made[0][0]

    def context_at(
        self, model_sampling: Any, contexts: Tensor | None, prompt: str, index: int
    ) -> Callable[[Tensor, float], Tensor]:
        """How the prompt's context with S* depends on the noise: (x, sigma) -> (1, L, D).

        contexts (T, L, D): at the timesteps where S* was made; default: encoded now. index: of the range, see
        `conditioning`.
        """
        made = self._encode(prompt, self._words)[0][index][0] if contexts is None else contexts
        return lambda x, sigma: interpolated(made, self._knots, model_sampling.timestep(torch.tensor([sigma])))

    def live_context(self, model_sampling: Any, prompt: str, index: int) -> Callable[[Tensor, float], Tensor]:
        """The same with an S* for each row of the latent being denoised, x (B, C, H, W) in the sampler's units: (B, L,
        D).

        It loads nothing, since that might unload the model at work: `models` must be loaded.
        """

        def context(x: Tensor, sigma: float) -> Tensor:
            level = x.new_full((len(x),), sigma)
            words = self._words_at(model_sampling.timestep(level), model_sampling.calculate_input(level, x))
            tokenized, _ = tokens_with_words(self._clip, self._promptnet.config, prompt, words)
            with _hooks_of_range(self._clip, index):
                return encode_loaded(self._clip, tokenized).unflatten(1, (len(words), -1))[0]

        return context

    @torch.no_grad()
    def _words_at(self, timesteps: Tensor, noisy: Tensor | None) -> Tensor:
        """S* at timesteps (T,), the mean over the pictures, on the CPU: (T, tokens, width). noisy: the latents being
        denoised, (T, C, H, W), for a network that looks at them. PromptNet must be loaded."""
        network, device = self._promptnet.network, self._promptnet.patcher.load_device
        timesteps, noisy = timesteps.to(device), None if noisy is None else noisy.to(device, network.start.dtype)
        latents, tokens = (
            part.to(device, network.start.dtype).split(1)
            for part in (self._reference.latents, self._reference.image_tokens)
        )
        words = []
        for pair in zip(latents, tokens, strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            words.append(network.embed_all(*pair, timesteps, noisy))
        return merged(words, self._reference.weights).float().cpu()

    def _encode(self, prompt: str, words: Tensor) -> tuple[list[tuple[Tensor, dict]], tuple[int, ...]]:
        """The prompt with each S* of words (T, tokens, width), as the host encodes plain text, hooks and all.

        For each range, contexts (T, L, D) and what else belongs into the CONDITIONING; and the rows of S*.
        """
        tokenized, rows = tokens_with_words(self._clip, self._promptnet.config, prompt, words)
        entries = self._clip.encode_from_tokens_scheduled(tokenized, show_pbar=False)
        return [(context.unflatten(1, (len(words), -1))[0], extras) for context, extras in entries], rows


class SpokenWord:
    """What a CONDITIONING with S* carries so that FusionGuider can make S* anew at each level: a `fusion.Word`."""

    def __init__(self, word: WordInPrompt, index: int, rows: tuple[int, ...], contexts: Tensor):
        """index: of the range, see `WordInPrompt.conditioning`. contexts (1 + T, L, D): the static one first."""
        self._word, self._index, self.prompt, self.rows = word, index, word.prompt, rows
        self.context, self._contexts = contexts[:1], contexts[1:]

    @property
    def models(self) -> list[ModelPatcher]:
        """See `fusion.Word`."""
        return self._word.models if self._word.looks_at_noise else []

    def contexts(self, model_sampling: Any, alone: bool) -> Callable[[Tensor, float], Tensor]:
        """See `fusion.Word`."""
        prompt = ALONE if alone else self.prompt
        if self._word.looks_at_noise:
            return self._word.live_context(model_sampling, prompt, self._index)
        return self._word.context_at(model_sampling, None if alone else self._contexts, prompt, self._index)


def encode_loaded(clip: CLIP, tokenized: dict) -> Tensor:
    """The context (1, L, D) that CLIP.encode_from_tokens makes, which would also load the text encoder.

    For that it might unload the model at work.
    """
    encoder, options = clip.cond_stage_model, {"execution_device": clip.patcher.load_device}
    if clip.layer_idx is not None:
        options["layer"] = clip.layer_idx
    encoder.reset_clip_options()
    encoder.set_clip_options(options)
    return encoder.encode_token_weights(tokenized)[0]


@contextmanager
def _hooks_of_range(clip: CLIP, index: int) -> Iterator[None]:
    """A loaded text encoder with its hooks as in a range of sampling, as encode_from_tokens_scheduled sets them."""
    hooks = clip.patcher.forced_hooks
    if hooks is None or not clip.use_clip_schedule:
        yield
        return
    hooks.reset()
    clip.patcher.patch_hooks(None)
    for hook, keyframe in hooks.get_hooks_for_clip_schedule()[index][1]:
        hook.hook_keyframe._current_keyframe = keyframe
    clip.patcher.patch_hooks(hooks)
    try:
        yield
    finally:
        hooks.reset()


def tokens_with_words(clip: CLIP, config: PromptNetConfig, prompt: str, words: Tensor) -> tuple[dict, tuple[int, ...]]:
    """The prompt's tokens once for each S* of words (T, tokens, width), as this CLIP encodes them, and S*'s rows.

    The CLIP makes one context (1, T * L, D) of them.
    """
    text, stand_in = with_stand_in(prompt, config.tokens)
    tokenized, rows = clip.tokenize(text), ()
    encoders = _encoders(tokenized)
    for encoder, part in zip(encoders, parts(words, config.text_widths), strict=True):
        chunks = tokenized[encoder]
        starts = [sum(map(len, chunks[:index])) for index in range(len(chunks))]
        places = placed(chunks, stand_in, part[0])[1]
        if config.holds_position:
            positions = _tower(clip, encoder).text_model.embeddings.position_embedding.weight.float().cpu()
            part = without_position(part, positions, [row for _, row in places])
        tokenized[encoder] = [chunk for word in part for chunk in placed(chunks, stand_in, word)[0]]
        rows = tuple(starts[chunk] + row for chunk, row in places)
    return tokenized, rows


def _noised(latent: Tensor, timesteps: Tensor) -> Tensor:
    """The reference at each level, with one and the same noise: (1, C, H, W), (T,) -> (T, C, H, W)."""
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)).to(latent)
    return noised(latent, noise, timesteps)


def _encoders(tokenized: Any) -> list[str]:
    """The text encoders' names in the order of their numbers in the context: SDXL has l, then g."""
    return sorted(tokenized, key=lambda name: (name != "l", name))


def _tower(clip: CLIP, encoder: str) -> Any:
    return getattr(clip.cond_stage_model, f"clip_{encoder}").transformer


def embedding_names(clip: CLIP, prompt: str) -> list[str]:
    """Where each text encoder has its embeddings: the beginning of their weights' names."""
    encoders = _encoders(clip.tokenize(prompt))
    return [f"clip_{encoder}.transformer.text_model.embeddings." for encoder in encoders]


def text_widths(clip: CLIP, prompt: str) -> Sequence[int]:
    """Widths of the word embeddings of each text encoder."""
    widths = []
    for encoder in _encoders(clip.tokenize(prompt)):
        if not hasattr(clip.cond_stage_model, f"clip_{encoder}"):
            raise PromptNetError(
                f"text encoder {encoder!r} is no CLIP, and S* is a word of CLIP's: load the CLIP of SD 1.x, SD 2.x or "
                "SDXL"
            )
        widths.append(_tower(clip, encoder).get_input_embeddings().weight.shape[-1])
    return widths


class WordEncoder:
    """Prompts with S*, as this CLIP encodes them, in a way that autograd goes through; only while `running`."""

    def __init__(self, clip: CLIP, config: PromptNetConfig, prompts: Sequence[str], differentiable: Differentiable):
        """clip: one whose weights stay where they are while it is loaded. differentiable: lets autograd go through a
        model of the host for the time being."""
        check_fits(config, text_widths=text_widths(clip, prompts[0]))
        self._clip, self._config, self._prompts, self._differentiable = clip, config, prompts, differentiable
        self.prompt = 0  # the one that was encoded last

    @property
    def patcher(self) -> ModelPatcher:
        """The host's handle of the text encoder."""
        return self._clip.patcher

    def conditionings(self, word: Tensor) -> list[list]:
        """A CONDITIONING of each prompt with this S* (tokens, width)."""
        tokens = [tokens_with_words(self._clip, self._config, prompt, word[None])[0] for prompt in self._prompts]
        return [self._clip.encode_from_tokens_scheduled(entry) for entry in tokens]

    def encode(self, prompt: int, words: Tensor) -> Tensor:
        """S* (B, tokens, width) in a prompt: (B, L, D)."""
        self.prompt = prompt
        tokens, _ = tokens_with_words(self._clip, self._config, self._prompts[prompt], words)
        return encode_loaded(self._clip, tokens).unflatten(1, (len(words), -1))[0]

    @contextmanager
    def running(self) -> Iterator[None]:
        """For the time being autograd goes through the text encoder, which is loaded.

        The host's CLIP adds to its hidden state in place, also after a norm has kept it for the way back: norms get
        copies.
        """
        encoder = self._clip.cond_stage_model
        patched = SavableWeights() if names_on(self.patcher) else nullcontext()
        with self._differentiable(encoder), patched, ExitStack() as hooks:
            for module in encoder.modules():
                if isinstance(module, nn.LayerNorm):
                    hooks.callback(module.register_forward_pre_hook(_copied).remove)
            yield

    def check(self, word: Tensor) -> None:
        """Raise PromptNetError, which names the text encoder, where no gradient comes back from it to S*."""
        self._clip.load_model()
        with torch.inference_mode(False), torch.enable_grad(), self.running():
            word = word.detach().cpu().float().clone()[None].requires_grad_(True)
            try:
                context = self.encode(0, word).float()
                target = torch.randn(context.shape, generator=torch.Generator().manual_seed(0))
                (gradient,) = torch.autograd.grad((context * target.to(context.device)).sum(), word)
            except RuntimeError as problem:
                if known(problem) is not None:
                    raise  # no memory, and nothing about gradients
                raise PromptNetError(f"{self._name()}: {problem}") from problem
        parts = gradient.split(list(self._config.text_widths), dim=-1)
        if not all(part.isfinite().all() and part.any() for part in parts):
            raise PromptNetError(f"{self._name()}: the gradient is zero or not finite")

    def _name(self) -> str:
        return (
            f"PromptNet cannot be trained through the text encoder {type(self._clip.cond_stage_model).__name__}, "
            "because no gradient goes back through it to the pseudo-word. Load the CLIP of the checkpoint, unquantised "
            "and uncompiled"
        )


def _copied(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0].clone(), *inputs[1:]
