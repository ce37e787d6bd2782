"""Fusion Sampling (ProFusion, arXiv 2305.13579, section 3.2): two stages at every noise level.

The fusion stage swaps a part of the predicted noise for fresh noise at the same noise level, m times, so that what the
conditions ask for can settle before the level is left. The refinement stage is an ordinary step of any sampler.

Written with x = alpha * x0 + sigma * eps. k-diffusion has alpha = 1, variance-preserving models alpha^2 + sigma^2 = 1,
flow models alpha = 1 - sigma; the stage is the same for all, since it sees only eps and the level sigma.
In the paper's symbols, with a_t and a_p = alpha-bar at t and at the step before it (p = t - 1),

    s^2 = eta^2 (1 - a_p) / (1 - a_t) (1 - a_t / a_p),
    x  <-  x - s^2 sqrt(1 - a_t) / (1 - a_p) eps  +  s sqrt((1 - a_t) (2 - 2 a_p - s^2)) / (1 - a_p) z.

With r = s^2 / (1 - a_p) = eta^2 (1 - (sigma_p / sigma_t)^2), sigma here in k-diffusion's units, that is

    x  <-  x - r sigma eps + sigma sqrt(r (2 - r)) z,      (1 - r)^2 + r (2 - r) = 1:

the noise keeps its variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from .diffusion import Denoiser

Stage = Literal["fusion", "refinement"]
Mode = Literal["dependent", "independent"]
Refine = Callable[[Tensor, int, int], Tensor]
"""`refine(x, first, last) -> x`: any sampler, under the refinement stage's guidance, from
level `first` to level `last`."""
FreshNoise = Callable[[Tensor], Tensor]
"""`fresh(x) -> z`: unit noise of x's shape, type and device, another at each call."""
_NOISE_ALONE = 1 - 1e-4  # the level of a flow model
Combine = Callable[[Tensor, Tensor, float], Tensor]
"""`combine(nothing, mean, scale) -> guided`, as `guide` is."""


@dataclass(frozen=True)
class FusionOptions:
    """How strong the fusion stage is, and where it acts.

    repeats: m, the fusion steps at each noise level. eta: 0..1, how much noise is swapped; 1 swaps what an ancestral
    step would. sigma_start, sigma_end: only levels with sigma_end <= sigma <= sigma_start have the stage.
    """

    repeats: int = 1
    eta: float = 1.0
    sigma_start: float = math.inf
    sigma_end: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.repeats, Integral) or self.repeats < 0:
            raise ValueError(f"repeats={self.repeats}: give 0 (no fusion stage) or more")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must lie in [0, 1]: the share of the noise that may be swapped")
        if not self.sigma_end <= self.sigma_start:
            raise ValueError(
                f"sigma_start={self.sigma_start} must not lie below sigma_end={self.sigma_end}: noise falls in a run, "
                "so the fusion stage would end before it starts"
            )

    def repeats_at(self, sigma: float, sigma_next: float) -> int:
        """Fusion steps before the step from sigma to sigma_next.

        None where no level is left, and none before the last step, to 0: it would swap eta^2 of what little
        noise there is for noise that only one step can still take out. (The authors' code stops short of 0, at
        sigma = 0.029, and has a stage before that step too: r = 0.50 of a noise of sigma = 0.041. It changes the
        picture by 0.2 % to 2 %.)
        """
        active = self.eta > 0 and self.sigma_end <= sigma <= self.sigma_start and 0 < sigma_next < sigma
        return self.repeats if active else 0


@dataclass(frozen=True)
class Guidance:
    """How the conditions of a step are weighed: e0 + scale * sum_i w_i (e_i - e0) / sum_i w_i.

    weights: of each condition. cfg: the scale in the refinement stage. fusion_cfg and gamma: the scale, and the
    factor of S*'s rows in the context, in the fusion stage (the authors' code: 3 and 0.8; their notebook: 7 and 0.6).
    mode: "dependent" evaluates S* within its prompt, e(S*, C); "independent" in a prompt of its own, e(S*), so that
    only the other conditions say the text. refresh: of how many evaluations of a stage one asks all conditions, where
    there are several (see `KeptDifferences`); the paper: 1. fusion_weights: of each condition in the fusion stage, None
    for the same as in the refinement stage. The authors' code guides that stage by S* in its prompt alone, which is a
    weight of 0 for the plain text.
    """

    weights: tuple[float, ...]
    cfg: float = 6.0
    fusion_cfg: float = 3.0
    gamma: float = 0.8
    mode: Mode = "dependent"
    refresh: int = 1
    fusion_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("no conditioning: connect at least one")
        total_weight(self.weights)
        if self.fusion_weights is not None:
            if len(self.fusion_weights) != len(self.weights):
                raise ValueError(f"{len(self.fusion_weights)} fusion_weights for {len(self.weights)} conditionings")
            total_weight(self.fusion_weights)
        if self.mode not in ("dependent", "independent"):
            raise ValueError(f"mode={self.mode!r}: choose dependent or independent")
        for name in ("cfg", "fusion_cfg", "gamma"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} is not a finite number")
        if not isinstance(self.refresh, Integral) or self.refresh < 1:
            raise ValueError(f"refresh={self.refresh}: give 1 (all conditions at every evaluation) or more")

    def scale(self, stage: Stage) -> float:
        """The guidance scale of a stage."""
        return self.fusion_cfg if stage == "fusion" else self.cfg

    def weights_in(self, stage: Stage) -> tuple[float, ...]:
        """The weight of each condition in a stage."""
        return self.weights if stage == "refinement" or self.fusion_weights is None else self.fusion_weights

    def word_scale(self, stage: Stage) -> float:
        """The factor of S*'s rows in the context in a stage."""
        return self.gamma if stage == "fusion" else 1.0


class KeptDifferences:
    """Caches how the other predictions differ from the first; refreshed every `refresh` calls.

    The guided prediction is e_1 + d_0 + s (sum_i w_i d_i / sum w - d_0) with d_i = e_i - e_1 and d_0 = e_0 - e_1. From
    one noise level to the next the differences change less than the predictions do, so a call in between needs e_1
    alone: one row where (S*, C), C and nothing are three.
    """

    def __init__(self, refresh: int):
        self._refresh, self._calls = refresh, 0
        self._kept: list[Tensor] = []

    @property
    def always(self) -> bool:
        """Whether nothing is ever kept."""
        return self._refresh == 1

    @property
    def due(self) -> bool:
        """Whether the next call needs all predictions, not the first alone."""
        return self._calls % self._refresh == 0

    def complete(self, predictions: Sequence[Tensor], unit: float = 1.0) -> list[Tensor]:
        """All predictions, from all or from the first alone; where all are due they come back as they are.

        unit: what a prediction's difference is proportional to at equal difference of noise: 1 where noise is
        predicted, sigma where denoised pictures are (x0 = x - sigma eps).
        """
        if self.due:
            self._kept = [(other - predictions[0]) / unit for other in predictions[1:]] if not self.always else []
            completed = list(predictions)
        else:
            completed = [predictions[0], *(predictions[0] + kept * unit for kept in self._kept)]
        self._calls += 1
        return completed


def swap_share(ratio: float | Tensor, eta: float) -> float | Tensor:
    """r = eta^2 (1 - ratio^2): the part of the predicted noise that a fusion step removes.

    ratio: the next noise level over this one, 0..1, both as noise-to-signal ratios (k-diffusion's sigma; sigma / (1 -
    sigma) of a flow model). arXiv 2305.13579, the update of the fusion stage, rewritten (see the module).
    """
    return eta**2 * (1 - ratio**2)


def swap_noise(x: Tensor, eps: Tensor, fresh: Tensor, sigma: float | Tensor, share: float | Tensor) -> Tensor:
    """x - r sigma eps + sigma sqrt(r (2 - r)) z: one fusion step.

    x, the predicted noise eps and the fresh noise z: (B, C, H, W). sigma: the noise's standard
    deviation in x. share: r, 0..1.
    """
    return x - share * sigma * eps + sigma * (share * (2 - share)) ** 0.5 * fresh


def mean_prediction(predictions: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i e_i / sum_i w_i, the one prediction that stands for several conditions.

    Guided by a scale s, e0 + s (mean - e0) = e0 + sum_i (s w_i / sum w) (e_i - e0): the paper's sum over independent
    conditions, and over (S*, C) and C where they are dependent (Eq. 7 and 8). A single prediction comes back to the
    bit. Raises ValueError if there is nothing to average.
    """
    total = total_weight(weights)
    if len(predictions) != len(weights):
        raise ValueError(f"{len(predictions)} predictions and {len(weights)} weights: give each a weight")
    shares = [weight / total for weight in weights]
    mean = shares[0] * predictions[0]
    for prediction, share in zip(predictions[1:], shares[1:], strict=True):
        mean = mean + share * prediction
    return mean


def total_weight(weights: Sequence[float]) -> float:
    """The sum of weights; ValueError where it cannot be divided by."""
    total = math.fsum(weights)
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights {list(weights)} are not all finite numbers")
    if abs(total) < 1e-6:
        raise ValueError(
            f"the weights {list(weights)} sum to {total:g}, so that their mean means nothing: raise one of them, or "
            "give fewer terms"
        )
    return total


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, e0 + s (e - e0) (arXiv 2207.12598), of noise or of denoised pictures alike."""
    return unconditional + (conditional - unconditional) * scale


class RunGuidance:
    """`Guidance` in one run of one latent: what an evaluation has to ask for, and the guided
    prediction from the answers.

    Predictions are in the order (first condition, nothing, further conditions), of the conditions that `used` names
    for their stage. What is kept between refreshes is each stage's own: S* is scaled in the one and not in the other.
    """

    def __init__(self, guidance: Guidance):
        self.guidance = guidance
        stages: tuple[Stage, Stage] = ("fusion", "refinement")
        self._used = {
            stage: tuple(index for index, weight in enumerate(guidance.weights_in(stage)) if weight) for stage in stages
        }
        # One condition alone in a run is plain guidance, to the bit.
        several = len({index for used in self._used.values() for index in used}) > 1
        self._kept = {stage: KeptDifferences(guidance.refresh if several else 1) for stage in stages}

    def used(self, stage: Stage) -> tuple[int, ...]:
        """The conditions that have a weight in a stage."""
        return self._used[stage]

    def needs_nothing(self, stage: Stage) -> bool:
        """Whether the prediction under no condition matters in a stage."""
        return not math.isclose(self.guidance.scale(stage), 1.0)

    def step(
        self,
        stage: Stage,
        evaluate: Callable[[bool], Sequence[Tensor]],
        unit: float = 1.0,
        between: Callable[[list[Tensor]], list[Tensor]] = list,
        combine: Combine = guide,
    ) -> Tensor:
        """One evaluation's guided prediction.

        evaluate: `evaluate(everything) -> predictions`, all of them, or the first alone where not everything is needed.
        unit: see `KeptDifferences.complete`. between: what a host's hooks make of the predictions before guidance.
        combine: what takes the place of `guide`.
        """
        kept, weights = self._kept[stage], self.guidance.weights_in(stage)
        predictions = between(kept.complete(evaluate(kept.due), unit))
        mean = mean_prediction([predictions[0], *predictions[2:]], [weights[index] for index in self._used[stage]])
        return combine(predictions[1], mean, self.guidance.scale(stage))


def fresh_noise(generators: Sequence[torch.Generator]) -> FreshNoise:
    """Unit noise from generators on the CPU: one for each row, so that a row is the same in
    any batch, or one for all."""

    def fresh(x: Tensor) -> Tensor:
        if len(generators) == 1:
            return torch.randn(x.shape, generator=generators[0]).to(x)
        rows = [torch.randn(x.shape[1:], generator=generator) for generator in generators]
        if len(rows) != len(x):
            raise ValueError(f"{len(rows)} generators for {len(x)} rows: give each row one, or one for all")
        return torch.stack(rows).to(x)

    return fresh


def fusion_stage(
    model: Denoiser,
    x: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    options: FusionOptions,
    fresh: FreshNoise,
    flow: bool = False,
) -> Tensor:
    """The fusion stage of one noise level: x (B, C, H, W) -> x of the same level.

    model: `model(x, sigma (B,)) -> denoised` under the stage's guidance. sigma, sigma_next: scalars, this level and the
    next. flow: x = (1 - sigma) x0 + sigma eps instead of x0 + sigma eps.
    """
    repeats = options.repeats_at(float(sigma), float(sigma_next))
    if not repeats:
        return x
    alpha = 1 - sigma if flow else torch.ones_like(sigma)
    ratio = sigma_next / sigma * (alpha / (1 - sigma_next)) if flow else sigma_next / sigma
    share = swap_share(ratio, options.eta)
    for _ in range(repeats):
        denoised = model(x, sigma.expand(len(x)))
        eps = (x - alpha * denoised) / sigma
        x = swap_noise(x, eps, fresh(x), sigma, share)
    return x


def segments(sigmas: Sequence[float], options: FusionOptions, flow: bool = False) -> list[tuple[int, int, bool]]:
    """Cut a run into the stretches that the refinement's sampler does in one go: (first step, last step + 1, fused).

    The fresh noise of a fusion stage makes earlier predictions stale, so a stretch begins at every level that has one;
    until the next such level the sampler is left alone, and keeps its memory if it has one. A flow model's first level
    may be noise alone: a stage would draw another seed's there, and nothing else, so it has none.
    """
    cuts: list[tuple[int, int, bool]] = []
    for step, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        has_signal = not flow or sigma < _NOISE_ALONE
        fused = has_signal and options.repeats_at(float(sigma), float(sigma_next)) > 0
        if fused or not cuts:
            cuts.append((step, step + 1, fused))
        else:
            cuts[-1] = (cuts[-1][0], step + 1, cuts[-1][2])
    return cuts


def sample_fusion(
    model: Denoiser,
    refine: Refine,
    x: Tensor,
    sigmas: Tensor,
    options: FusionOptions,
    fresh: FreshNoise,
    flow: bool = False,
) -> Tensor:
    """Fusion Sampling with any sampler as the refinement (arXiv 2305.13579, Algorithm 1).

    x (B, C, H, W): the noisy start, at sigmas[0]. model: `model(x, sigma (B,)) -> denoised` under the fusion stage's
    guidance. refine: called for each stretch of levels, see `segments`. fresh, flow: see `fusion_stage`. Without fusion
    steps this is one call of `refine`, to the bit.
    """
    for first, last, fused in segments(sigmas.tolist(), options, flow):
        if fused:
            x = fusion_stage(model, x, sigmas[first], sigmas[first + 1], options, fresh, flow)
        x = refine(x, first, last)
    return x
