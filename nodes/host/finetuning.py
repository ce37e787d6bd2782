"""Fine-tuning in the host: PromptNet through the host's text encoder and model, and the model's attention layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import comfy.sd
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor, nn

from ...profusion.files import write_numbered
from ...profusion.infusion import architecture_name, check_context_width
from ...profusion.keeping import Partial, digest, seconds_to_write
from ...profusion.loop import TrainingError
from ...profusion.patched import SavableWeights, names_on
from ...profusion.pictures import loss_plot
from ...profusion.problems import known
from ...profusion.promptnet.changes import attention_layers, changed, patch_tensors, save_patch, start_changes
from ...profusion.promptnet.file import SUFFIX, save_promptnet
from ...profusion.promptnet.finetune import FinetuneOptions, FinetunePictures, FinetuneTraining, trainable_copy
from ...profusion.promptnet.network import PromptNetConfig, PromptNetError, check_fits
from ...profusion.references import Shown, together
from .budget import make_room, plan_training
from .display import Progress
from .encoding import encode_references, model_layers, native_size
from .evaluation import TrainedModel, differentiable, resident_clip
from .files import PATCHES, PROMPTNETS, check_writable, folders, save_in_one, save_numbered
from .identity import model_digest
from .words import (
    LoadedPromptNet,
    encode_loaded,
    encode_pictures,
    handed_to_the_host,
    text_widths,
    tokens_with_words,
)

MOST_SERVERS = 100  # that work on the same training at a time
TRAINING = "training"  # subfolder of PROMPTNETS
PREVIEW_EVERY = 10
ADAMW_BYTES = 16  # a trained float32 number, its gradient and the optimizer's two moments

_unsaved: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
"""The last fine-tuning of which no file could be written: PromptNet and state by its identity, to go on from."""


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

        The host's CLIP adds to its hidden state in place, also after a norm has kept it for the way back: norms get
        copies.
        """
        encoder = self._clip.cond_stage_model
        patched = SavableWeights() if names_on(self.patcher) else nullcontext()
        with differentiable(encoder), patched, ExitStack() as hooks:
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
                if known(problem) is not None:
                    raise  # no memory, and nothing about gradients
                raise PromptNetError(f"{self._name()}: {problem}") from problem
        parts = gradient.split(list(self._config.text_widths), dim=-1)
        if not all(part.isfinite().all() and part.any() for part in parts):
            raise PromptNetError(f"{self._name()}: the gradient is zero or not finite")

    def _name(self) -> str:
        return (
            f"PromptNet cannot be fine-tuned through the text encoder {type(self._clip.cond_stage_model).__name__}, "
            "because no gradient goes back through it to the pseudo-word. Load the CLIP of the checkpoint, unquantised "
            "and uncompiled"
        )


def _copied(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0].clone(), *inputs[1:]


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
        layers = model_layers(model)
        check_fits(promptnet.config, architecture=architecture_name(layers))
        self._model, self._promptnet = model, promptnet
        self._words = WordEncoder(clip, promptnet.config, options.prompts)
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
        self._identity = finetuning.identity()
        groups = finetuning.training.groups
        numbers = sum(value.numel() for group in groups for value in group.parameters.values())
        size = 3 * 4 * numbers  # each in float32, and AdamW's two moments of it
        self._partial = Partial(
            self._save_partial, seconds_to_write(folders(PROMPTNETS)[0] / TRAINING / "x", size), warn
        )
        self._begun = ""  # what to say of an earlier run's file

    def _folders(self) -> list[str]:
        wanted = ((PATCHES, self.finetuning.training.changes), (PROMPTNETS, self._keep_promptnet))
        return [folder for folder, is_wanted in wanted if is_wanted]

    def train(self) -> str:
        """Train, save, and say what was saved."""
        self.finetuning.run(self._after_step, self._partial, self._go_on)
        problems = self._save(self._prefix)
        if problems:
            raise PromptNetError(" ".join(problems))
        self._partial.discard()
        _unsaved.pop(self._identity, None)
        return self._begun + ("\n".join(self._saved.values()) or "Nothing is saved.")

    def _after_step(self) -> None:
        training = self.finetuning.training
        worth_showing = training.step % PREVIEW_EVERY == 0 or training.step in (1, training.options.steps)
        self._progress.report(training.step, self.plot() if worth_showing else None)

    def plot(self):
        return loss_plot(self.finetuning.training.losses, self.finetuning.training.options.steps)

    # What an earlier run of the same inputs left

    def _go_on(self) -> None:
        """Go on from what could not be saved, or else from the file of an unfinished training, if there is one.

        What is not of this training is left alone, and said.
        """
        training = self.finetuning.training
        while True:
            path = self._taken()
            try:
                if self._identity in _unsaved:
                    network, state = _unsaved[self._identity]
                    training.check_state(state)
                    training.go_on(network, state)
                    where = "memory"
                elif path is not None:
                    training.resume(path, same_start=True)
                    where = str(path)
                else:
                    return
            except (PromptNetError, TrainingError) as problem:
                self._begun += f"Begun anew. {problem}\n"
                self._identity = digest(self._identity, "anew")  # what was found keeps its name, and its file
                self._partial.leave()
                continue
            self._begun += f"Gone on from step {training.step}, from {where}\n"
            return

    def _taken(self) -> Path | None:
        """The newest file of an unfinished training of the same inputs, which no other server works on."""
        paths = [path for folder in folders(PROMPTNETS) for path in self._names(folder) if path.is_file()]
        newest_first = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
        for path in newest_first:
            if self._partial.take(path):
                return path
            self._begun += f"Another server works on the same training, and keeps it in {path}\n"
        return None

    def _names(self, folder: Path) -> Iterator[Path]:
        """What the file may be called: other servers may work on the same training."""
        yield folder / TRAINING / f"finetune_{self._identity}{SUFFIX}"
        for number in range(2, MOST_SERVERS):
            yield folder / TRAINING / f"finetune_{self._identity}_{number}{SUFFIX}"

    def _save_partial(self) -> Path:
        """Write the training so far where there is room."""
        return save_in_one(folders(PROMPTNETS), self._save_partial_in, PromptNetError)

    def _save_partial_in(self, folder: Path) -> Path:
        training, own = self.finetuning.training, self._partial.path
        if own is not None and own.is_relative_to(folder):
            training.save(own)
            return own

        def save(path: Path) -> Path:
            training.save(path, overwrite=False)
            return path

        return write_numbered(self._names(folder), save)

    # What comes out

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
            self._partial.leave()  # to the next run, perhaps of another server

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
            self._partial.discard()
            return said
        return f"{said}\n{self._keep_partial(done)}"

    def _keep_partial(self, done: int) -> str:
        """Keep what the training can go on from, in a file or else in memory, and say so."""
        try:
            path = self._partial.save()
        except Exception as problem:  # whatever it is, the work of hours must not be lost to it
            training = self.finetuning.training
            network = {name: value.detach().cpu() for name, value in training.network.state_dict().items()}
            _unsaved.clear()
            _unsaved[self._identity] = network, {name: value.cpu() for name, value in training.state().items()}
            return (
                "They are in memory until ComfyUI is closed or another training cannot be saved: queue the same inputs "
                f"again to go on from there, or to save them. No file to go on from could be written: {problem}"
            )
        return (
            f"Queue the same inputs again to go on from step {done}, or delete\n{path}\n{path.stat().st_size:,} bytes"
        )
