"""Fine-tuning in the host: PromptNet through the host's text encoder and model, and the model's attention layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import comfy.sd
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor, nn

from ...profusion.infusion import architecture_name, check_context_width
from ...profusion.keeping import Partial, digest
from ...profusion.pictures import loss_plot
from ...profusion.promptnet.changes import attention_layers, changed, patch_tensors, save_patch, start_changes
from ...profusion.promptnet.file import save_promptnet
from ...profusion.promptnet.finetune import FinetuneOptions, FinetunePictures, FinetuneTraining, trainable_copy
from ...profusion.promptnet.network import PromptNetError, check_fits
from ...profusion.promptnet.unfinished import Unfinished
from ...profusion.references import Shown, together
from .budget import ADAMW_BYTES, make_room, plan_training
from .display import Progress
from .encoding import encode_references
from .evaluation import TrainedModel, differentiable, resident_clip
from .families import native_size, promptnet_layers
from .files import PATCHES, PROMPTNETS, check_writable, folders, save_numbered
from .identity import model_digest
from .words import LoadedPromptNet, WordEncoder, encode_pictures, handed_to_the_host

PREVIEW_EVERY = 10


class Finetuning:
    """One fine-tuning in the host. It alters nothing that came in: PromptNet is a copy, and changes lie beside."""

    def __init__(
        self,
        promptnet: LoadedPromptNet,
        model: ModelPatcher,
        clip: CLIP,
        clip_vision: ClipVisionModel,
        vae: VAE,
        given: Sequence[Shown],
        only_object: bool,
        train_attention: bool,
        options: FinetuneOptions,
        checkpointing: str = "auto",
        warn: Callable[[str], None] | None = None,
    ):
        """given: the pictures, of any sizes. only_object: nothing is learned around their objects. checkpointing: see
        `plan_training`. warn: told what takes no part; default the log.
        """
        layers = promptnet_layers(model)
        check_fits(promptnet.config, architecture=architecture_name(layers))
        self._model, self._promptnet = model, promptnet
        self._words = WordEncoder(resident_clip(clip), promptnet.config, options.prompts, differentiable)
        given, self.about = _pictures(promptnet, model, clip_vision, vae, given, only_object)
        device, attention = model.load_device, {}
        if train_attention:
            attention = attention_layers(dict(model.get_model_object("diffusion_model").named_parameters()))
        learned = self._bytes_to_learn(attention, options.rank)
        shape = options.batch_size, *given.targets.shape[1:]
        budget = plan_training(model, shape, checkpointing, [self._words.patcher], learned, finetuning=True)
        make_room(learned, device)
        generator = torch.Generator().manual_seed(options.seed % 2**63)
        changes = start_changes(attention, options.rank, generator, device)
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
            warn=warn,
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

    def _bytes_to_learn(self, attention: Mapping[str, tuple[int, int]], rank: int) -> int:
        """What PromptNet and changes of these layers take while they are trained; nothing is made of them yet."""
        changes = start_changes(attention, rank, torch.Generator(), "meta").values()
        learned = [
            *self._promptnet.network.parameters(),
            *(item for one in changes for item in one.parameters().values()),
        ]
        return ADAMW_BYTES * sum(item.numel() for item in learned)

    def _predict_noise(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        return self._trained.predict_noise_with(x, sigma, self._words.prompt, context)

    def run(
        self,
        after_step: Callable[[], None],
        partial: Partial | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Train to the end, or until `after_step` raises. before: is called first, once the model can be evaluated."""
        shape = self.training.options.batch_size, *self.training.pictures.targets.shape[1:]

        def train() -> None:
            before()
            for _ in self.training.steps(partial):
                after_step()

        self.evaluating(train, shape)

    def identity(self) -> str:
        """What must be the same for one fine-tuning to go on as another, also after a restart."""
        return digest(self.training.identity, model_digest(self._model), model_digest(self._words.patcher))

    def evaluating(self, work: Callable[[], None], shape: Sequence[int]) -> None:
        """Do `work()` with the model loaded and computing with the changes, for latents (B, C, H, W) of this shape."""

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
    given: Sequence[Shown],
    only_object: bool,
) -> tuple[FinetunePictures, str]:
    """The pictures as PromptNet sees them (grey outside the masks) and as they are to be drawn, and both in words."""
    seen = encode_pictures(promptnet.config, vae, clip_vision, given, only_object)
    drawn = together(given, vae.spacial_compression_encode(), native_size(model))
    references = encode_references(model, vae, drawn.pictures, drawn.masks)
    with torch.inference_mode(False):
        targets = torch.stack([reference.latent for reference in references])
        weights = torch.stack([reference.mask for reference in references]) if only_object else None
        latents, tokens = (tensor.float().to(targets.device, copy=True) for tensor in (seen.latents, seen.image_tokens))
        return FinetunePictures(latents, tokens, targets, weights), f"{drawn.note}\nPromptNet sees {seen.note}"


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
    """One fine-tuning: the training, what is shown of it, and its files.

    While it runs, PROMPTNETS has training/finetune_<digits>.safetensors, from which the same inputs go on.
    """

    def __init__(self, finetuning: Finetuning, prefix: str, keep_promptnet: bool, warn: Callable[[str], None]):
        """warn: told where the training so far cannot be written while it runs."""
        self.finetuning, self._prefix, self._keep_promptnet = finetuning, prefix, keep_promptnet
        self._progress = Progress(finetuning.training.options.steps)
        self.patch_path: Path | None = None
        self._saved: dict[str, str] = {}  # by folder, what to say of it
        for folder in self._folders():
            check_writable(folder, prefix, 1, PromptNetError)
        self._unfinished = Unfinished(finetuning.training, "finetune", finetuning.identity(), folders(PROMPTNETS), warn)

    def _folders(self) -> list[str]:
        wanted = ((PATCHES, self.finetuning.training.changes), (PROMPTNETS, self._keep_promptnet))
        return [folder for folder, is_wanted in wanted if is_wanted]

    def train(self) -> str:
        """Train, save, and say what was saved."""
        self.finetuning.run(self._after_step, self._unfinished.partial, self._unfinished.go_on)
        problems = self._save(self._prefix)
        if problems:
            raise PromptNetError(" ".join(problems))
        self._unfinished.finished()
        return self._unfinished.said + ("\n".join(self._saved.values()) or "Nothing is saved.")

    def _after_step(self) -> None:
        training = self.finetuning.training
        worth_showing = training.step % PREVIEW_EVERY == 0 or training.step in (1, training.options.steps)
        self._progress.report(training.step, self.plot() if worth_showing else None)

    def plot(self):
        return loss_plot(self.finetuning.training.losses, self.finetuning.training.options.steps)

    def _save(self, prefix: str, everywhere: bool = False) -> list[str]:
        """Write what is not written yet, each file whatever becomes of the others. Returns what went wrong."""
        problems = []
        for folder in self._folders():
            if folder in self._saved:
                continue
            try:
                path, size = save_numbered(
                    folder, prefix, lambda path, kind=folder: self._write(kind, path), everywhere
                )
            except Exception as problem:  # whatever it is, such as no memory: the other file may still be saved
                problems.append(str(problem) or type(problem).__name__)
                continue
            if folder == PATCHES:
                self.patch_path = path
            self._saved[folder] = f"{path}\n{size:,} bytes"
        return problems

    def _write(self, folder: str, path: Path) -> tuple[Path, int]:
        training = self.finetuning.training
        notes = {
            "steps": str(training.step),
            "seed": str(training.options.seed),
            "rank": str(training.options.rank),
        }
        if folder == PATCHES:
            return path, save_patch(self.finetuning.patch(), path, notes, False)
        return path, save_promptnet(training.network, path, "float16", notes, None, False)

    def keep(self) -> str:
        """After a failure: keep what has been learned, try everything, and say what is where."""
        try:
            return self._kept()
        finally:
            self._unfinished.partial.leave()  # to the next run, perhaps of another server

    def _kept(self) -> str:
        training = self.finetuning.training
        done, last = training.step, training.options.steps
        if not done:
            return "Nothing had been learned yet."
        prefix = self._prefix if done == last else f"{self._prefix}_partial_{done}_steps"
        before = list(self._saved.values())
        problems = self._save(prefix, everywhere=True)
        if problems:
            kept = "".join(f"\nSaved before: {text}" for text in self._saved.values())
            said = f"The {done} steps so far could not all be saved: {' '.join(problems)}{kept}"
        else:
            saved = "\n".join([*before, *(text for text in self._saved.values() if text not in before)])
            said = f"What the {done} steps so far have learned:\n{saved or 'No file was asked for.'}"
        if done == last and not problems:
            self._unfinished.finished()
            return said
        return f"{said}\n{self._unfinished.keep()}"
