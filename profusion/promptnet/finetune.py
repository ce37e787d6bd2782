"""Fine-tuning to one picture (ProFusion, arXiv 2305.13579, section 3.1): about 50 steps of PromptNet's own training, on
that picture or on variants of it, in which the UNet's attention layers may learn too.

The loop is `PromptNetTraining`'s. What the picture shows to PromptNet and what is to be drawn may differ (the first
may be grey around the object, or another of the variants), the loss may count the object only, and the attention layers
have a learning rate of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..diffusion import timestep_of
from ..loop import Group, TrainingError, check_whole
from ..losses import masked_weighted_noise_error
from .changes import Change
from .network import PromptNet
from .training import (
    WITHOUT_GRADIENT,
    EncodeWord,
    PictureBatch,
    PictureSet,
    PredictWithContext,
    PromptNetOptions,
    PromptNetTraining,
)


@dataclass(frozen=True)
class FinetuneOptions(PromptNetOptions):
    """How a PromptNet is fine-tuned; see `PromptNetOptions`.

    attention_learning_rate: AdamW's, of the attention layers' changes. rank: of these changes; 0 is the full
    difference. mixed: PromptNet is shown any of the pictures and another one is drawn, as the authors do it, so that S*
    is what they share; otherwise each picture is its own reference. Of one picture it makes no difference.
    """

    steps: int = 50
    batch_size: int = 4
    attention_learning_rate: float = 1e-4
    rank: int = 8
    mixed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.attention_learning_rate <= 1:
            raise ValueError(
                f"attention_learning_rate={self.attention_learning_rate} must lie in (0, 1]; 1e-5 to 1e-3 is usual"
            )
        check_whole(self, "rank")
        if self.rank < 0:
            raise ValueError(f"rank={self.rank} must not be negative: 0 is the full difference, 4 to 16 is usual")


@dataclass(frozen=True)
class FinetunePictures(PictureSet):
    """Pictures of one thing: `latents` and `image_tokens` as PromptNet sees them.

    targets: latents (N, C, H, W) of what is to be drawn, of any size; default: the same. masks: weights of their cells
    (N, H, W), 1 at the object, and only there is anything learned; default: everywhere.
    """

    targets: Tensor | None = None
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets is None:
            object.__setattr__(self, "targets", self.latents)
        if self.targets.shape[:2] != self.latents.shape[:2] or self.targets.ndim != 4:
            raise ValueError(
                f"targets {tuple(self.targets.shape)} and latents {tuple(self.latents.shape)} must be of the same "
                "pictures"
            )
        if not torch.isfinite(self.targets).all():
            raise TrainingError("a picture's latent is not finite: the VAE overflowed; run it in float32")
        if self.masks is None:
            return
        cells = len(self.targets), *self.targets.shape[-2:]
        if self.masks.shape != cells:
            raise ValueError(f"masks {tuple(self.masks.shape)} must be (N, H, W) of the targets' cells, {cells}")
        if not (self.masks.flatten(1).sum(dim=1) > 0).all():
            raise TrainingError(
                "a mask is empty, so nothing of its picture would be learned. Paint the object white, or leave masks "
                "out"
            )

    def fingerprint(self) -> str:
        """See PictureSet."""
        digest = hashlib.sha256()
        for tensor in (self.targets, self.masks):
            if tensor is not None:
                digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return f"{super().fingerprint()} {digest.hexdigest()[:16]}"


def trainable_copy(
    network: PromptNet, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> PromptNet:
    """Another PromptNet of the same values, in evaluation mode, which autograd takes even where these were loaded in
    inference mode. device: default the same."""
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            copy = PromptNet(network.config)
        copy = copy.to(dtype).to_empty(device=device or network.start.device)
        for name, value in network.state_dict().items():
            copy.state_dict()[name].copy_(value)
    return copy.eval()


class FinetuneTraining(PromptNetTraining):
    """One fine-tuning of `network`, a `trainable_copy`, and of `changes`; see `PromptNetTraining`.

    changes: of the attention layers, by layer, with which `predict_noise` must evaluate the model (see
    `changes.changed`); empty: PromptNet alone learns.
    """

    def __init__(
        self,
        network: PromptNet,
        predict_noise: PredictWithContext,
        encode_word: EncodeWord,
        pictures: FinetunePictures,
        options: FinetuneOptions,
        changes: Mapping[str, Change] | None = None,
        timesteps: Callable[[Tensor], Tensor] = timestep_of,
        sigmas: Tensor | None = None,
    ):
        self.changes = dict(changes or {})
        self._attention = {
            f"attention.{layer}.{name}": value
            for layer, change in self.changes.items()
            for name, value in change.parameters().items()
        }
        groups = [Group("PromptNet", dict(network.named_parameters()), WITHOUT_GRADIENT)]
        if self._attention:
            factor = options.attention_learning_rate / options.learning_rate
            groups.append(Group("the attention layers", self._attention, WITHOUT_GRADIENT, factor))
        super().__init__(network, predict_noise, encode_word, pictures, options, timesteps, sigmas, groups)

    def draw(self, generator: torch.Generator, pictures: int | None = None) -> PictureBatch:
        """See PromptNetTraining. Which pictures are shown is drawn last: nothing else depends on whether it is."""
        batch = super().draw(generator, pictures)
        count = len(self.pictures) if pictures is None else pictures
        if not self.options.mixed or count == 1:
            return batch
        return replace(batch, shown=torch.randint(count, batch.rows.shape, generator=generator))

    def _targets(self, pictures: FinetunePictures) -> Tensor:
        """See PromptNetTraining."""
        return pictures.targets

    def _error(self, predicted: Tensor, pictures: FinetunePictures, batch: PictureBatch, weight: Tensor) -> Tensor:
        """Inside the masks, where there are any."""
        mask = (
            torch.ones_like(predicted[:, 0]) if pictures.masks is None else pictures.masks[batch.rows].to(self._device)
        )
        return masked_weighted_noise_error(predicted, batch.noise, weight, mask)

    def _later(self) -> dict[str, object]:
        """See PromptNetTraining."""
        return {"mixed": False}

    def state(self) -> dict[str, Tensor]:
        """See PromptNetTraining; the changes are part of it."""
        return super().state() | {name: value.detach().cpu() for name, value in self._attention.items()}

    def go_on(self, network: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """See PromptNetTraining. Raises TrainingError, before anything is altered, for changes of other layers."""
        kept = {name: value.shape for name, value in state.items() if name.startswith("attention.")}
        if kept != {name: value.shape for name, value in self._attention.items()}:
            raise TrainingError(
                "the checkpoint's training changed other attention layers, or with another rank. Give what it was "
                "trained with, or begin anew in another file"
            )
        super().go_on(network, state)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See PromptNetTraining; the changes are restored too."""
        super().restore(state)
        with torch.inference_mode(False), torch.no_grad():
            for name, value in self._attention.items():
                value.copy_(state[name])
