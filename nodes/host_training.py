"""The host's model in a training: evaluated as it samples, patches and all, and made fit for autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import comfy.conds
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor, nn

from ..profusion.infusion import Layer, Patches, UnsupportedModelError
from ..profusion.pictures import latent_masks
from ..profusion.prompt import NounError, Span
from ..profusion.residual import Residual
from ..profusion.training import PROMPTS, Reference, TrainingError
from .host import KEY, add_streams, encode_prompt, model_layers, noun_spans, with_patches
from .infusion import ConceptInput, place_concepts
from .messages import show

if TYPE_CHECKING:
    from PIL import Image

Interrupted = comfy.model_management.InterruptProcessingException

# What a step needs, in multiples of what the host reckons for inference: 10,500 numbers a latent cell on SD 1.5, where
# the backward pass keeps 90,000 (benchmarks/training_memory.py) and needs some more while it runs.
BACKWARD_MEMORY = 12


def noise_levels(model: Any) -> Tensor:
    """sigma at a model's timesteps, rising. A model that predicts no noise is refused by name."""
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.CONST) or not hasattr(sampling, "sigmas"):
        raise UnsupportedModelError(
            f"{type(model.model).__name__} is a flow model, which predicts no noise: this takes models that predict noise or "
            "velocity (v), as SD 1.x, SD 2.x and SDXL do"
        )
    return sampling.sigmas


class TrainedModel:
    """A MODEL that a training evaluates: with every patch and wrapper on it, but without guidance.

    conditionings: one for each prompt, in the order of their indices. beside: the host's handles of other models that the
    training needs on their devices. memory: bytes that it needs itself.
    """

    def __init__(self, model: Any, conditionings: Sequence[list], beside: Sequence[Any] = (), memory: float = 0):
        self._model, self._beside, self._memory = model, list(beside), memory
        self.sigmas = noise_levels(model)
        self._conditionings = [
            [[context, {**extras, "additional_models": self._beside}] for context, extras in entries]
            if beside
            else entries
            for entries in conditionings
        ]
        self._prompts: list[list[dict]] = []
        self._evaluate: Callable | None = None

    def predict_noise(self, x: Tensor, sigma: Tensor, prompt: int, patches: Patches) -> Tensor:
        """eps of x = x0 + sigma * eps, (B, C, H, W), whatever the model itself predicts; only while `run` runs."""
        return self._noise(x, sigma, self._prompts[prompt], patches)

    def predict_noise_with(self, x: Tensor, sigma: Tensor, prompt: int, context: Tensor) -> Tensor:
        """The same with a context (B, L, D), which autograd may come from, in the place of the prompt's."""
        conds = []
        for cond in self._prompts[prompt]:
            entry = comfy.conds.CONDCrossAttn(context.to(cond["model_conds"]["c_crossattn"].cond.device))
            conds.append({**cond, "model_conds": {**cond["model_conds"], "c_crossattn": entry}})
        return self._noise(x, sigma, conds, {})

    def _noise(self, x: Tensor, sigma: Tensor, conds: list[dict], patches: Patches) -> Tensor:
        denoised = self._evaluate(x, sigma, conds, patches)
        return (x - denoised) / sigma.view(-1, 1, 1, 1)

    def run(self, work: Callable[[], None], shape: Sequence[int]) -> None:
        """Do `work()` with the model loaded, for latents (B, C, H, W) of this shape."""
        load = comfy.model_management.load_models_gpu
        try:
            needed = BACKWARD_MEMORY * self._model.memory_required(list(shape)) + self._memory
            # All of it: autograd would keep what is cast for each layer, and offloaded weights come to the same.
            load([self._model, *self._beside], memory_required=needed, force_full_load=True)
            guider = comfy.samplers.CFGGuider(self._model)
            guider.inner_set_conds({"positive": [entry for prompt in self._conditionings for entry in prompt]})
            zeros, sigmas = torch.zeros(tuple(shape)), self.sigmas[[-1, 0]].cpu()
            guider.sample(zeros, zeros, _Work(self, work), sigmas, disable_pbar=True, seed=0)
        except comfy.model_management.OOM_EXCEPTION as error:
            raise TrainingError(
                f"out of memory while training on {shape[0]} pictures of {shape[-1]}x{shape[-2]} latent cells at a time. "
                "Lower batch_size, or give smaller pictures"
            ) from error

    @contextmanager
    def _running(self, guider: Any, model_options: dict) -> Iterator[None]:
        """Set what `predict_noise` evaluates: the model as the guider would, one prompt's conditioning at a time."""
        conds, prompts = iter(guider.conds["positive"]), []
        for entries in self._conditionings:
            prompts.append([_for_autograd(next(conds)) for _ in entries])
        options = {**model_options, "transformer_options": dict(model_options.get("transformer_options", {}))}
        options["transformer_options"].setdefault("optimized_attention_override", _differentiable_attention)
        network = guider.inner_model

        def evaluate(x: Tensor, sigma: Tensor, conds: list[dict], patches: Patches) -> Tensor:
            patched = with_patches(options, patches)
            return comfy.samplers.calc_cond_batch(network, [conds], x, sigma, patched)[0]

        self._prompts, self._evaluate = prompts, evaluate
        try:
            with differentiable(network):
                yield
        finally:
            self._prompts, self._evaluate = [], None


class _Work(comfy.samplers.Sampler):
    """Takes the place of a sampler in a guider, which has loaded and patched the model for it."""

    def __init__(self, trained: TrainedModel, work: Callable[[], None]):
        self._trained, self._work = trained, work

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        with self._trained._running(model_wrap, extra_args["model_options"]):
            self._work()
        return torch.zeros_like(noise)


def _differentiable_attention(function: Callable, *args, **kwargs) -> Tensor:
    """PyTorch's own attention: the host's others may write in place, or know no gradient."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def _for_autograd(cond: dict) -> dict:
    """A copy of a guider's cond whose tensors are no inference tensors."""
    with torch.inference_mode(False):
        model_conds = {name: copy.copy(entry) for name, entry in cond["model_conds"].items()}
        for entry in model_conds.values():
            if isinstance(getattr(entry, "cond", None), Tensor):
                entry.cond = entry.cond.clone()
        return {**cond, "model_conds": model_conds}


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let autograd go through a model, while its weights stay constants.

    The host loads weights in inference mode, and autograd refuses to save inference tensors. For the time being the
    model holds others over the same memory; then it has its own objects again, except where the host itself has put
    something else in their place meanwhile.
    """
    parts = list(model.modules())
    learning = [tensor for tensor in model.parameters() if tensor.requires_grad and not tensor.is_inference()]
    casting = [(part, part.training) for part in parts if hasattr(part, "comfy_cast_weights")]
    replaced = [
        (tensors, name, tensor, _alias(tensor))
        for part in parts
        for tensors in (part._parameters, part._buffers)
        for name, tensor in tensors.items()
        if _is_inference(tensor)
    ]
    try:
        for tensors, name, _, alias in replaced:
            tensors[name] = alias
        for tensor in learning:
            tensor.requires_grad_(False)
        for part, _ in casting:
            part.training = True  # the host's fast fp8 product has no gradient, and is for evaluation mode only
        with _host_trains():
            yield
    finally:
        for part, training in casting:
            part.training = training
        for tensor in learning:
            tensor.requires_grad_(True)
        for tensors, name, tensor, alias in replaced:
            if tensors.get(name) is alias and alias.data_ptr() == tensor.data_ptr():
                tensors[name] = tensor


@contextmanager
def _host_trains() -> Iterator[None]:
    """Set the switch by which newer hosts avoid kernels without a gradient."""
    management = comfy.model_management
    if not hasattr(management, "in_training"):
        yield
        return
    before, management.in_training = management.in_training, True
    try:
        yield
    finally:
        management.in_training = before


def _is_inference(tensor: Tensor | None) -> bool:
    # Quantised kinds, which are subclasses, are computed with in another form and never saved themselves.
    return tensor is not None and tensor.is_inference() and type(tensor) in (Tensor, nn.Parameter)


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor over the same memory, which autograd may save."""
    with torch.inference_mode(False):
        place = tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*place)
        return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias


def encode_prompts(clip: Any, noun: str, layers: Sequence[Layer]) -> tuple[list[list], list[Span]]:
    """The training prompts of a noun: their CONDITIONINGs, and the noun's rows in each."""
    if clip is None:
        raise ValueError("clip is None: the checkpoint that was loaded has no text encoder")
    if not any(character.isalnum() for character in noun):
        raise NounError(f"noun={noun!r}: give the class of what the pictures show, such as cat")
    prompts = [prompt.format(noun) for prompt in PROMPTS]
    spans = [noun_spans(clip, prompt, noun) for prompt in prompts]
    if not all(spans):
        raise NounError(f"noun={noun!r} is not found in the prompt {prompts[0]!r}: give a plain word, without brackets")
    conditionings = [encode_prompt(clip, prompt, ()) for prompt in prompts]
    width = conditionings[0][0][0].shape[-1]
    if width != layers[0].context_dim:
        raise ValueError(
            f"the text encoder makes a context of width {width} and the model takes {layers[0].context_dim}: use the clip "
            "that belongs to the model"
        )
    return conditionings, [places[-1] for places in spans]  # the last: the noun may be "photo"


def encode_references(model: Any, vae: Any, pictures: Tensor, masks: Tensor) -> list[Reference]:
    """Pictures (M, H, W, 3) and masks (M, H, W) as latents on the model's device, scaled as it takes them."""
    latents = vae.encode(pictures)
    latent_format = model.get_model_object("latent_format")
    if latents.ndim != 4 or latents.shape[1] != latent_format.latent_channels:
        raise ValueError(
            f"the VAE makes latents of shape {tuple(latents.shape[1:])} and the model takes {latent_format.latent_channels} "
            "channels: use the vae that belongs to the model"
        )
    latents = latent_format.process_in(latents.float()).to(model.load_device)
    weights = latent_masks(masks, latents.shape[-2:]).to(model.load_device)
    return [Reference(latent, weight) for latent, weight in zip(latents, weights, strict=True)]


class SamplePictures:
    """Draws a prompt with what has been learned so far, always from the same noise.

    size: (C, H, W) of the latents. `plain` is the picture without the concept, once one has been drawn.
    """

    def __init__(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        text: str,
        size: Sequence[int],
        seed: int,
        steps: int,
        guidance: float,
    ):
        self._clip, self._vae, self._text = clip, vae, text
        self._model, self._layers = model, model_layers(model)
        self._positive, self._negative = encode_prompt(clip, text, ()), encode_prompt(clip, "", ())
        self._size, self._seed, self._steps, self._guidance = tuple(size), seed, steps, guidance
        self.plain: Tensor | None = None

    def place(self, residual: Residual) -> list:
        """The prompt's CONDITIONING with the concept. Raises NounError where the prompt lacks its noun."""
        placed = place_concepts(
            self._clip, self._text, self._layers, [ConceptInput("", residual, 1.0, "auto")], 0.0, 1.0
        )
        return [[context, {**extras, KEY: tuple(placed)}] for context, extras in self._positive]

    def draw(self, residual: Residual) -> Tensor:
        """One picture (1, H, W, 3)."""
        latent, foundations = torch.zeros(1, *self._size), []
        samples = comfy.sample.sample(
            add_streams(self._model, self._layers, shared_latent=False, on_foundation=foundations.append),
            comfy.sample.prepare_noise(latent, self._seed),
            self._steps,
            self._guidance,
            "euler",
            "simple",
            self.place(residual),
            self._negative,
            latent,
            callback=_stop_if_cancelled,
            disable_pbar=True,
            seed=self._seed,
        )
        if self.plain is None:
            self.plain = self._decode(self._model.model.process_latent_out(foundations[0].float()))
        return self._decode(samples)

    def _decode(self, latents: Tensor) -> Tensor:
        return self._vae.decode(latents).float().cpu()


def _stop_if_cancelled(*_: Any) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


@contextmanager
def keeping(node: Any, keep: Callable[[], str]) -> Iterator[None]:
    """Whatever stops a training, cancel included: `keep` saves what has been learned and says where, and the node shows it.

    Errors come out as TrainingError, with that text.
    """
    try:
        yield
    except BaseException as problem:
        where = keep()
        show(node, where)
        if isinstance(problem, Interrupted) or not isinstance(problem, Exception):
            raise
        raise TrainingError(f"{problem}\n{where}") from problem


class Progress:
    """The host's progress bar, with a preview. Whoever reports to it is stopped here by Cancel."""

    def __init__(self, total: int):
        self._bar, self._done = comfy.utils.ProgressBar(total), 0

    def advance(self, by: int = 1) -> None:
        """So much more has been done."""
        self.report(self._done + by)

    def report(self, done: int, preview: Image.Image | None = None) -> None:
        self._done = done
        self._bar.update_absolute(done, preview=preview and ("JPEG", preview, None))
        _stop_if_cancelled()
