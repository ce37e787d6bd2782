"""Fusion Sampling in the host: a guider that weighs several conditionings, and a sampler with a fusion stage.

Each is useful alone. The guider with any sampler of the host is plain guidance over several conditionings; the sampler
with any guider has the fusion stage under that guider's own guidance. Together they are the paper's method (arXiv
2305.13579).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import comfy.conds
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...profusion.fusion import FusionOptions, Guidance, RunGuidance, fresh_noise, sample_fusion
from .drawing import Sampling, drawn_latent, empty_latents
from .families import promptnet_layers
from .words import WORD

STAGE = "profusion_stage"
FIRST_NOISE = "profusion_first_noise"  # among a sampler's arguments, until its function takes it out

_SEED_STRIDE = 1_000_003
_SEEDS = 2**63


class Word(Protocol):
    """What a CONDITIONING made with S* carries under WORD."""

    prompt: str
    """The text, with S*."""

    context: Tensor
    """What the CONDITIONING was made with, (1, L, D). Where another is attended to, S* is left alone."""

    rows: tuple[int, ...]
    """The rows of S* in the context."""

    models: Sequence[ModelPatcher]
    """What `contexts` asks while it is called, and so must be loaded beside the model."""

    def contexts(self, model_sampling: Any, alone: bool) -> Callable[[Tensor, float], Tensor]:
        """How the context depends on the noise: (x, sigma) -> (1 or B, L, D). Asked once a run.
        alone: of the prompt that has S* and nothing else."""


class FusionGuider(comfy.samplers.CFGGuider):
    """e0 + s sum_i w_i (e_i - e0) / sum_i w_i, all terms of a step in one batched call.

    What the plain guider does, for one term and no S*: to the bit. `rows` counts what a run evaluated, a latent under
    one conditioning each; `calls` the batches, and `fusion_calls` those of the fusion stage.
    """

    def set_terms(
        self, terms: Sequence[list], negative: list, guidance: Guidance, text_in_fusion: bool = False
    ) -> None:
        """What guides a run. text_in_fusion: whether terms without S* guide the fusion stage too, where others have
        it.

        A term of no weight is left out: the host would copy its areas into the others. Raises UnsupportedModelError
        for S* on a model that no PromptNet is for.
        """
        if len(terms) != len(guidance.weights):
            raise ValueError(f"{len(terms)} conditionings and {len(guidance.weights)} weights: give each a weight")
        terms, guidance = _weighing(terms, guidance)
        if any(WORD in extras for term in terms for _, extras in term):
            promptnet_layers(self.model_patcher)
        if not text_in_fusion:
            guidance = replace(guidance, fusion_weights=_weights_of_words(terms, guidance.weights))
        self.guidance = guidance
        self.set_cfg(guidance.cfg)
        # The host's own names: packs look for "positive", which is 0 in cond_or_uncond, and "negative", which is 1.
        self._names = ["positive", *(f"term_{index}" for index in range(2, len(terms) + 1))]
        groups = {"positive": terms[0], "negative": negative, **dict(zip(self._names[1:], terms[1:], strict=True))}
        self.inner_set_conds(groups)
        for name in self._names[1:]:
            for cond in self.original_conds[name]:
                cond.setdefault("prompt_type", "positive")
        for cond in (cond for name in self._names for cond in self.original_conds[name] if WORD in cond):
            # Loaded with the model, and counted: to load them in the midst of sampling might unload it.
            cond["additional_models"] = [*cond.get("additional_models", ()), *cond[WORD].models]
        self._contexts: dict[int, Callable] = {}
        self._own: dict[int, bool] = {}
        self._begin()

    def _begin(self) -> None:
        self._counted: Counter = Counter()
        self._run: RunGuidance | None = None  # Infusion's streams each sample with a guider of their own

    @property
    def rows(self) -> int:
        return self._counted["rows"]

    @property
    def calls(self) -> int:
        return self._counted["calls"]

    @property
    def fusion_calls(self) -> int:
        return self._counted["fusion"]

    def _guidance(self) -> RunGuidance:
        if self._run is None:
            self._run = RunGuidance(replace(self.guidance, cfg=self.cfg))  # others may have set it anew
        return self._run

    def sample(self, noise, latent_image, sampler, sigmas, *args, **kwargs):
        self._begin()
        sampling = self.model_patcher.get_model_object("model_sampling")
        alone = self.guidance.mode == "independent"
        words = {
            id(cond[WORD]): cond[WORD] for name in self._names for cond in self.original_conds[name] if WORD in cond
        }
        # Before the model is loaded, so that the text encoder and PromptNet have the memory to themselves.
        self._contexts = {key: word.contexts(sampling, alone) for key, word in words.items()}
        try:
            return super().sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            self._contexts, self._own, self._run = {}, {}, None

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 (the host's own signature)
        stage = model_options.get("transformer_options", {}).get(STAGE, "refinement")
        run, sigma = self._guidance(), float(timestep.flatten()[0])
        gamma = self.guidance.word_scale(stage)
        terms = [self._at(self.conds[self._names[index]], x, sigma, gamma) for index in run.used(stage)]
        wanted = run.needs_nothing(stage) or model_options.get("disable_cfg1_optimization", False)
        negative = self.conds.get("negative") if wanted else None
        conds = [terms[0], negative, *terms[1:]]

        def evaluate(everything: bool) -> list[Tensor]:
            asked = conds if everything else conds[:1]
            self._counted["rows"] += len(x) * sum(len(group) for group in asked if group)
            self._counted["calls"] += 1
            self._counted[stage] += 1
            return _calc_conds(self.inner_model, asked, x, timestep, model_options)

        def hooks(predicted: list[Tensor]) -> list[Tensor]:
            for function in model_options.get("sampler_pre_cfg_function", []):
                predicted = function(
                    {
                        "conds": conds,
                        "conds_out": predicted,
                        "cond_scale": run.guidance.scale(stage),
                        "timestep": timestep,
                        "input": x,
                        "sigma": timestep,
                        "model": self.inner_model,
                        "model_options": model_options,
                    }
                )
            return predicted

        def combine(nothing: Tensor, mean: Tensor, scale: float) -> Tensor:
            told = {"model_options": model_options, "cond": terms[0], "uncond": negative}
            return comfy.samplers.cfg_function(self.inner_model, mean, nothing, scale, x, timestep, **told)

        return run.step(stage, evaluate, sigma or 1.0, hooks, combine)

    def _at(self, conds: list[dict], x: Tensor, sigma: float, gamma: float) -> list[dict]:
        """The conds of a term as they are at this noise level."""
        return [self._word_at(cond, x, sigma, gamma) if WORD in cond else cond for cond in conds]

    def _word_at(self, cond: dict, x: Tensor, sigma: float, gamma: float) -> dict:
        word, entry = cond[WORD], cond["model_conds"].get("c_crossattn")
        if entry is None:
            return cond
        start, end = (
            float(cond.get(name, level)) for name, level in (("timestep_start", sigma), ("timestep_end", sigma))
        )
        if not end <= sigma <= start:
            return cond  # the host evaluates it at other levels only
        key = id(cond)
        if key not in self._own:
            self._own[key] = entry.cond.shape == word.context.shape and torch.equal(
                entry.cond, word.context.to(entry.cond)
            )
        if not self._own[key]:
            return cond  # zeroed out, averaged, or another's text that the host evaluates in this one's area
        context = self._contexts[id(word)](x, sigma).to(entry.cond)
        if gamma != 1.0:
            context = context.clone()
            context[:, list(word.rows)] *= gamma
        model_conds = {**cond["model_conds"], "c_crossattn": comfy.conds.CONDCrossAttn(context)}
        return {**cond, "cross_attn": context, "model_conds": model_conds}


def _weighing(terms: Sequence[list], guidance: Guidance) -> tuple[list[list], Guidance]:
    """The terms that have a weight in either stage, and the guidance by them."""
    stages = [guidance.weights_in("refinement"), guidance.weights_in("fusion")]
    kept = [index for index in range(len(terms)) if any(weights[index] for weights in stages)]
    ours, fusion = (tuple(weights[index] for index in kept) for weights in stages)
    fusion = None if guidance.fusion_weights is None else fusion
    return [terms[index] for index in kept], replace(guidance, weights=ours, fusion_weights=fusion)


def _weights_of_words(terms: Sequence[list], weights: Sequence[float]) -> tuple[float, ...] | None:
    """The weights of the terms with S*, and 0 for the others; None where none of them counts."""
    own = tuple(
        weight if any(WORD in extras for _, extras in term) else 0.0
        for term, weight in zip(terms, weights, strict=True)
    )
    return own if any(own) else None


def _calc_conds(model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict) -> list[Tensor]:
    """One batched evaluation, as the host's own `sampling_function` does it."""
    if len(conds) > 2:
        model_options = _with_known_kinds(model_options)
    if "sampler_calc_cond_batch_function" in model_options:
        arguments = {"conds": conds, "input": x, "sigma": timestep, "model": model, "model_options": model_options}
        return model_options["sampler_calc_cond_batch_function"](arguments)
    return comfy.samplers.calc_cond_batch(model, conds, x, timestep, model_options)


def _with_known_kinds(model_options: dict) -> dict:
    """Model options under which packs see 0 in `cond_or_uncond` for every further term too, which is positive.

    They know 0 and 1, the positive and the negative, and look others up in vain.
    """
    inner = model_options.get("model_function_wrapper")

    def call(apply_model: Callable, arguments: dict) -> Tensor:
        kinds = [int(index == 1) for index in arguments["cond_or_uncond"]]
        options = {**arguments["c"]["transformer_options"], "cond_or_uncond": kinds}
        given = {**arguments["c"], "transformer_options": options}
        if inner is not None:
            return inner(apply_model, {**arguments, "c": given, "cond_or_uncond": kinds})
        return apply_model(arguments["input"], arguments["timestep"], **given)

    return {**model_options, "model_function_wrapper": call}


def row_generators(seed: int, noise: Tensor) -> list[torch.Generator]:
    """A generator for each picture's fresh noise, from the seed and the noise (B, ...) that the pictures begin with.

    The first noise is what a picture's place in its batch comes down to, so that a picture drawn alone, as *Latent From
    Batch* takes it out, has the fresh noise that it had among others.
    """
    generators = []
    for index, row in enumerate(noise.detach().to("cpu", torch.float32)):
        start = row.contiguous().numpy().tobytes() if row.any() else bytes([index % 256])
        own = int.from_bytes(hashlib.sha256(start).digest()[:8], "little")
        generators.append(torch.Generator().manual_seed((seed + own) % _SEEDS))
    return generators


class FusionSampling(comfy.samplers.KSAMPLER):
    """A fusion stage at every noise level of a window, and another sampler of the host as the refinement stage.

    Without fusion steps it is that sampler, to the bit. start_percent, end_percent: the window, as shares of sampling.
    """

    def __init__(self, inner: Any, options: FusionOptions, start_percent: float = 0.0, end_percent: float = 1.0):
        if not hasattr(inner, "sampler_function"):
            raise ValueError(
                f"{type(inner).__name__} is no sampler of the kind that ComfyUI's KSamplerSelect gives: it has no "
                "function that a fusion stage could be put before"
            )
        if start_percent > end_percent:
            raise ValueError(
                f"start_percent={start_percent} is after end_percent={end_percent}: the stage would never act"
            )
        super().__init__(self._sample, {}, inner.inpaint_options)
        self._inner, self._options, self._window = inner, options, (start_percent, end_percent)

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        """See KSAMPLER. The fresh noise is each picture's own, as its first noise is."""
        return super().sample(model_wrap, sigmas, {**extra_args, FIRST_NOISE: noise}, callback, noise, *args, **kwargs)

    def _sample(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        sampling = model.inner_model.inner_model.model_sampling
        options = self._options
        if options.repeats:
            start, end = (float(sampling.percent_to_sigma(percent)) for percent in self._window)
            options = replace(options, sigma_start=start, sigma_end=end)
        flow = isinstance(sampling, comfy.model_sampling.CONST)
        extra_args = {**extra_args}
        first_noise = extra_args.pop(FIRST_NOISE, None)  # not there where a sampler of others calls this function
        generators = row_generators(extra_args.get("seed") or 0, x if first_noise is None else first_noise)

        def refine(x: Tensor, first: int, last: int) -> Tensor:
            return self._refine(model, x, sigmas, first, last, extra_args, callback, disable)

        return sample_fusion(_under_stage(model, extra_args), refine, x, sigmas, options, fresh_noise(generators), flow)

    def _refine(self, model, x, sigmas, first, last, extra_args, callback, disable):
        """The inner sampler over the levels first..last."""
        arguments = {**extra_args}  # samplers change it
        if first and arguments.get("seed") is not None:
            # Samplers seed their noise at the start: from the same seed each stretch would draw the same noise.
            arguments["seed"] = (arguments["seed"] + _SEED_STRIDE * first) % _SEEDS
        report = callback and (lambda state: callback({**state, "i": state["i"] + first}))
        part = sigmas[first : last + 1].clone()  # and these
        return self._inner.sampler_function(
            model, x, part, extra_args=arguments, callback=report, disable=disable, **self._inner.extra_options
        )


def _under_stage(model: Callable, extra_args: dict) -> Callable[[Tensor, Tensor], Tensor]:
    """The model as the fusion stage evaluates it."""
    options = extra_args.get("model_options", {})
    transformer_options = {**options.get("transformer_options", {}), STAGE: "fusion"}
    arguments = {**extra_args, "model_options": {**options, "transformer_options": transformer_options}}

    def evaluate(x: Tensor, sigma: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return model(x, sigma, **arguments)

    return evaluate


@dataclass(frozen=True)
class Drawn:
    """A drawn LATENT, how often each of its pictures was evaluated a step, and how many calls the fusion stage took."""

    latent: dict
    rows_per_step: float
    fusion_calls: int


def sample_latent(
    guider: FusionGuider,
    latent: dict,
    seed: int,
    sampling: Sampling,
    denoise: float,
    options: FusionOptions,
    window: tuple[float, float],
) -> Drawn:
    """What KSampler does with a LATENT, by Fusion Sampling. window: shares of sampling that have the fusion stage."""
    model = guider.model_patcher
    plan = comfy.samplers.KSampler(
        model,
        steps=sampling.steps,
        device=model.load_device,
        sampler=sampling.sampler,
        scheduler=sampling.scheduler,
        denoise=denoise,
        model_options=model.model_options,
    )
    samples = empty_latents(model, latent)
    steps = len(plan.sigmas) - 1
    drawn = guider.sample(
        comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
        samples,
        FusionSampling(comfy.samplers.sampler_object(sampling.sampler), options, *window),
        plan.sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    rows_per_step = guider.rows / len(samples) / max(1, steps)
    return Drawn(drawn_latent(latent, drawn.to(samples.device)), rows_per_step, guider.fusion_calls)
