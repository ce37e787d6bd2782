"""Train an Infusion residual (arXiv 2404.14007): one vector per cross-attention layer, nothing else moves.

Each step noises the concept's latents, evaluates F without autograd and C with it on the same noisy latent, and
minimises the eps-prediction error of C inside the concept's mask, and its distance from F outside. Who evaluates the
model is the caller's affair: the kernel's UNet and the host's model are trained by the same code and, from the same
seed, to the same residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attending import UNET, Attending
from ..details import MAX_CAPACITY, Details, beginning, longest
from ..diffusion import training_sigmas
from ..infusion import (
    Layer,
    Patches,
    Placement,
    QueryStore,
    architecture_name,
    chunks_in_order,
)
from ..keeping import digest
from ..loop import MOMENTS, Group, LoopOptions, TrainingError, TrainingLoop, check_whole, generator_of
from ..losses import masked_noise_error, relative_noise_error, row_noise_error
from ..queries import TakenOnce
from . import automatic
from .concept import Residual, ResidualError, check_architecture
from .noising import ADDED, Noising

_DETAILS_STRIDE = -1_000_033  # of the seeds of their gates: no others are among them
_OF_DETAILS = tuple(f"{kind}.{name}" for kind in MOMENTS for name in ("details", "gates"))
_WITHOUT_GRADIENT = (
    "something on the model computes its attention without one, as SageAttention and other kernels made for inference "
    "do. Connect the model as it was before that"
)
NOUN_PROMPTS = ("a photo of a {}", "a picture of a {}", "a {}")

PredictWithPatches = Callable[[Tensor, Tensor, int, Patches], Tensor]
"""`predict_noise(x, sigma, prompt, patches) -> eps`: x = x0 + sigma * eps of (B, C, H, W), sigma (B,), the index of the
prompt whose context all B rows take, and the attention patches to evaluate with. Of a flow model, the velocity."""


@dataclass(frozen=True)
class TrainingOptions(LoopOptions):
    """How a residual is trained; see `LoopOptions`.

    learning_rate: AdamW's, for the paper's loss; or 0, automatic: steps in units of the noun's own row, the loss as a
    share of what the plain model misses, and a bound (see `automatic`). flip: whether the mirrored pictures are used
    too. preserve: how much C is held to F's own prediction outside the concept's mask; 0 is the paper's loss.
    stop_early: end where the loss falls no more. find_object: find masks where all pictures count as a whole. None, for
    both: where the rate is automatic. capacity: n of `details`; 1 is the paper's, one vector for each layer.
    """

    steps: int = 300
    learning_rate: float = 0.02
    batch_size: int = 4
    seed: int = 0
    flip: bool = True
    preserve: float = 1.0
    stop_early: bool | None = None
    find_object: bool | None = None
    capacity: int = 1

    may_be_automatic: ClassVar[bool] = True
    largest_rate: ClassVar[float] = 10.0
    usual_rates: ClassVar[str] = "0.01 to 0.03"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "capacity")
        if not 1 <= self.capacity <= MAX_CAPACITY:
            raise ValueError(
                f"capacity={self.capacity} must lie in [1, {MAX_CAPACITY}]: 1 is the paper's, 4 is more alike"
            )
        if not 0 <= self.preserve <= 100:
            raise ValueError(
                f"preserve={self.preserve} must lie in [0, 100]: 1 is usual, 0 leaves what is around the concept free"
            )

    @property
    def automatic(self) -> bool:
        """Whether the training finds its own steps."""
        return self.learning_rate == 0

    @property
    def loss_title(self) -> str:
        """What the losses are, in words."""
        return "loss (share of the plain model's)" if self.automatic else "loss (eps error inside the mask)"

    @property
    def stops_early(self) -> bool:
        return self.automatic if self.stop_early is None else self.stop_early

    @property
    def finds_object(self) -> bool:
        return self.automatic if self.find_object is None else self.find_object


@dataclass(frozen=True)
class Reference:
    """One picture of the concept: latent (C, H, W), scaled as the UNet takes it, and weights of its cells (H, W)."""

    latent: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.latent.ndim != 3 or self.mask.shape != self.latent.shape[-2:]:
            raise ValueError(
                f"a reference needs a latent (C, H, W) and a mask (H, W) of its size; got {tuple(self.latent.shape)} "
                f"and {tuple(self.mask.shape)}"
            )
        if not torch.isfinite(self.latent).all():
            raise TrainingError("a reference picture's latent is not finite: the VAE overflowed; run it in float32")
        if not self.mask.sum() > 0:
            raise TrainingError(
                "a mask is empty, so nothing of its picture would be learned. Paint the object white, or leave masks "
                "out"
            )


def residual_loss(predicted: Tensor, noise: Tensor, plain: Tensor, mask: Tensor, preserve: float) -> Tensor:
    """Inside the mask the noise that was added, outside it what F predicts: scalar, float32.

    predicted (C's), noise and plain (F's prediction): (B, C, H, W); mask (B, H, W). The paper's loss
    (arXiv 2404.14007, section 5.1) is the first part alone. It leaves a residual free to do anything around the
    concept, and some of every map falls there. What should stay as it was is known, F has just been evaluated, so the
    second part costs nothing.
    """
    loss = masked_noise_error(predicted, noise, mask)
    outside = 1 - mask
    if preserve and outside.any():
        loss = loss + preserve * masked_noise_error(predicted, plain, outside)
    return loss


def relative_residual_loss(predicted: Tensor, noise: Tensor, plain: Tensor, mask: Tensor, preserve: float) -> Tensor:
    """The same, row by row, as a share of the error that F itself has inside the mask: 1 where C predicts as F does.

    Arguments as `residual_loss` has them; scalar, float32. F's error falls by a hundred from little noise to much, and
    in a plain mean the rows with little noise would count alone, which say least of how a concept looks.
    """
    unit = row_noise_error(plain, noise, mask).clamp_min(1e-8)
    loss = relative_noise_error(predicted, noise, mask, unit)
    outside = 1 - mask
    if preserve and outside.any():
        loss = loss + preserve * relative_noise_error(predicted, plain, outside, unit)
    return loss


@dataclass(frozen=True)
class ResidualBatch:
    """noisy, and noise, which is what the model should say of it (`noising`), the noise or a velocity: (B, C, H, W);
    sigma (B,), mask (B, H, W), and the prompt of all rows."""

    noisy: Tensor
    noise: Tensor
    sigma: Tensor
    mask: Tensor
    prompt: int


class ResidualTraining(TrainingLoop):
    """One training run: `steps()` does the work, `residual()` is what has been learned so far.

    references: of one size. flipped: the same pictures mirrored *before* encoding, or empty. prompt_rows: for each
    prompt that `predict_noise` knows, the noun's rows in its context. resume: a residual of the same model whose
    `training_state` is kept, to go on from bit for bit, or one of no steps, to start from. sigmas: the noise levels of
    the model's timesteps (n,), each as likely to be drawn; default Stable Diffusion's.
    attending: how F's and C's evaluations meet in the model's attention. noising: what the model is asked.
    queries: where F's queries wait in a step. A model that recomputes C on the way back asks for each twice.
    identity: says whether two trainings of one model from nothing are the same. seen: what was found out of the model
    and the pictures before the first step here, where the options ask for it. checks: the loss as a share of the plain
    model's, always on the same noisy pictures, after every `automatic.CHECK_EVERY` steps. own: latents (N, C, H, W) of
    pictures that the model itself drew of the noun, given before the first step or not at all; strangeness: how many
    times as much the model misses of the references as of those, found with `seen`.
    """

    def __init__(
        self,
        predict_noise: PredictWithPatches,
        references: Sequence[Reference],
        prompt_rows: Sequence[tuple[int, ...]],
        layers: Sequence[Layer],
        noun: str,
        options: TrainingOptions,
        flipped: Sequence[Reference] = (),
        resume: Residual | None = None,
        sigmas: Tensor | None = None,
        queries: Callable[[], QueryStore] = TakenOnce,
        attending: Attending = UNET,
        noising: Noising = ADDED,
    ):
        _check_references(references, flipped)
        self._predict_noise, self._layers, self._noun = predict_noise, tuple(layers), noun
        self._queries, self._rows = queries, tuple(prompt_rows)
        self._attending, self._noising = attending, noising
        self.seen: automatic.Seen | None = None
        self.checks: list[float] = []
        self.own: Tensor | None = None
        self.strangeness: float | None = None
        self.found_masks = False
        self._check_batches: list[ResidualBatch] = []
        self._names = tuple(layer.name for layer in layers)
        both = [references, flipped] if options.flip and flipped else [references]
        device = references[0].latent.device
        with torch.inference_mode(False):  # a host may call in inference mode, whose tensors autograd does not take
            # latents (1|2, M, C, H, W), masks (1|2, M, H, W): the pictures, and mirrored
            self._latents = torch.stack([torch.stack([item.latent for item in side]) for side in both]).float()
            self._masks = torch.stack([torch.stack([item.mask for item in side]) for side in both]).float().to(device)
            self._sigmas = (training_sigmas() if sigmas is None else sigmas).to("cpu", torch.float32, copy=True)
            self.delta = torch.zeros(len(layers), 1, layers[0].context_dim, device=device)
            self.details = self._first_details(options).to(device) if options.capacity > 1 else None
        self._placements = [Placement(self.delta, self._names, rows, details=self.details) for rows in prompt_rows]
        # what older trainings did not have, as they were
        later = {"stop_early": None, "find_object": None, "capacity": 1}
        compared = {
            name: value
            for name, value in asdict(options).items()
            if name != "steps" and (name not in later or value is not later[name])
        }
        self.identity = digest(compared, noun, self._names, prompt_rows, self._latents, self._masks)
        details = {} if self.details is None else {"details": self.details.values, "gates": self.details.gates}
        learned = Group("the residual", {"delta": self.delta, **details}, _WITHOUT_GRADIENT)
        super().__init__(options, [learned], self._latents[0, 0].numel())
        if resume is not None:
            self._resume(resume)

    def _first_details(self, options: TrainingOptions) -> Details:
        widths = [layer.width for layer in self._layers]
        if not all(widths):
            raise TrainingError("nobody can tell how wide the model's layers are: set capacity to 1")
        generator = generator_of(options.seed * _DETAILS_STRIDE - 1)
        return beginning(options.capacity, len(widths), self._layers[0].context_dim, widths, generator)

    def _resume(self, residual: Residual) -> None:
        check_architecture(residual, self._layers)
        if residual.noun != self._noun:
            raise ResidualError(
                f"the residual to resume is of the noun {residual.noun!r}, this training of {self._noun!r}"
            )
        if residual.steps and residual.seed != self.options.seed:
            raise ResidualError(
                f"the residual to resume was trained with seed {residual.seed}, not {self.options.seed}: set that "
                "seed, or it would not be the same training"
            )
        if residual.steps > self.options.steps:
            raise ResidualError(
                f"the residual to resume has {residual.steps} steps already, and steps={self.options.steps} counts "
                "from the first: raise steps to train it further"
            )
        # what has not been trained yet, as of a PromptNet, starts details of its own
        if residual.capacity != self.options.capacity and (residual.steps or residual.capacity > 1):
            raise ResidualError(
                f"the residual to resume has a capacity of {residual.capacity}, this training of "
                f"{self.options.capacity}: set capacity to {residual.capacity}"
            )
        state = dict(residual.training_state or {})
        kept = [*MOMENTS, *(_OF_DETAILS if residual.details is not None else ())]
        if residual.steps and set(kept) - set(state):
            raise ResidualError(
                "the residual to resume was saved without its training state; save it in float32 with the training "
                "state to go on later"
            )
        moments = {f"{kind}.delta": state.pop(kind, None) for kind in MOMENTS} if residual.steps else {}
        with torch.inference_mode(False), torch.no_grad():
            self.delta.copy_(residual.delta)
            if residual.details is not None:
                self.details.values.copy_(residual.details.values)
                self.details.gates.copy_(residual.details.gates)
        self.restore({**state, **moments, "step": torch.tensor(residual.steps)})

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the references."""
        return tuple(self._latents.shape[2:])

    @property
    def noun(self) -> str:
        """What the pictures show."""
        return self._noun

    @property
    def without_masks(self) -> bool:
        """Whether all of every picture counts."""
        return bool((self._masks == 1).all())

    @property
    def masks(self) -> Tensor:
        """The weights of the references' cells (M, H, W): given, or found before the first step."""
        return self._masks[0]

    def draw(self, generator: torch.Generator) -> ResidualBatch:
        """Pictures, mirrored or not, noise of levels as `noising` draws them, and one prompt for all rows."""
        count, device = self.options.batch_size, self._latents.device
        picture = torch.randint(self._latents.shape[1], (count,), generator=generator)
        side = torch.randint(self._latents.shape[0], (count,), generator=generator)
        prompt = int(torch.randint(len(self._placements), (), generator=generator))
        sigma = self._noising.levels(self._levels(), count, generator).to(device)
        clean = self._latents[side, picture]
        noise = torch.randn(clean.shape, generator=generator).to(device)
        noisy, target = self._noising.noisy(clean, noise, sigma), self._noising.target(clean, noise)
        return ResidualBatch(noisy, target, sigma, self._masks[side, picture], prompt)

    def _levels(self) -> Tensor:
        """The noise levels that are drawn from."""
        least = int(automatic.LEAST_NOISE * len(self._sigmas)) if self.options.automatic else 0
        return self._sigmas[least:]

    def loss(self, batch: ResidualBatch) -> Tensor:
        """See `residual_loss`; F is evaluated first, and leaves its queries."""
        weighed = relative_residual_loss if self.options.automatic else residual_loss
        return self._weighed(batch, weighed, self.options.preserve)

    def _weighed(self, batch: ResidualBatch, weighed: Callable[..., Tensor], preserve: float) -> Tensor:
        queries, placements = self._queries(), (self._placements[batch.prompt],)
        common = queries, lambda options, chunk: placements, chunks_in_order
        with torch.no_grad():  # F needs no gradient: its queries are constants of the loss
            plain = self._predict_noise(batch.noisy, batch.sigma, batch.prompt, self._attending.foundation(*common))
        patches = self._attending.customised(*common)
        predicted = self._predict_noise(batch.noisy, batch.sigma, batch.prompt, patches)
        return weighed(predicted, batch.noise, plain, batch.mask, preserve)

    def learning_rate(self) -> float:
        if not self.options.automatic:
            return self.options.learning_rate
        return automatic.rate(self.step) * self.seen.row_size

    def prepare(self) -> None:
        """Look at the pictures with the model, where the options ask for anything that is found so."""
        options = self.options
        if self.seen is not None or not (options.automatic or options.stops_early or options.finds_object):
            return
        generator = generator_of(-1 - options.seed)
        with torch.inference_mode(False), torch.no_grad():
            find = self.without_masks and options.finds_object
            sides = self._latents if find else self._latents[:1]
            looked = [
                automatic.look(
                    self._predict_noise,
                    side,
                    self._rows[0],
                    self._sigmas,
                    generator,
                    showing=self._attending.showing,
                    noising=self._noising,
                )
                for side in sides
            ]
            self.seen = looked[0]
            if find:
                self.found_masks = True
                self._masks = torch.stack([side.weights() for side in looked])
            fixed = torch.randn(automatic.CHECK_ROWS, *self.latent_size, generator=generator)
            self._check_batches = self._fixed_batches(self._latents[0], self._masks[0], fixed)
            if self.own is not None:
                own = self.own.to(self._latents)
                one, other = (
                    self._plain_error(self._fixed_batches(latents, torch.ones_like(latents[:, 0]), fixed))
                    for latents in (self._latents[0], own)
                )
                self.strangeness = (one / other).mean().item()
        if self.step and self.step == (len(self.checks) + 1) * automatic.CHECK_EVERY:
            self._check()  # the one that the training went on from ended in

    def _fixed_batches(self, latents: Tensor, masks: Tensor, noise: Tensor) -> list[ResidualBatch]:
        """Latents (N, C, H, W), each in its turn, with this noise (B, C, H, W), at levels from all of the range."""
        index = torch.arange(len(noise))
        picture = index % len(latents)
        levels = self._levels()
        level = ((index + 0.5) / len(index) * len(levels)).long()
        sigma, clean, noise = levels[level].to(latents.device), latents[picture], noise.to(latents)
        noisy, target = self._noising.noisy(clean, noise, sigma), self._noising.target(clean, noise)
        parts = (each.split(self.options.batch_size) for each in (noisy, target, sigma, masks[picture]))
        parts = zip(*parts, strict=True)
        return [ResidualBatch(*part, prompt=0) for part in parts]

    def _plain_error(self, batches: Sequence[ResidualBatch]) -> Tensor:
        """F's error in each row, (B,)."""
        predicted = (self._predict_noise(batch.noisy, batch.sigma, batch.prompt, {}) for batch in batches)
        errors = [row_noise_error(one, batch.noise, batch.mask) for one, batch in zip(predicted, batches, strict=True)]
        return torch.cat(errors).clamp_min(1e-8)

    def remarks(self) -> list[str]:
        """What a person should know of the pictures, once the training has begun."""
        said = []
        found = self.seen.found if self.found_masks else ()
        hidden = [str(number) for number, seen in enumerate(found, start=1) if not seen]
        if hidden:
            said.append(
                f"the model sees no {self._noun!r} that stands out in picture {', '.join(hidden)}, so it may learn "
                "something else of it. Look at the masks that were found; paint your own, or give another noun"
            )
        if self.strangeness is not None and self.strangeness > automatic.STRANGE:
            said.append(
                f"the pictures are far from what the model knows: it misses {self.strangeness:.1f} times as much of "
                f"them as of a {self._noun} that it draws itself. Less is learned of such, so that nothing is "
                "destroyed: expect a likeness in colours more than in form"
            )
        return said

    def after_step(self) -> None:
        """Keep the residual within its bound, and check the loss now and then."""
        if self.options.automatic:
            self._bound()
        if self._check_batches and self.step % automatic.CHECK_EVERY == 0:
            self._check()

    def _bound(self) -> None:
        bound = self.seen.row_size, self.strangeness
        with torch.no_grad():
            if self.details is None:
                self.delta.copy_(automatic.bounded(self.delta, *bound))
                return
            values = self.details.values
            share = automatic.bounding(longest(self.delta, values), bound[0], self.delta.shape[-1], bound[1])
            self.delta.mul_(share)
            values.mul_(share)

    def _check(self) -> None:
        found = self._checked()
        if not math.isfinite(found):  # nor could a file keep it
            raise TrainingError(f"the loss is {found} after step {self.step}: use a model in float32 or bfloat16")
        self.checks.append(found)

    def _checked(self) -> float:
        """What C misses inside the masks as a share of what F misses there."""
        with torch.inference_mode(False), torch.no_grad():
            each = [
                len(batch.sigma) * self._weighed(batch, relative_residual_loss, 0.0).item()
                for batch in self._check_batches
            ]
        return sum(each) / automatic.CHECK_ROWS

    def why_ended(self) -> str:
        last = self.step - self.step % automatic.CHECK_EVERY
        return automatic.why_ended(self.checks, last) if self.options.stops_early else ""

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        return {**state, "checks": torch.tensor(self.checks, dtype=torch.float64)} if self.checks else state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore(state)
        self.checks = state["checks"].tolist() if "checks" in state else []

    def residual(self) -> Residual:
        """What has been learned so far, with the optimizer's state, so that it can be resumed."""
        state = self.state()
        moments = {kind: state[f"{kind}.delta"].clone() for kind in MOMENTS if f"{kind}.delta" in state}
        moments |= {name: state[name].clone() for name in _OF_DETAILS if name in state}
        checks = {"checks": state["checks"]} if "checks" in state else {}
        return Residual(
            delta=self.delta.detach().clone(),
            details=self.details,
            noun=self._noun,
            layers=self._names,
            architecture=architecture_name(self._layers),
            network=self._layers[0].network,
            adds_to=self._layers[0].adds_to,
            steps=self.step,
            seed=self.options.seed,
            training_state={**moments, "loss_scale": state["loss_scale"].float(), **checks} if moments else None,
        )


def _check_references(references: Sequence[Reference], flipped: Sequence[Reference]) -> None:
    if not references:
        raise TrainingError("no pictures: connect one to five pictures of the concept")
    sizes = {tuple(reference.latent.shape) for reference in (*references, *flipped)}
    if len(sizes) > 1:
        raise TrainingError(f"latents of different sizes, {sorted(sizes)}: resize the pictures to one size first")
    if flipped and len(flipped) != len(references):
        raise TrainingError(f"{len(flipped)} mirrored pictures for {len(references)} pictures; give one for each")
