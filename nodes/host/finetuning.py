"""Fine-tuning in the host: PromptNet through the host's text encoder and model, and the model's attention layers beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import comfy.sd
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor, nn

from ...profusion import files
from ...profusion.infusion import architecture_name, check_context_width
from ...profusion.pictures import loss_plot
from ...profusion.promptnet.changes import Change, attention_layers, changed, patch_tensors, save_patch, start_changes
from ...profusion.promptnet.file import save_promptnet
from ...profusion.promptnet.finetune import FinetuneOptions, FinetunePictures, FinetuneTraining, trainable_copy
from ...profusion.promptnet.network import PromptNetConfig, PromptNetError, check_fits
from .budget import Budget, plan_training
from .display import Progress
from .encoding import encode_references, model_layers, shown
from .evaluation import TrainedModel, differentiable, resident_clip
from .files import PATCHES, PROMPTNETS, next_path
from .words import (
    LoadedPromptNet,
    encode_loaded,
    encode_pictures,
    handed_to_the_host,
    text_widths,
    tokens_with_words,
)

PREVIEW_EVERY = 10
ADAMW_BYTES = 16  # a trained float32 number, its gradient and the optimizer's two moments


class WordEncoder:
    """Prompts with S*, as this CLIP encodes them, in a way that autograd goes through; only while `running`."""

    def __init__(self, clip: CLIP, config: PromptNetConfig, prompts: Sequence[str]):
        check_fits(config, text_widths=text_widths(clip, prompts[0]))
        self._clip, self._config, self._prompts = resident_clip(clip), config, prompts
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

        The host's CLIP adds to its hidden state in place, also after a norm has kept it for the way back: norms get copies.
        """
        encoder = self._clip.cond_stage_model
        with differentiable(encoder), ExitStack() as hooks:
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
                raise PromptNetError(f"{self._name()}: {problem}") from problem
        parts = gradient.split(list(self._config.text_widths), dim=-1)
        if not all(part.isfinite().all() and part.any() for part in parts):
            raise PromptNetError(f"{self._name()}: the gradient is zero or not finite")

    def _name(self) -> str:
        return (
            f"PromptNet cannot be fine-tuned through the text encoder {type(self._clip.cond_stage_model).__name__}, because "
            "no gradient goes back through it to the pseudo-word. Load the CLIP of the checkpoint, unquantised and uncompiled"
        )


def _copied(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0].clone(), *inputs[1:]


class Finetuning:
    """One fine-tuning in the host. Nothing that came in is altered: PromptNet is a copy, and the model's changes lie beside it."""

    def __init__(
        self,
        promptnet: LoadedPromptNet,
        model: ModelPatcher,
        clip: CLIP,
        clip_vision: ClipVisionModel,
        vae: VAE,
        pictures: Tensor,
        masks: Tensor | None,
        train_attention: bool,
        options: FinetuneOptions,
        checkpointing: str = "auto",
    ):
        """pictures (M, H, W, 3), masks (M, H, W), as `concept_pictures` returns them. checkpointing: see `plan_training`."""
        layers = model_layers(model)
        check_fits(promptnet.config, architecture=architecture_name(layers))
        self._model, self._promptnet = model, promptnet
        self._words = WordEncoder(clip, promptnet.config, options.prompts)
        given = _pictures(promptnet, model, clip_vision, vae, pictures, masks)
        device = model.load_device
        changes = {}
        if train_attention:
            names = dict(model.get_model_object("diffusion_model").named_parameters())
            generator = torch.Generator().manual_seed(options.seed % 2**63)
            changes = start_changes(attention_layers(names), options.rank, generator, device)
        budget = self._plan(changes, (options.batch_size, *given.targets.shape[1:]), checkpointing)
        network = trainable_copy(promptnet.network, device)
        word = _first_word(network, given)
        self._words.check(word)
        conditionings = self._words.conditionings(word)
        check_context_width(conditionings[0][0][0].shape[-1], layers)
        sampling = model.get_model_object("model_sampling")
        self._trained = TrainedModel(
            model,
            conditionings,
            [self._words.patcher],
            budget.step,
            checkpointing=budget.checkpointing,
            learning=[network],
        )
        self.training = FinetuneTraining(
            network,
            self._predict_noise,
            self._words.encode,
            given,
            options,
            changes,
            sampling.timestep,
            self._trained.sigmas,
        )

    def _plan(self, changes: Mapping[str, Change], shape: Sequence[int], checkpointing: str) -> Budget:
        learned = sum(item.numel() for item in self._promptnet.network.parameters())
        learned += sum(item.numel() for change in changes.values() for item in change.parameters().values())
        return plan_training(
            self._model, shape, checkpointing, [self._words.patcher], ADAMW_BYTES * learned, finetuning=True
        )

    def _predict_noise(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        return self._trained.predict_noise_with(x, sigma, self._words.prompt, context)

    def run(self, after_step: Callable[[], None]) -> None:
        """Train to the end, or until `after_step` raises."""
        shape = self.training.options.batch_size, *self.training.pictures.latents.shape[1:]
        self.evaluating(lambda: self._train(after_step), shape)

    def _train(self, after_step: Callable[[], None]) -> None:
        for _ in self.training.steps():
            after_step()

    def evaluating(self, work: Callable[[], None], shape: Sequence[int]) -> None:
        """Do `work()` while the model is loaded and computes with the changes, for latents (B, C, H, W) of this shape."""

        def changed_work() -> None:
            network = self._trained.model.get_model_object("diffusion_model")
            with changed(network, self.training.changes), self._words.running():
                work()

        self._trained.run(changed_work, shape)

    def promptnet(self) -> LoadedPromptNet:
        """What PromptNet has become, in the precision of the one that came in."""
        source = self._promptnet
        network = trainable_copy(self.training.network, source.patcher.offload_device, source.network.start.dtype)
        return handed_to_the_host(network.requires_grad_(False), f"{source.name} fine-tuned")

    def patch(self) -> dict[str, Tensor]:
        """The contents of the patch file; empty where the attention layers were not trained."""
        return patch_tensors(self.training.changes)

    def patched_model(self) -> ModelPatcher:
        """A clone of the model with that file's contents on it, by the host's own reader."""
        tensors = self.patch()
        return (
            comfy.sd.load_lora_for_models(self._model, None, tensors, 1.0, 0.0)[0] if tensors else self._model.clone()
        )


def _pictures(
    promptnet: LoadedPromptNet,
    model: ModelPatcher,
    clip_vision: ClipVisionModel,
    vae: VAE,
    pictures: Tensor,
    masks: Tensor | None,
) -> FinetunePictures:
    """The pictures as PromptNet sees them (grey outside the masks) and as they are to be drawn."""
    seen = encode_pictures(promptnet.config, vae, clip_vision, pictures if masks is None else shown(pictures, masks))
    everywhere = torch.ones_like(pictures[..., 0]) if masks is None else masks
    references = encode_references(model, vae, pictures, everywhere)
    with torch.inference_mode(False):
        targets = torch.stack([reference.latent for reference in references])
        weights = None if masks is None else torch.stack([reference.mask for reference in references])
        latents, tokens = (tensor.float().to(targets.device, copy=True) for tensor in (seen.latents, seen.image_tokens))
        return FinetunePictures(latents, tokens, targets, weights)


@torch.no_grad()
def _first_word(network: nn.Module, given: FinetunePictures) -> Tensor:
    """S* of the first picture before the training, (tokens, width)."""
    latent = given.latents[:1]
    timestep = torch.tensor([500], device=latent.device)
    return (
        network(latent, timestep, given.image_tokens[:1], latent if network.config.with_noise else None)[0]
        .float()
        .cpu()
    )


class FinetuningRun:
    """One fine-tuning: the training, what is shown of it, and its files."""

    def __init__(self, finetuning: Finetuning, prefix: str, keep_promptnet: bool):
        self.finetuning, self._prefix, self._keep_promptnet = finetuning, prefix, keep_promptnet
        self._progress = Progress(finetuning.training.options.steps)
        self.patch_path: Path | None = None
        self._saved: dict[str, str] = {}  # by folder, what to say of it
        for folder in self._folders():
            _check_writable(next_path(folder, prefix))

    def _folders(self) -> list[str]:
        wanted = ((PATCHES, self.finetuning.training.changes), (PROMPTNETS, self._keep_promptnet))
        return [folder for folder, is_wanted in wanted if is_wanted]

    def train(self) -> str:
        """Train, save, and say what was saved."""
        self.finetuning.run(self._after_step)
        return self._save(self._prefix)

    def _after_step(self) -> None:
        training = self.finetuning.training
        worth_showing = training.step % PREVIEW_EVERY == 0 or training.step in (1, training.options.steps)
        self._progress.report(training.step, self.plot() if worth_showing else None)

    def plot(self):
        return loss_plot(self.finetuning.training.losses, self.finetuning.training.options.steps)

    def _save(self, prefix: str) -> str:
        """Write what is not written yet, and say what there is."""
        finetuning, options = self.finetuning, self.finetuning.training.options
        notes = {"steps": str(finetuning.training.step), "seed": str(options.seed), "rank": str(options.rank)}
        for folder in self._folders():
            if folder in self._saved:
                continue
            path = next_path(folder, prefix)
            if folder == PATCHES:
                size = save_patch(finetuning.patch(), path, notes)
                self.patch_path = path
            else:
                size = save_promptnet(finetuning.training.network, path, "float16", notes)
            self._saved[folder] = f"{path}\n{size:,} bytes"
        return "\n".join(self._saved.values()) or "Nothing is saved."

    def keep(self) -> str:
        """After a failure: keep what has been learned, and say where."""
        done = self.finetuning.training.step
        if not done:
            return "Nothing had been learned yet."
        if done == self.finetuning.training.options.steps:
            prefix = self._prefix
        else:
            prefix = f"{self._prefix}_partial_{done}_steps"
        try:
            return f"What the {done} steps so far have learned:\n{self._save(prefix)}"
        except (PromptNetError, OSError) as error:
            kept = "".join(f"\nSaved before: {text}" for text in self._saved.values())
            return f"The {done} steps so far could not all be saved: {error}{kept}"


def _check_writable(path: Path) -> None:
    """Find out before the training, not after it. Raises PromptNetError."""
    try:
        files.write_atomically(path, b"")
        path.unlink()
    except OSError as problem:
        raise PromptNetError(f"'{path}' could not be saved: {files.why_not_written(problem)}") from problem
