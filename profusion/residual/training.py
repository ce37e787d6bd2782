"""Train an Infusion residual (arXiv 2404.14007): one vector per cross-attention layer, nothing else moves.

Each step noises the concept's latents, evaluates F without autograd and C with it on the same noisy latent, and
minimises the eps-prediction error of C inside the concept's mask, and its distance from F outside. Who evaluates the
model is the caller's affair: the kernel's UNet and the host's model are trained by the same code and, from the same seed,
to the same residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion import training_sigmas
from ..infusion import Layer, Patches, Placement, architecture_name, customised_patches, foundation_patches
from .concept import Residual, ResidualError, check_architecture

PROMPTS = ("a photo of a {}", "a picture of a {}", "a {}")

PredictNoise = Callable[[Tensor, Tensor, int, Patches], Tensor]
"""`predict_noise(x, sigma, prompt, patches) -> eps`: x = x0 + sigma * eps of (B, C, H, W), sigma (B,), the index of the
prompt whose context all B rows take, and the attention patches to evaluate with."""


class TrainingError(RuntimeError):
    """Training cannot start or go on. The message says why and what to do."""


@dataclass(frozen=True)
class TrainingOptions:
    """How a residual is trained. `steps` counts from nothing: a resumed training does what is left of them.

    preserve: how much C is held to F's own prediction outside the concept's mask; 0 is the paper's loss.
    """

    steps: int = 300
    learning_rate: float = 0.02
    batch_size: int = 4
    seed: int = 0
    flip: bool = True
    preserve: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: train at least one")
        if not 0 < self.learning_rate <= 10:
            raise ValueError(f"learning_rate={self.learning_rate} must lie in (0, 10]; 0.01 to 0.03 is usual")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if not 0 <= self.preserve <= 100:
            raise ValueError(
                f"preserve={self.preserve} must lie in [0, 100]: 1 is usual, 0 leaves what is around the concept free"
            )


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
                "a mask is empty, so nothing of its picture would be learned. Paint the object white, or leave masks out"
            )


def residual_loss(predicted: Tensor, noise: Tensor, plain: Tensor, mask: Tensor, preserve: float) -> Tensor:
    """Inside the mask the noise that was added, outside it what F predicts: scalar, float32.

    predicted (C's), noise and plain (F's prediction): (B, C, H, W); mask (B, H, W). The paper's loss (arXiv 2404.14007,
    section 5.1) is the first part alone. It leaves a residual free to do anything around the concept, and some of every map
    falls there. What should stay as it was is known, F has just been evaluated, so the second part costs nothing.
    """
    loss = masked_noise_error(predicted, noise, mask)
    outside = 1 - mask
    if preserve and outside.any():
        loss = loss + preserve * masked_noise_error(predicted, plain, outside)
    return loss


def masked_noise_error(predicted: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """Mean of |eps_theta - eps|^2 over the mask: (B, C, H, W) twice, weights (B, H, W) -> scalar, float32."""
    error = (predicted.float() - noise.float()) ** 2
    weights = mask.float()[:, None].expand_as(error)
    return (error * weights).sum() / weights.sum()


@dataclass(frozen=True)
class _Batch:
    """noisy = clean + sigma * noise and noise (B, C, H, W), sigma (B,), mask (B, H, W), and the prompt of all rows."""

    noisy: Tensor
    noise: Tensor
    sigma: Tensor
    mask: Tensor
    prompt: int


class _TakenOnce(dict):
    """F's queries, each handed out once: C needs none twice, and while it is evaluated memory is dear."""

    def get(self, key, default=None):
        return self.pop(key, default)


def differentiate(
    loss_of: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    scale: float,
    when: str,
    learning_rate: float,
    without_gradient: str,
) -> tuple[float, float]:
    """Leave a loss's gradient in the parameters' `grad`; returns the loss, and the scale that it could be multiplied by.

    A float16 model would round the gradient of a mean over many cells to zero, so the loss is multiplied by `scale`, a power
    of two, on the way back, which in float32 changes no bit. Where that overflows, a smaller one is taken and `loss_of`
    evaluated again. Raises TrainingError: `without_gradient` is what to say where none arrives.
    """
    while True:
        loss = loss_of()
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} {when}. Lower the learning rate ({learning_rate}), or use a model in float32 or bfloat16"
            )
        for parameter in parameters:
            parameter.grad = None
        if loss.requires_grad:
            (loss * scale).backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not any(gradient.any() for gradient in gradients):
            raise TrainingError(without_gradient)
        if all(torch.isfinite(gradient).all() for gradient in gradients):
            for gradient in gradients:
                gradient /= scale
            return value, scale
        if scale <= 2**-16:
            raise TrainingError(f"the gradient overflowed {when}: use a model in float32 or bfloat16")
        scale /= 16


class ResidualTraining:
    """One training run: `steps()` does the work, `residual()` is what has been learned so far.

    references: of one size. flipped: the same pictures mirrored *before* encoding, or empty. prompt_rows: for each
    prompt that `predict_noise` knows, the noun's rows in its context. resume: a residual of the same model whose
    `training_state` is kept, to go on from bit for bit, or one of no steps, to start from. sigmas: the noise levels of
    the model's timesteps (n,), each as likely to be drawn; default Stable Diffusion's.

    The residual, the loss and the optimizer are float32, whatever `predict_noise` computes in.
    """

    def __init__(
        self,
        predict_noise: PredictNoise,
        references: Sequence[Reference],
        prompt_rows: Sequence[tuple[int, ...]],
        layers: Sequence[Layer],
        noun: str,
        options: TrainingOptions,
        flipped: Sequence[Reference] = (),
        resume: Residual | None = None,
        sigmas: Tensor | None = None,
    ):
        if not references:
            raise TrainingError("no pictures: connect one to five pictures of the concept")
        sizes = {tuple(reference.latent.shape) for reference in (*references, *flipped)}
        if len(sizes) > 1:
            raise TrainingError(f"latents of different sizes, {sorted(sizes)}: resize the pictures to one size first")
        if flipped and len(flipped) != len(references):
            raise TrainingError(f"{len(flipped)} mirrored pictures for {len(references)} pictures; give one for each")
        self._predict_noise, self._layers, self._noun = predict_noise, tuple(layers), noun
        self._names = tuple(layer.name for layer in layers)
        self._prompt_rows, self.options = list(prompt_rows), options
        both = [references, flipped] if options.flip and flipped else [references]
        device = references[0].latent.device
        with torch.inference_mode(False):  # a host may call in inference mode, whose tensors autograd does not take
            self._latents = torch.stack([torch.stack([item.latent for item in side]) for side in both]).float()
            self._masks = torch.stack([torch.stack([item.mask for item in side]) for side in both]).float().to(device)
            self._sigmas = (training_sigmas() if sigmas is None else sigmas).to("cpu", torch.float32, copy=True)
            self.delta = torch.zeros(len(layers), 1, layers[0].context_dim, device=device, requires_grad=True)
            self._optimizer = torch.optim.AdamW([self.delta], lr=options.learning_rate, weight_decay=0.0)
        # latents (1|2, M, C, H, W), masks (1|2, M, H, W); the gradient of a mean is this much smaller than of a sum
        self._loss_scale = 2.0 ** math.floor(math.log2(options.batch_size * self._latents[0, 0].numel()))
        self.step = 0
        self.losses: list[float] = []
        if resume is not None:
            self._resume(resume)

    def _resume(self, residual: Residual) -> None:
        check_architecture(residual, self._layers)
        if residual.noun != self._noun:
            raise ResidualError(
                f"the residual to resume is of the noun {residual.noun!r}, this training of {self._noun!r}"
            )
        if residual.steps and residual.seed != self.options.seed:
            raise ResidualError(
                f"the residual to resume was trained with seed {residual.seed}, not {self.options.seed}: set that seed, "
                "or it would not be the same training"
            )
        if residual.steps > self.options.steps:
            raise ResidualError(
                f"the residual to resume has {residual.steps} steps already, and steps={self.options.steps} counts from "
                "the first: raise steps to train it further"
            )
        state = residual.training_state or {}
        if residual.steps and {"exp_avg", "exp_avg_sq"} - set(state):
            raise ResidualError(
                "the residual to resume was saved without its training state; save it in float32 with the training "
                "state to go on later"
            )
        self.step = residual.steps
        with torch.inference_mode(False), torch.no_grad():
            self.delta.copy_(residual.delta)
            if self.step:
                moments = {name: state[name].to(self.delta, copy=True) for name in ("exp_avg", "exp_avg_sq")}
                self._optimizer.state[self.delta] = {"step": torch.tensor(float(self.step)), **moments}
            if "loss_scale" in state:
                self._loss_scale = state["loss_scale"].item()

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the references."""
        return tuple(self._latents.shape[2:])

    def steps(self) -> Iterator[float]:
        """Train to the end, yielding each step's loss; stop asking and the training stops after the last whole step.

        Raises TrainingError on a loss that is not finite; what was learned before it is still in `residual()`.
        """
        while self.step < self.options.steps:
            yield self._one_step()

    def _one_step(self) -> float:
        # Autograd must be on even inside a host that runs its nodes in inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            value = self._differentiate(self._draw())
            self._optimizer.step()
        self.step += 1
        self.losses.append(value)
        return value

    def _draw(self) -> _Batch:
        """What this step trains on. It depends on the seed and the step only, so that a resumed training draws alike."""
        count, device = self.options.batch_size, self._latents.device
        generator = torch.Generator().manual_seed((self.options.seed * 1_000_003 + self.step) % 2**63)
        picture = torch.randint(self._latents.shape[1], (count,), generator=generator)
        side = torch.randint(self._latents.shape[0], (count,), generator=generator)
        prompt = int(torch.randint(len(self._prompt_rows), (), generator=generator))
        sigma = self._sigmas[torch.randint(len(self._sigmas), (count,), generator=generator)].to(device)
        clean = self._latents[side, picture]
        noise = torch.randn(clean.shape, generator=generator).to(device)
        return _Batch(clean + sigma.view(-1, 1, 1, 1) * noise, noise, sigma, self._masks[side, picture], prompt)

    def _differentiate(self, batch: _Batch) -> float:
        """Leave the loss's gradient in `delta.grad`; returns the loss."""
        value, self._loss_scale = differentiate(
            lambda: self._loss(batch),
            [self.delta],
            self._loss_scale,
            f"at step {self.step}",
            self.options.learning_rate,
            "no gradient reaches the residual: something on the model computes its attention without one, as "
            "SageAttention and other kernels made for inference do. Connect the model as it was before that",
        )
        return value

    def _loss(self, batch: _Batch) -> Tensor:
        queries = _TakenOnce()
        with torch.no_grad():  # F needs no gradient: its queries are constants of the loss
            plain = self._predict_noise(batch.noisy, batch.sigma, batch.prompt, foundation_patches(queries))
        placement = Placement(self.delta, self._names, self._prompt_rows[batch.prompt])
        patches = customised_patches(queries, lambda options, chunk: (placement,))
        predicted = self._predict_noise(batch.noisy, batch.sigma, batch.prompt, patches)
        return residual_loss(predicted, batch.noise, plain, batch.mask, self.options.preserve)

    def residual(self) -> Residual:
        """What has been learned so far, with the optimizer's state, so that it can be resumed."""
        state = self._optimizer.state.get(self.delta)
        scale = torch.tensor([self._loss_scale])
        kept = {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"], "loss_scale": scale} if state else None
        return Residual(
            delta=self.delta.detach().clone(),
            noun=self._noun,
            layers=self._names,
            architecture=architecture_name(self._layers),
            steps=self.step,
            seed=self.options.seed,
            training_state=kept,
        )
