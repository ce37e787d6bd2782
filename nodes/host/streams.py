"""Infusion's two streams in the host's sampling run.

Infusion is three wrappers on the MODEL, all under one key, and nothing else. PREPARE_SAMPLING asks for the memory of
what F leaves for C; SAMPLER_SAMPLE runs the sampler for F and for C in step; CALC_COND_BATCH evaluates each stream with
its patches. What a concept does, and where, travels in the CONDITIONING.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...profusion.coroutine import Coroutine
from ...profusion.infusion import (
    CONCEPTS_KEY,
    Layer,
    Patches,
    PlacedConcept,
    Placement,
    crop_region,
    customised_patches,
    foundation_patches,
    with_patches,
)
from ...profusion.memory import element_bytes
from ...profusion.queries import APART, KEPT, WaitingQueries, bytes_on_device, query_numbers
from ...profusion.threads import state_of_this_thread

KEY = CONCEPTS_KEY  # of the wrappers, and of the stream that is being evaluated in transformer_options


def add_streams(
    model: ModelPatcher,
    layers: Sequence[Layer],
    shared_latent: bool,
    on_foundation: Callable[[Tensor], None] | None = None,
    on_plain: Callable[[], None] = lambda: None,
) -> ModelPatcher:
    """A clone of MODEL that draws the concepts that conditionings carry; a run without any is the plain run.

    shared_latent: F looks at C's latent instead of following its own trajectory. A model that has the streams already
    gets these in their place. `on_foundation`, for whoever wants to see the plain picture too, is given F's finished
    latent (own trajectory only). `on_plain` is called at each sampling run whose conditionings carry no concept.
    """
    names = tuple(layer.name for layer in layers)
    patched = model.clone()
    wrappers = {
        WrappersMP.PREPARE_SAMPLING: _reserve_memory,
        WrappersMP.SAMPLER_SAMPLE: _sampler_wrapper(names, shared_latent, on_foundation, on_plain),
        WrappersMP.CALC_COND_BATCH: _evaluate_stream,
    }
    for kind, wrapper in wrappers.items():
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def _reserve_memory(executor, model: ModelPatcher, noise_shape: Sequence[int], conds: dict, *args, **kwargs):
    """PREPARE_SAMPLING: let the host keep memory free for F's queries too.

    It reckons with the latent's size alone, so it is told of a latent that is larger by as
    many lines as need this memory.
    """
    count = sum(map(len, conds.values()))
    if any(cond.get(KEY) for group in conds.values() for cond in group):
        kept = KEPT if model.load_device.type in APART else math.inf
        numbers = query_numbers(dict(model.get_model_object("diffusion_model").named_parameters()))
        cells, element = math.prod(noise_shape[-2:]), element_bytes(model.model)
        left = noise_shape[0] * bytes_on_device(numbers, cells, count, element, kept)
        line = model.model.memory_required([*noise_shape[:-2], 1, noise_shape[-1]])
        noise_shape = [*noise_shape[:-2], noise_shape[-2] + math.ceil(left / line), noise_shape[-1]]
    return executor(model, noise_shape, conds, *args, **kwargs)


def _sampler_wrapper(
    layers: tuple[str, ...], shared_latent: bool, on_foundation: Callable | None, on_plain: Callable[[], None]
) -> Callable:
    def sample(
        executor,
        guider,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
        **kwargs,
    ):
        def run(extra_args: dict, callback, noise: Tensor, silent: bool) -> Tensor:
            return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, silent, **kwargs)

        if not any(cond.get(KEY) for group in guider.conds.values() for cond in group):
            if hasattr(
                executor.class_obj, "sampler_function"
            ):  # not what merely evaluates the model, as a training does
                on_plain()
            return run(extra_args, callback, noise, disable_pbar)

        streams = _Streams(layers)
        if shared_latent:
            return run(_with_stream(extra_args, streams.evaluate_both), callback, noise, disable_pbar)

        def foundation_run(ask: Callable) -> Tensor:
            return run(_with_stream(extra_args, streams.asking_foundation(ask)), None, noise.clone(), True)

        foundation = _InStep(foundation_run, noise.device)
        try:
            customised = _with_stream(_separate_state(extra_args), streams.following(foundation))
            samples = run(customised, callback, noise, disable_pbar)
            if on_foundation is not None:
                on_foundation(foundation.finish())
            return samples
        finally:
            foundation.close()

    return sample


def _evaluate_stream(executor, model, conds, x, sigma, model_options, *args, **kwargs):
    """CALC_COND_BATCH: let the stream that is sampling do the evaluation."""
    stream = model_options.get("transformer_options", {}).get(KEY)
    if stream is None:
        return executor(model, conds, x, sigma, model_options, *args, **kwargs)

    def evaluate(conds: list, patches: Patches) -> list[Tensor]:
        return executor(model, conds, x, sigma, with_patches(model_options, patches), *args, **kwargs)

    return stream(evaluate, model, conds, x, float(sigma.flatten()[0]))


class _Streams:
    """How the two streams of one sampling run are evaluated, and what they share: F's queries."""

    def __init__(self, layers: tuple[str, ...]):
        self._layers = layers
        self._queries = WaitingQueries()
        self._placements: dict = {}

    def asking_foundation(self, ask: Callable) -> Callable:
        """F, sampled in step: has its evaluations done by whoever answers."""

        def stream(evaluate, model, conds, x, sigma):
            return ask(lambda: self._foundation(evaluate, conds))

        return stream

    def following(self, foundation: _InStep) -> Callable:
        """C on its own trajectory: before each of its evaluations, F does one."""

        def stream(evaluate, model, conds, x, sigma):
            foundation.step()
            return self._customised(evaluate, model, conds, x, sigma)

        return stream

    def evaluate_both(self, evaluate, model, conds, x, sigma):
        """C on a shared latent: F looks at it first."""
        self._foundation(evaluate, conds)
        return self._customised(evaluate, model, conds, x, sigma)

    def _foundation(self, evaluate, conds):
        return evaluate(conds, foundation_patches(self._queries, _foundation_key))

    def _customised(self, evaluate, model, conds, x, sigma):
        placements = {}
        for index, group in enumerate(conds):
            for cond in group or ():
                placements[index, cond["uuid"]] = [p for p in self._of(index, cond, model, x) if p.is_active(sigma)]
        # Packs that keep something for each conditioning must not mistake C's for F's.
        conds = [group and [{**cond, "uuid": _customised_id(cond["uuid"])} for cond in group] for group in conds]
        patches = customised_patches(
            self._queries, lambda options, chunk: placements.get(_customised_key(options, chunk), ()), _customised_key
        )
        return evaluate(conds, patches)

    def _of(self, index: int, cond: dict, model: Any, x: Tensor) -> list[Placement]:
        key = index, cond["uuid"]
        if key not in self._placements:
            concepts = cond.get(KEY, ()) if _attends_to_own_text(cond) else ()
            placed = [_resolve(concept, cond, model, x, self._layers) for concept in concepts]
            self._placements[key] = [placement for placement in placed if placement is not None]
        return self._placements[key]


def _foundation_key(extra_options: dict, chunk: int) -> tuple:
    return extra_options["cond_or_uncond"][chunk], extra_options["uuids"][chunk]


def _customised_id(uuid: Any) -> tuple:
    return "customised", uuid


def _customised_key(extra_options: dict, chunk: int) -> tuple:
    """The key under which F's evaluation of the same conditioning is known."""
    index, (_, uuid) = _foundation_key(extra_options, chunk)
    return index, uuid


def _attends_to_own_text(cond: dict) -> bool:
    """Whether a cond is evaluated with the text that it was placed in.

    Where a conditioning has an area, the host copies it, id and all, into the other conditionings, with their text.
    """
    own, attended = cond.get("cross_attn"), cond["model_conds"].get("c_crossattn")
    if own is None or attended is None:
        return False
    attended = attended.cond
    return attended is own or (attended.shape == own.shape and torch.equal(attended.to(own), own))


def _resolve(concept: PlacedConcept, cond: dict, model: Any, x: Tensor, layers: tuple[str, ...]) -> Placement | None:
    """A concept's placement in the run at hand; None where it would do nothing."""
    placement, text = concept.placement, cond["cross_attn"]
    if placement.layers != layers:
        raise ValueError(
            f"the conditioning's residual has {len(placement.layers)} layers, {placement.layers[0]} to "
            f"{placement.layers[-1]}, and the sampling model has {len(layers)}: their architectures differ"
        )
    if not text[:, list(placement.rows)].any():
        return None  # a zeroed-out conditioning, as made for negatives, has no noun any more
    region = placement.region
    if region is not None:
        if placement.strength == 0 or not placement.delta.any():
            return None  # it would only cost rows, and equality with the plain run
        region = crop_region(region.to(x.device), x.shape[-2:], cond["area"]) if "area" in cond else region.to(x.device)
    sampling = model.model_sampling
    return replace(
        placement,
        delta=placement.delta.to(x.device),
        sigma_start=float(sampling.percent_to_sigma(concept.start_percent)),
        sigma_end=float(sampling.percent_to_sigma(concept.end_percent)),
        context_length=text.shape[1],
        region=region,
    )


class _InStep:
    """The foundation's sampler, run one evaluation at a time.

    It is the plain run, call for call: any sampler, with noise from the same generators in the same order. What it
    draws from the global generators it draws from its own copy of them, so that C then draws the same.
    """

    def __init__(self, run: Callable[[Callable], Tensor], device: torch.device):
        modes = state_of_this_thread()

        def in_same_modes(ask: Callable) -> Tensor:
            with modes():
                return run(ask)

        self._coroutine = Coroutine(in_same_modes)
        self._answer: Any = None
        self._device = device
        self._random_state = _random_state(device)

    def step(self) -> None:
        """Go on to the next evaluation and do it, in the caller's thread. Once the sampler is done, nothing."""
        with self._own_random_state():
            evaluate = self._coroutine.resume(self._answer)
            self._answer = None if evaluate is None else evaluate()

    def finish(self) -> Tensor:
        """Go on to the end; returns the sampler's result."""
        while not self._coroutine.finished:
            self.step()
        return self._coroutine.result

    def close(self) -> None:
        self._coroutine.close()

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        outer = _random_state(self._device)
        _set_random_state(self._device, self._random_state)
        try:
            yield
        finally:
            self._random_state = _random_state(self._device)
            _set_random_state(self._device, outer)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    own = getattr(torch, device.type) if device.type in ("cuda", "xpu") else None
    return torch.get_rng_state(), own and own.get_rng_state(device)


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        getattr(torch, device.type).set_rng_state(state[1], device)


def _with_stream(extra_args: dict, stream: Callable) -> dict:
    """A sampler's arguments with which its evaluations are this stream's."""
    options = extra_args["model_options"]
    transformer_options = {**options.get("transformer_options", {}), KEY: stream}
    return {**extra_args, "model_options": {**options, "transformer_options": transformer_options}}


def _separate_state(extra_args: dict) -> dict:
    """A sampler's arguments in which the objects where packs keep a run's state, as step caches do, are copies."""
    options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
    shared = options.get("transformer_options", {})
    for name, value in shared.items():
        if hasattr(value, "__dict__") and not callable(value):
            shared[name] = copy.copy(value)
    return {**extra_args, "model_options": options}
