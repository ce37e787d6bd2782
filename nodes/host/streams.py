"""Infusion's two streams in the host's sampling run.

Infusion is three wrappers on the MODEL, all under one key, and nothing else. PREPARE_SAMPLING asks for the memory of
what F leaves for C; SAMPLER_SAMPLE runs the sampler for F and for C in step; CALC_COND_BATCH evaluates each stream with
its patches. What a concept does, and where, travels in the CONDITIONING. Whose the rows of a batch are, `rows` says;
what packs remember from one evaluation to the next, each stream remembers for itself.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from comfy.conds import CONDCrossAttn, CONDRegular
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.samplers import encode_model_conds
from torch import Tensor

from ...profusion.apart import Apart
from ...profusion.attending import UNET, Attending
from ...profusion.coroutine import Coroutine
from ...profusion.foundations import (
    Evaluated,
    Foundations,
    UntoldError,
    fingerprint,
    names,
    queries_by_name,
    queries_by_place,
    state_key,
    turns_by_name,
    turns_by_place,
)
from ...profusion.holding import (
    APART,
    FREE,
    NO_PICTURE,
    NOT_HELD,
    TOGETHER,
    Holding,
    Noun,
    of_noun,
)
from ...profusion.infusion import (
    CONCEPTS_KEY,
    ExtraOptions,
    Layer,
    Owners,
    Patches,
    PlacedConcept,
    Placement,
    crop_region,
    together,
)
from ...profusion.memory import element_bytes
from ...profusion.patched import names_in
from ...profusion.queries import KEPT, OWN_MEMORY, WaitingQueries, bytes_on_device
from ...profusion.rows import (
    PICTURES,
    ROWS,
    Evaluation,
    check_size,
    check_turns,
    customised,
    identity,
    owners,
    owners_after,
)
from ...profusion.stride import Stride
from ...profusion.text_rows import ADAPTED
from ...profusion.threads import state_of_this_thread

# Packages whose objects are the host's, not a run's memory: its core and whoever runs it, and this pack.
_PACK = __name__.removesuffix(".nodes.host.streams")
_SHARED = ("comfy", "comfy_api", "comfy_execution", "execution", "server", "nodes", _PACK)
_NO_MEMORY = ("conds", "original_conds", "model_patcher", "inner_model", "loaded_models")  # of a guider
KEY = CONCEPTS_KEY  # of the wrappers, and of the stream that is being evaluated in transformer_options


_SAME_TEXT = 0.01  # as a share of a context: evaluated twice it differs by rounding, another text's by far more
_AROUND_GUIDANCE = "sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function"
_HELD_BACKGROUND = "a held background is of the whole picture", "set background to free"
FOUNDATIONS = Foundations()
"""F's evaluations of the last pictures, for the next ones of the same prompt and seed."""


class DrawnRegions:
    """Where the last runs of a model with streams drew their concepts, to be found by what they drew.

    A latent (B, C, H, W), as a sampler leaves it, and its region (B, H, W) in [0, 1], in main memory.
    """

    def __init__(self, runs: int = 8):
        self._runs: deque[tuple[Tensor, Tensor]] = deque(maxlen=runs)

    def add(self, samples: Tensor, region: Tensor | None) -> None:
        if region is not None:
            self._runs.append((samples.float().cpu(), region.cpu()))

    def of(self, samples: Tensor) -> Tensor | None:
        """The region of these; None where they are of no run that held a background."""
        for drawn, region in reversed(self._runs):
            if drawn.shape == samples.shape and torch.allclose(drawn, samples.float().cpu(), rtol=1e-2, atol=1e-2):
                return region
        return None


def drawn_region(model: ModelPatcher, samples: Tensor) -> Tensor | None:
    """Where concepts were drawn with MODEL in these samples of a LATENT: (B, H, W) in [0, 1], in cells of the latent.

    None where they are none of those that it drew last with a background that was not free.
    """
    regions = model.get_attachment(KEY)
    return None if regions is None else regions.of(model.model.process_latent_in(samples))


def add_streams(
    model: ModelPatcher,
    layers: Sequence[Layer],
    shared_latent: bool,
    on_foundation: Callable[[Tensor], None] | None = None,
    on_plain: Callable[[], None] = lambda: None,
    background: str = FREE,
    concepts: str = TOGETHER,
    every: int = 1,
    recall: bool = True,
    attending: Attending = UNET,
) -> ModelPatcher:
    """A clone of MODEL that draws the concepts that conditionings carry; a run without any is the plain run.

    shared_latent: F looks at C's latent instead of following its own trajectory. A model that has the streams already
    gets these in their place. `on_foundation`, for whoever wants to see the plain picture too, is given F's finished
    latent (own trajectory only). `on_plain` is called at each sampling run whose conditionings carry no concept.
    background: see `holding.BACKGROUNDS`; `drawn_region` finds the regions of what was drawn with the clone. concepts:
    see `holding.CONCEPTS`. every: see `stride.Stride`. recall: whether F's evaluations are kept for other runs, and had
    from them. attending: how they meet in the attention of a model that is no UNet. Raises ValueError where a shared
    latent leaves nothing to hold it to, or a free background nothing to keep concepts apart by.
    """
    if shared_latent and background != FREE:
        raise ValueError(f"background={background!r} and stream='shared latent': {NO_PICTURE}")
    if concepts == APART and background == FREE:
        raise ValueError(f"concepts={concepts!r} and background={background!r}: {NOT_HELD}")
    layer_names, regions = tuple(layer.name for layer in layers), DrawnRegions()
    patched = model.clone()
    patched.set_attachments(KEY, regions)
    wrappers = {
        WrappersMP.PREPARE_SAMPLING: _memory_wrapper(attending),
        WrappersMP.SAMPLER_SAMPLE: _sampler_wrapper(
            partial(_Streams, layer_names, attending, background, concepts == APART, every),
            shared_latent,
            on_foundation,
            on_plain,
            regions,
            _state_of if recall else lambda patcher: None,
        ),
        WrappersMP.CALC_COND_BATCH: _evaluate_stream,
    }
    for kind, wrapper in wrappers.items():
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    patched.remove_callbacks_with_key(CallbacksMP.ON_DETACH, KEY)
    patched.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, _forget_foundations)
    return patched


def _forget_foundations(model: ModelPatcher, unloaded: bool) -> None:
    """ON_DETACH: what is kept of a model goes with it when the host unloads it."""
    if unloaded:
        FOUNDATIONS.forget(model.model)


def _state_of(patcher: ModelPatcher) -> bytes | None:
    """What a model's evaluations depend on besides their inputs; None where nobody can tell.

    Weights have an id that every patch on them changes. Where a part of them waits in main memory, patches are worked
    out anew at each evaluation, and round differently.
    """
    others = (patcher.injections, patcher.hook_patches, patcher.additional_models, patcher.weight_wrapper_patches)
    if any(others) or patcher.object_patches.keys() - {"model_sampling"}:
        return None
    model, kind = patcher.model, patcher.load_device.type
    loaded = getattr(model, "model_loaded_weight_memory", None) if patcher.patches else None
    modes = (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )
    try:
        return fingerprint(str(patcher.patches_uuid), str(patcher.load_device), loaded, modes, model.model_sampling)
    except UntoldError:
        return None


def _memory_wrapper(attending: Attending) -> Callable:
    """PREPARE_SAMPLING: let the host keep memory free for what F leaves too.

    It reckons with the latent's size alone, so it is told of a latent that is larger by as
    many lines as need this memory.
    """

    def reserve(executor, model: ModelPatcher, noise_shape: Sequence[int], conds: dict, *args, **kwargs):
        conditionings = [cond for group in conds.values() for cond in group]
        if any(cond.get(KEY) for cond in conditionings):
            kept = KEPT if model.load_device.type in OWN_MEMORY else math.inf
            cells, element = math.prod(noise_shape[2:]), element_bytes(model.model)
            text = max((cond["cross_attn"].shape[1] for cond in conditionings if "cross_attn" in cond), default=0)
            numbers = attending.numbers_left(model.get_model_object("diffusion_model"), cells, text)
            left = noise_shape[0] * bytes_on_device(numbers, cells, len(conditionings), element, kept)
            line = model.model.memory_required([*noise_shape[:-2], 1, noise_shape[-1]])
            noise_shape = [*noise_shape[:-2], noise_shape[-2] + math.ceil(left / line), noise_shape[-1]]
        return executor(model, noise_shape, conds, *args, **kwargs)

    return reserve


def _sampler_wrapper(
    new_streams: Callable[[Sequence[float], bytes | None], _Streams],
    shared_latent: bool,
    on_foundation: Callable | None,
    on_plain: Callable[[], None],
    regions: DrawnRegions,
    state_of: Callable[[ModelPatcher], bytes | None],
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
        def run(extra_args: dict, callback, noise: Tensor, silent: bool, executor=executor, guider=guider) -> Tensor:
            return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, silent, **kwargs)

        if not any(cond.get(KEY) for group in guider.conds.values() for cond in group):
            if hasattr(
                executor.class_obj, "sampler_function"
            ):  # not what merely evaluates the model, as a training does
                on_plain()
            return run(extra_args, callback, noise, disable_pbar)

        _say_if_compiled(extra_args["model_options"])
        FOUNDATIONS.begin(guider.model_patcher.model)
        streams = new_streams(sigmas.tolist(), state_of(guider.model_patcher))
        if shared_latent:
            both = _with_stream(extra_args, streams.evaluate_both)
            return run(both, callback, noise, disable_pbar, guider=_numbered(copy.copy(guider), len(noise)))

        def foundation_run(ask: Callable) -> Tensor:
            stream = _with_stream(extra_args, streams.asking_foundation(ask))
            own = copy.copy(guider)
            own = _numbered(own, len(noise)) if streams.hold(guider.inner_model, noise) else own
            return run(stream, None, noise.clone(), True, guider=streams.foundation_calls.of(own))

        foundation = _InStep(foundation_run, noise.device)
        try:
            own_executor, own_guider, own_args = _remembering_apart(executor, guider, extra_args)
            following = _with_stream(own_args, streams.following(foundation))
            own_guider = streams.customised_calls.of(_numbered(own_guider, len(noise)))
            samples = run(following, callback, noise, disable_pbar, own_executor, own_guider)
            finished = foundation.finish()  # also for what it leaves to the next run, as a plain run does
            if on_foundation is not None:
                on_foundation(finished)
            if streams.holding is None:
                return samples
            samples = streams.holding.finished(samples, finished)
            regions.add(samples, streams.holding.region())
            return samples
        finally:
            foundation.close()

    return sample


def _evaluate_stream(executor, model, conds, x, sigma, model_options, *args, **kwargs):
    """CALC_COND_BATCH: let the stream that is sampling do the evaluation."""
    stream = model_options.get("transformer_options", {}).get(KEY)
    if stream is None:
        return executor(model, conds, x, sigma, model_options, *args, **kwargs)

    def evaluate(
        evaluation: Evaluation, patches: Patches, apart: Callable = lambda value: value, x: Tensor = x
    ) -> list[Tensor]:
        own = copy.copy(executor)
        own.wrappers, options = apart(executor.wrappers), evaluation.options(apart(model_options), patches)
        with uncompiled():
            return own(model, evaluation.conds, x, sigma, options, *args, **kwargs)

    return stream(evaluate, model, conds, x, sigma, model_options)


class _Calls:
    """How often a sampler has called its guider: what F and C have in common, whatever each leaves out within."""

    def __init__(self):
        self.count = 0

    def of(self, guider: Any) -> Any:
        """This guider, which is the caller's own, counted: outside of what packs put around its predictions."""
        guider.model_options = _outermost(guider.model_options, WrappersMP.PREDICT_NOISE, self._counted)
        return guider

    def _counted(self, executor, *args, **kwargs):
        self.count += 1
        return executor(*args, **kwargs)


@dataclass
class _Plain:
    """F's last evaluation. key: what it is known by, None where nobody can tell; queries: whether it left them for C.

    leave_queries: does it once more, for these.
    """

    x: Tensor
    sigma: float
    pictures: tuple[int, ...]
    predicted: list[Tensor]
    key: bytes | None
    queries: bool
    leave_queries: Callable[[], Any]

    def is_at(self, sigma: float, pictures: tuple[int, ...], groups: int) -> bool:
        """Whether it is what C's prediction here can be made of."""
        alike = self.pictures == pictures and len(self.predicted) == groups
        return alike and math.isclose(self.sigma, sigma, rel_tol=1e-4)


class _Streams:
    """How the two streams of one sampling run are evaluated, and what they share: F's queries.

    sigmas: the run's. state: of the model, as `_state_of` says it.
    """

    def __init__(
        self,
        layers: tuple[str, ...],
        attending: Attending = UNET,
        background: str = FREE,
        keep_apart: bool = False,
        every: int = 1,
        sigmas: Sequence[float] = (),
        state: bytes | None = None,
    ):
        self._layers, self._attending = layers, attending
        self._background, self._keep_apart = background, keep_apart
        self._stride = Stride(every, sigmas)
        self._state = state
        self.holding: Holding | None = None
        # F's, of these pictures of the batch: the latent, its noise level, and what was predicted of it.
        self._seen: dict[tuple[int, ...], tuple[Tensor, float, list[Tensor]]] = {}
        self._plain: _Plain | None = None
        self._differs = False  # C from F, so far
        self._acted: dict[Hashable, tuple[bool, ...]] = {}  # which concepts did, as C was last evaluated
        self._parted = False  # whether C was evaluated where F was not
        self._wants_queries = self._watches = True  # of F's next evaluation: its queries, and where its nouns are
        self._queries = WaitingQueries()
        self._placements: dict = {}
        self._regrouped: dict = {}
        self._turns: Counter = Counter()  # of F's last evaluation
        self._seen_at: float | None = None  # the noise level of F's queries
        self._told = False
        self._apart = Apart(_SHARED)
        self._apart_for: dict[Hashable, Apart] = {}  # for the evaluations of concepts that have one each
        self.foundation_calls, self.customised_calls = _Calls(), _Calls()

    def hold(self, model: Any, noise: Tensor) -> bool:
        """Begin to hold the background of a run with this noise, where it is to be held at all."""
        if self._background != FREE:
            looking = partial(self._attending.looking, model.diffusion_model)
            size = noise.shape[-2:]
            self.holding = Holding(self._background, looking, len(noise), size, self._keep_apart)
        return self.holding is not None

    def asking_foundation(self, ask: Callable) -> Callable:
        """F, sampled in step: has its evaluations done by whoever answers."""

        def stream(evaluate, model, conds, x, levels, options):
            return ask(lambda: self._known_foundation(evaluate, model, conds, x, levels, options))

        return stream

    def following(self, foundation: _InStep) -> Callable:
        """C on its own trajectory: before each of its evaluations, F does that of the same call of its guider.

        A step cache may have left it out in F, so that C looks where F last did, or left some out in C, which F does
        now. Where C is not due, or F still, it is made of F's prediction, if F has been evaluated for it.
        """

        def stream(evaluate, model, conds, x, levels, options):
            sigma, pictures = _level(levels), _pictures(conds, len(x))
            active = self._active(model, conds, x, sigma)
            moves = self._differs or any(active)
            asked = pictures, _asked(conds)
            self._watches = self._parted or self._due(sigma, asked, active, options)
            self._wants_queries = self._parted or (moves and self._watches)
            before = self._plain
            while foundation.waits() and self.foundation_calls.count < self.customised_calls.count:
                foundation.evaluate()
            if foundation.waits() and self.foundation_calls.count == self.customised_calls.count:
                foundation.evaluate()
            plain = self._plain
            in_step = plain is not before and plain.is_at(sigma, pictures, len(conds))
            self._parted = self._parted or not in_step
            if in_step and not self._wants_queries:
                if moves:
                    return self._held(self._between(sigma, plain.predicted, asked), pictures)
                if plain.key is not None and torch.equal(x, plain.x):
                    return self._as_foundation(plain)
                moves = plain.key is not None  # C's sampler has gone another way
            if plain is not None and not plain.queries:
                plain.leave_queries()
            self._say_if_elsewhere(sigma)
            own = self._customised(evaluate, model, conds, x, sigma, options)
            self._differs = moves
            if in_step and moves:
                self._keep(sigma, own, plain.predicted, asked, active)
            return self._held(own, pictures)

        return stream

    def _as_foundation(self, plain: _Plain) -> list[Tensor]:
        """C's predictions while it is F: of the same latent, with nothing to add."""
        if self.holding is not None:
            self.holding.alike()
        return [predicted.clone() for predicted in plain.predicted]

    def _active(self, model: Any, conds: Sequence, x: Tensor, sigma: float) -> tuple[bool, ...]:
        """Of each concept whether it adds anything at a noise level."""
        found = (self._of(index, cond, model, x) for index, group in enumerate(conds) for cond in group or ())
        return tuple(placement.is_active(sigma) and placement.adds() for placed in found for placement in placed)

    def _due(self, sigma: float, asked: Hashable, active: tuple[bool, ...], options: dict) -> bool:
        """Whether C is to be evaluated: it is its step, other concepts act than when it last was, or guidance looks."""
        due = any(self._stride.due(sigma, (asked, noun)) for noun in self._evaluated_for())
        return due or self._acted.get(asked) != active or _guidance_looks(options)

    def _evaluated_for(self) -> list[Hashable | None]:
        """The nouns that C is evaluated for one after another; None is all of them at once."""
        return [None] if self.holding is None else self.holding.nouns()

    def _keep(
        self,
        sigma: float,
        drawn: Mapping[Hashable | None, list[Tensor]],
        plain: list[Tensor],
        asked: Hashable,
        active: tuple[bool, ...],
    ) -> None:
        """Note what C, as `_customised` has it, differs by from F: of each concept by itself where they are apart."""
        for noun, own in drawn.items():
            self._stride.keep(sigma, own, plain, (asked, noun))
        self._acted[asked] = active

    def _between(self, sigma: float, plain: list[Tensor], asked: Hashable) -> dict[Hashable | None, list[Tensor]]:
        """What `_customised` would have, where C is not due."""
        return {noun: self._stride.between(sigma, plain, (asked, noun)) for noun in self._evaluated_for()}

    def _say_if_elsewhere(self, sigma: float) -> None:
        if not self._told and self._seen_at is not None and not math.isclose(self._seen_at, sigma, rel_tol=1e-4):
            self._told = True
            logging.getLogger("ProFusion").warning(
                "The plain stream was last evaluated at noise level %.4g, and its attention is taken at %.4g: a step "
                "cache is on the model, or the sampler chooses its own steps, as dpm_adaptive does. Infusion Attention "
                "Patch's stream 'shared latent' keeps the two at one level",
                self._seen_at,
                sigma,
            )

    def evaluate_both(self, evaluate, model, conds, x, levels, options):
        """C on a shared latent: F looks at it first, and draws from the global generators what C will draw again.

        Conditionings to which nothing is ever added, as the negative, are the same in both, so that C has F's, unless a
        guidance looks into the model (`_guidance_looks`); and so are all where nothing is added at this noise level.
        """
        sigma, asked = _level(levels), (_pictures(conds, len(x)), _asked(conds))
        moved = [self._moves(index, group, model, x) for index, group in enumerate(conds)]
        active = self._active(model, conds, x, sigma)
        acts = any(active)
        if not any(moved) or (not acts and self._told_apart(conds, options)):
            return self._foundation(evaluate, model, conds, x, sigma)
        before = _random_state(x.device)
        plain = self._foundation(lambda *given: evaluate(*given, apart=self._apart), model, conds, x, sigma)
        if acts and not self._due(sigma, asked, active, options):
            return self._between(sigma, plain, asked)[None]
        _set_random_state(x.device, before)
        if _guidance_looks(options):
            moved = [True] * len(moved)
        own = [group if moves else None for group, moves in zip(conds, moved, strict=True)]
        drawn = self._customised(evaluate, model, own, x, sigma, options)[None]
        drawn = [one if moves else same for one, same, moves in zip(drawn, plain, moved, strict=True)]
        if acts:
            self._keep(sigma, {None: drawn}, plain, asked, active)
        return drawn

    def _moves(self, index: int, group: Sequence[dict] | None, model: Any, x: Tensor) -> bool:
        """Whether anything is ever added to conditionings of this group."""
        return any(placement.adds() for cond in group or () for placement in self._of(index, cond, model, x))

    def _told_apart(self, conds: Sequence, options: dict) -> bool:
        """Whether all is known that an evaluation depends on, so that leaving one out changes nothing else."""
        return self._state is not None and state_key(self._state, conds, options) is not None

    def _known_foundation(self, evaluate, model, conds, x, levels, options) -> list[Tensor]:
        """F's predictions, of a run before this one where it was the same there."""
        key = self._key(model, conds, x, levels, options)
        wanted, sigma, pictures = self._wants_queries or key is None, _level(levels), _pictures(conds, len(x))

        def anew(queries: bool = True, again: bool = True) -> list[Tensor]:
            watched = self._watches and not again
            predicted = self._foundation(evaluate, model, conds, x, sigma, queries, watched)
            if key is not None:
                known = names(conds)
                maps = self.holding.latest() if watched and self.holding is not None else {}
                maps = {of_f: maps[noun.key] for of_f, noun in self._placed(model, conds, x) if noun.key in maps}
                left = queries_by_place(self._queries, known) if queries else None
                FOUNDATIONS.keep(key, Evaluated(predicted, turns_by_place(self._turns, known), maps, left), len(x))
            self._plain = _Plain(x, sigma, pictures, predicted, key, queries, anew)
            return predicted

        kept = None if key is None else FOUNDATIONS.get(key)
        if kept is None or (wanted and kept.queries is None) or not self._recall_maps(kept, model, conds, x):
            return anew(wanted, again=False)
        known = names(conds)
        for place, rows in queries_by_name(kept.queries or {}, known).items() if wanted else ():
            self._queries[place] = rows
        self._turns, self._seen_at = turns_by_name(kept.turns, known), sigma
        predicted = [tensor.to(x.device, copy=True) for tensor in kept.predicted]
        self._seen[pictures] = x, sigma, predicted
        self._plain = _Plain(x, sigma, pictures, predicted, key, wanted, anew)
        return predicted

    def _key(self, model: Any, conds: Sequence, x: Tensor, levels: Tensor, options: dict) -> bytes | None:
        """What an evaluation of F, and what it leaves, is known by; None where nobody can tell."""
        if self._state is None:
            return None
        left = self._attending.left_for([of_f for of_f, _ in self._placed(model, conds, x)])
        return state_key(self._state if left is None else fingerprint(self._state, left), conds, options, x, levels)

    def _placed(self, model: Any, conds: Sequence, x: Tensor) -> list[tuple[Hashable, Noun]]:
        """The nouns that F's maps are of: what tells each in any run, and what it is in this one."""
        found, places = [], {name: place for place, name in enumerate(names(conds))}
        for index, cond in ((index, cond) for index, group in enumerate(conds) for cond in group or ()):
            name = identity(index, cond)
            for number, one in enumerate(self._of(index, cond, model, x)):
                if one.adds():
                    noun = Noun((name, number), one.region, cond.get("area"))
                    found.append(((places[name], one.rows, one.context_length), noun))
        return found

    def _recall_maps(self, kept: Evaluated, model: Any, conds: Sequence, x: Tensor) -> bool:
        """Have what a kept evaluation said of this run's nouns; False where it was not asked for one of them.

        Where a noun's region is given, its map is needed for the concepts' shares alone.
        """
        if self.holding is None or not self._watches:
            return True
        nouns = self._placed(model, conds, x)
        if any((noun.region is None or self._keep_apart) and of_f not in kept.maps for of_f, noun in nouns):
            return False
        known = {noun.key: kept.maps[of_f] for of_f, noun in nouns if of_f in kept.maps}
        self.holding.recall([noun for _, noun in nouns], known, x.device)
        return True

    def _foundation(self, evaluate, model, conds, x, sigma, queries: bool = True, watched: bool = True) -> list[Tensor]:
        """Evaluate F. queries: whether C may look at what it leaves. watched: whether it tells where the nouns are."""

        def look() -> None:
            self._seen_at = sigma  # unless a step cache has what the network would say

        evaluation = Evaluation(conds, len(x), CONDRegular)
        nouns = placements_for, whose, _ = self._nouns(model, conds, x, owners)
        patches = self._attending.noting(look)
        if queries:
            patches = together(self._attending.foundation(self._queries, placements_for, whose), patches)
        if self.holding is not None and watched:
            patches = self.holding.watching_foundation(patches, *nouns)
        predicted = evaluate(evaluation, patches)
        if self.holding is not None and watched:
            self.holding.put_in_order([noun.key for _, noun in self._placed(model, conds, x)])
        self._turns = evaluation.turns
        self._seen[_pictures(conds, len(x))] = x, sigma, predicted
        return predicted

    def _nouns(self, model: Any, conds: Sequence, x: Tensor, whose: Owners) -> tuple[Callable, Owners, Callable]:
        """What `holding.map_patches` asks for: whose nouns are looked for, and where what it finds belongs."""
        known = {identity(index, cond): (index, cond) for index, group in enumerate(conds) for cond in group or ()}

        def placements_for(extra_options: ExtraOptions, owner: tuple) -> list[Placement]:
            index, cond = known[owner[0]]
            return self._of(index, cond, model, x)

        def where(extra_options: ExtraOptions, owner: tuple):
            _, cond = known[owner[0]]
            check_size(extra_options, _size(cond, x), True, _HELD_BACKGROUND)
            return owner[0], extra_options[ROWS].pictures[owner], cond.get("area")

        return placements_for, whose, where

    def _customised(self, evaluate, model, conds, x, sigma, options) -> dict[Hashable | None, list[Tensor]]:
        """C's predictions for each group of conditionings: of each concept apart, by its noun, or of all, by None."""
        if self.holding is None:
            return {None: self._drawn(None, evaluate, model, conds, x, sigma, options)}
        pictures = _pictures(conds, len(x))
        foundation, level, _ = self._seen.get(pictures, (x, sigma, ()))
        if not math.isclose(level, sigma, rel_tol=1e-4):
            foundation = x  # a step cache left it out
        drawn, nouns = {}, self.holding.nouns()
        before = _random_state(x.device) if len(nouns) > 1 else None
        for noun in reversed(nouns):  # copies are made of what the first, which has the originals, has not yet changed
            own, own_conds = evaluate, conds
            if noun != nouns[0]:
                apart = self._apart_for.setdefault(noun, Apart(_SHARED))
                own = partial(evaluate, apart=apart)
                own_conds = [group and [_controlled_apart(cond, apart) for cond in group] for group in conds]
            if before is not None:
                _set_random_state(x.device, before)
            seen = self.holding.seen_by(noun, x, foundation, pictures)
            drawn[noun] = self._drawn(noun, own, model, own_conds, seen, sigma, options)
        return drawn

    def _drawn(self, noun: Hashable | None, evaluate, model, conds, x, sigma, options) -> list[Tensor]:
        """C's predictions for each group of conditionings, with all concepts or with the one at this noun."""
        placements = {}
        for index, group in enumerate(conds):
            for cond in group or ():
                key = identity(index, cond)
                placed = of_noun(self._of(index, cond, model, x), key, noun)
                placements[key] = [one for one in placed if one.is_active(sigma)], _size(cond, x)

        def placements_for(extra_options: ExtraOptions, owner: tuple) -> list[Placement]:
            found, size = placements[owner[0]]
            check_size(extra_options, size, any(placement.region is not None for placement in found))
            return [self._in_pictures(placement, extra_options[ROWS].pictures[owner]) for placement in found]

        evaluation = Evaluation(customised(conds), len(x), CONDRegular)
        whose = owners_after(self._turns)
        patches = self._attending.customised(self._queries, placements_for, whose)
        if self.holding is not None:
            patches = self.holding.watching_customised(patches, *self._nouns(model, conds, x, whose), noun=noun)
        predicted = evaluate(evaluation, patches, x=x)
        check_turns(self._turns, evaluation.turns, options)
        return predicted

    def _held(self, drawn: Mapping[Hashable | None, list[Tensor]], pictures: tuple[int, ...]) -> list[Tensor]:
        """C's predictions for each group of conditionings, of `_customised` put together, and F's around them.

        And thereby what guidance makes of them has F's around.
        """
        if self.holding is None:
            return drawn[None]
        joined = [
            self.holding.joined(dict(zip(drawn, of_group, strict=True)), pictures)
            for of_group in zip(*drawn.values(), strict=True)
        ]
        *_, plain = self._seen.get(pictures, ((),))
        if len(plain) != len(joined):  # a pack that evaluates some groups now and then
            return joined
        return [self.holding.denoised(*both, pictures) for both in zip(joined, plain, strict=True)]

    def _in_pictures(self, placement: Placement, pictures: tuple[int, ...]) -> Placement:
        """A placement whose region has a mask for each of these pictures of the batch, as a region's masks go round."""
        masks = 1 if placement.region is None or placement.region.ndim < 3 else len(placement.region)
        if masks == 1 or pictures == tuple(range(len(pictures))):
            return placement
        key = id(placement), pictures  # placements are kept for as long as the run lasts
        if key not in self._regrouped:
            own = placement.region[[picture % masks for picture in pictures]]
            self._regrouped[key] = replace(placement, region=own)
        return self._regrouped[key]

    def _of(self, index: int, cond: dict, model: Any, x: Tensor) -> list[Placement]:
        key = identity(index, cond)
        if key not in self._placements:
            self._placements[key] = placements_in(cond, model, x, self._layers)
        return self._placements[key]


def _guidance_looks(options: dict) -> bool:
    """Whether a function around the guidance may want what others on the model see as C is evaluated, as SAG's does."""
    return any(options.get(name) for name in _AROUND_GUIDANCE) and bool(names_in(options))


def _level(levels: Tensor) -> float:
    """The noise level of an evaluation, which is that of all its pictures."""
    return float(levels.flatten()[0])


def _asked(conds: Sequence) -> Hashable:
    """Which conditionings an evaluation is of: Fusion Sampling asks for the first alone between two refreshes, and what
    the streams differ by in one is not what they differ by in another."""
    return tuple(tuple(cond.get("uuid") for cond in group or ()) for group in conds)


def _pictures(conds: Sequence[Sequence[dict] | None], count: int) -> tuple[int, ...]:
    """Which pictures of the batch conditionings are evaluated for: so many of them."""
    told = next((cond[PICTURES] for group in conds for cond in group or () if PICTURES in cond), None)
    return tuple(range(count)) if told is None or len(told) != count else tuple(told.tolist())


def _size(cond: dict, x: Tensor) -> tuple[int, ...]:
    """(height, width) of the latent that a conditioning is evaluated on: its area's, cut off at the picture's edges."""
    size = tuple(x.shape[-2:])
    if "area" not in cond:
        return size
    height, width, top, left = cond["area"]
    return min(height, size[0] - top), min(width, size[1] - left)


def _first_row(cond: dict, model: Any, x: Tensor) -> int | None:
    """The row of what a cond attends to at which its own text begins; None where that is not the text it was placed in.

    Where a conditioning has an area, the host copies it, id and all, into the other conditionings, with their text. A
    transformer may attend to other rows than its conditioning has, and these are its text's all the same: Flux.2 has
    empty ones before them, and Anima makes its own.
    """
    own, entry = cond.get("cross_attn"), cond["model_conds"].get("c_crossattn")
    if own is None or entry is None:
        return None
    attended = entry.cond
    if attended is own or _alike(attended, own):
        return 0
    if isinstance(entry, CONDCrossAttn):  # a UNet's, which attends to what it is given
        return None
    (again,) = encode_model_conds(model.extra_conds, [cond], x, x.device, cond.get("prompt_type"))
    made = again["model_conds"]["c_crossattn"].cond
    if attended.shape != made.shape:
        return None
    seen = attended.float()  # a norm may be more than half precision holds
    if (seen - made.to(seen)).norm() > _SAME_TEXT * seen.norm():
        return None
    before = attended.shape[1] - own.shape[1]
    return before if before > 0 and _alike(attended[:, before:], own) else 0


def _alike(attended: Tensor, own: Tensor) -> bool:
    return attended.shape == own.shape and torch.equal(attended.to(own), own)


def placements_in(cond: dict, model: Any, x: Tensor, layers: tuple[str, ...]) -> list[Placement]:
    """The concepts that a cond carries, as they are placed in the run at hand."""
    first_row = _first_row(cond, model, x) if cond.get(KEY) else None
    concepts = () if first_row is None else cond[KEY]
    placed = [_resolve(concept, cond, first_row, model, x, layers) for concept in concepts]
    return [placement for placement in placed if placement is not None]


def _resolve(
    concept: PlacedConcept, cond: dict, first_row: int, model: Any, x: Tensor, layers: tuple[str, ...]
) -> Placement | None:
    """A concept's placement in the run at hand; None where it would do nothing. first_row: see `_first_row`."""
    placement, text = concept.placement, cond["cross_attn"]
    if placement.layers != layers:
        raise ValueError(
            f"the conditioning's residual has {len(placement.layers)} layers, {placement.layers[0]} to "
            f"{placement.layers[-1]}, and the sampling model has {len(layers)}: their architectures differ"
        )
    placed_on = text if ADAPTED in cond else text[:, list(placement.rows)]
    if not placed_on.any():
        return None  # a zeroed-out conditioning, as made for negatives, has no noun any more
    region = placement.region
    if region is not None:
        if not placement.adds():
            return None  # it would only cost rows, and equality with the plain run
        region = crop_region(region.to(x.device), x.shape[-2:], cond["area"]) if "area" in cond else region.to(x.device)
    sampling = model.model_sampling
    return replace(
        placement,
        delta=placement.delta.to(x.device),
        details=placement.details and placement.details.to(x.device),
        rows=tuple(first_row + row for row in placement.rows),
        sigma_start=float(sampling.percent_to_sigma(concept.start_percent)),
        sigma_end=float(sampling.percent_to_sigma(concept.end_percent)),
        context_length=cond["model_conds"]["c_crossattn"].cond.shape[1],
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
        self._asked: Callable[[], Any] | None = None
        self._answer: Any = None
        self._device = device
        self._random_state = _random_state(device)

    def waits(self) -> bool:
        """Go on to the next evaluation, if that is to come; whether there is one."""
        if self._asked is None:
            with self._own_random_state():
                self._asked = self._coroutine.resume(self._answer)
        return self._asked is not None

    def evaluate(self) -> None:
        """Do the evaluation that the sampler waits for, in the caller's thread."""
        with self._own_random_state():
            self._answer = self._asked()
            self._asked = None

    def finish(self) -> Tensor:
        """Go on to the end; returns the sampler's result."""
        while self.waits():
            self.evaluate()
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


def _random_state(device: torch.device) -> tuple[Any, ...]:
    """Of the global generators: torch's, the device's, Python's and numpy's."""
    own = getattr(torch, device.type) if device.type in ("cuda", "xpu") else None
    return torch.get_rng_state(), own and own.get_rng_state(device), random.getstate(), np.random.get_state()


def _set_random_state(device: torch.device, state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        getattr(torch, device.type).set_rng_state(state[1], device)
    random.setstate(state[2])
    np.random.set_state(state[3])


def _with_stream(extra_args: dict, stream: Callable) -> dict:
    """A sampler's arguments with which its evaluations are this stream's, and other packs' wrappers are within them."""
    options = _outermost(extra_args["model_options"], WrappersMP.CALC_COND_BATCH, _evaluate_stream)
    return {
        **extra_args,
        "model_options": {**options, "transformer_options": {**options["transformer_options"], KEY: stream}},
    }


def _numbered(guider: Any, pictures: int) -> Any:
    """This guider, which is the caller's own, whose conditionings say which pictures of the batch they are of.

    Whoever evaluates some pictures at a time, as context windows do, takes their part of a tensor that has as many rows
    as there are pictures.
    """
    numbers = torch.arange(pictures)
    guider.conds = {name: [{**cond, PICTURES: numbers} for cond in group] for name, group in guider.conds.items()}
    return guider


def _outermost(model_options: dict, kind: str, wrapper: Callable) -> dict:
    """Model options in which other packs' wrappers of this kind are within ours."""
    inner = model_options.get("transformer_options", {})
    wrappers = inner.get("wrappers", {})
    first = {KEY: [wrapper], **{key: group for key, group in wrappers.get(kind, {}).items() if key != KEY}}
    return {**model_options, "transformer_options": {**inner, "wrappers": {**wrappers, kind: first}}}


def _remembering_apart(executor: Any, guider: Any, extra_args: dict) -> tuple[Any, Any, dict]:
    """What C samples with: copies of all that may remember something of a run, so that F has the originals alone."""
    apart = Apart(_SHARED)
    own = copy.copy(executor)
    own.class_obj = apart.object(executor.class_obj)
    own.original, own.wrappers = apart(executor.original), apart(executor.wrappers)
    own_guider = copy.copy(guider)
    for name, value in vars(guider).items():
        if name not in _NO_MEMORY:
            setattr(own_guider, name, apart(value))
    own_guider.conds = {
        name: [_controlled_apart(cond, apart) for cond in group] for name, group in guider.conds.items()
    }
    return own, own_guider, {**extra_args, "model_options": apart(extra_args["model_options"])}


def _controlled_apart(cond: dict, apart: Apart) -> dict:
    """A conditioning with its own copies of the control models that packs have made; the host's remember nothing."""
    control = cond.get("control")
    return cond if control is None else {**cond, "control": _own_control(control, apart)}


def _own_control(control: Any, apart: Apart) -> Any:
    before = getattr(control, "previous_controlnet", None)
    own_before = before if before is None else _own_control(before, apart)
    if own_before is before and type(control).__module__.startswith("comfy."):
        return control
    own = apart.object(control)
    if before is not None:
        own.previous_controlnet = own_before
    return own


@contextmanager
def uncompiled() -> Iterator[None]:
    """Evaluate as it is written what somebody has had compiled.

    The host compiles a UNet for the patches that its first call has, and F's and C's are not those of a plain run.
    """
    stance = getattr(torch.compiler, "set_stance", None)
    with stance("force_eager") if stance else nullcontext():
        yield


def _say_if_compiled(model_options: dict) -> None:
    if "torch_compile_kwargs" in model_options:
        logging.getLogger("ProFusion").info(
            "torch.compile is left out while a concept is drawn: the UNet's attention differs from call to call"
        )
