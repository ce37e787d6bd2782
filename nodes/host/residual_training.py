"""One training of a residual in the host: what is trained, what is shown of it, and its file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...profusion.devices import smoothly_resized
from ...profusion.infusion import CONCEPTS_KEY
from ...profusion.keeping import Partial, digest
from ...profusion.loop import pauses
from ...profusion.pictures import loss_plot, masked, stacked, tiled, to_image
from ...profusion.prompt import NounError
from ...profusion.references import Fitted, concept_pictures
from ...profusion.residual import Origin, Residual, ResidualError, SavedResidual, save_residual
from ...profusion.residual.noising import ADDED, FLOW
from ...profusion.residual.training import NOUN_PROMPTS, Reference, ResidualTraining, TrainingOptions
from .budget import plan_training
from .display import Progress
from .drawing import Sampling, draw, draw_seeds, empty_latents, stop_if_cancelled
from .encoding import check_connected, encode_references
from .evaluation import TrainedModel, is_flow
from .families import acting_on, native_size
from .files import RESIDUALS, check_writable, save_residual_numbered, with_noun
from .identity import BaseFile, origin_on
from .placing import ConceptInput, encode_prompt, encode_training_prompts, place_concepts
from .streams import add_streams

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "training"

PREVIEW_EVERY = 10
OWN, OWN_STEPS = 2, 15  # pictures that the model draws to compare the user's with, and their sampling steps

_unsaved: dict[str, Residual] = {}
"""The last training that no file could be written of, by `_identity`: queued again, it goes on from there."""


class SamplePictures:
    """Draws a prompt with what has been learned so far, always from the same noise.

    size: (C, H, W) of the latents. `plain` is the picture without the concept, once one has been drawn.
    """

    def __init__(
        self,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        text: str,
        size: Sequence[int],
        seed: int,
        sampling: Sampling,
    ):
        self._clip, self._vae, self._text = clip, vae, text
        self._model, self._acting = model, acting_on(model)
        self._positive, self._negative = encode_prompt(clip, text, ()), encode_prompt(clip, "", ())
        self._size, self._seed, self._sampling = tuple(size), seed, sampling
        self.plain: Tensor | None = None

    def place(self, residual: Residual) -> list:
        """The prompt's CONDITIONING with the concept. Raises NounError where the prompt lacks its noun."""
        placed = place_concepts(
            self._clip, self._text, self._acting.layers, [ConceptInput("", residual, 1.0, "auto")], 0.0, 1.0
        )
        return [[context, {**extras, CONCEPTS_KEY: tuple(placed)}] for context, extras in self._positive]

    def draw(self, residual: Residual) -> Tensor:
        """One picture (1, H, W, 3)."""
        latent, foundations = empty_latents(self._model, {"samples": torch.zeros(1, *self._size)}), []
        model = add_streams(
            self._model, self._acting.layers, False, foundations.append, attending=self._acting.attending
        )
        samples = draw(model, self.place(residual), self._negative, latent, self._seed, self._sampling)
        if self.plain is None:
            self.plain = self._decode(self._model.model.process_latent_out(foundations[0].float()))
        return self._decode(samples)

    def own(self, noun: str, tell: Callable[[int], None]) -> Tensor:
        """Latents (OWN, C, H, W), as the model takes them, of pictures that it draws of a noun by itself."""
        positive = encode_prompt(self._clip, NOUN_PROMPTS[0].format(noun), ())
        sampling = replace(self._sampling, steps=OWN_STEPS)
        drawn = draw_seeds(self._model, positive, self._negative, self._size, self._seed, OWN, sampling, tell)
        return drawn[:, :, 0] if drawn.ndim == 5 else drawn

    def _decode(self, latents: Tensor) -> Tensor:
        return self._vae.decode(latents).float().cpu().flatten(0, -4)


class TrainingRun:
    """One training: the training, what is shown of it, and its file."""

    def __init__(
        self,
        training: ResidualTraining,
        model: TrainedModel,
        samples: SamplePictures,
        sample_every: int,
        identity: str,
        fitted: Fitted,
        warn: Callable[[str], None],
        remark: Callable[[str], None],
        origin: Origin,
        base: BaseFile,
    ):
        """fitted: the pictures, their masks, and what was done to them. warn: told where what has been learned so far
        cannot be written while it runs. remark: told what is to be known of the pictures. origin, base: what is trained
        on."""
        self.about, self._origin, self._base, self._fitted = fitted.note, origin, base, fitted
        self._remark = remark
        self.training, self._model, self._samples, self._identity = training, model, samples, identity
        self._sample_every, self.first_step = sample_every, training.step
        self.pictures: list[Tensor] = []  # the newest first
        self.saved: SavedResidual | None = None
        self._progress = Progress(training.options.steps)
        self._partial = Partial(self._save_partial, warn=warn)

    def residual(self) -> Residual:
        """What has been learned so far."""
        origin = replace(self._origin, base_hash=self._base.hash_so_far())
        return replace(self.training.residual(), origin=origin)

    def _save_partial(self) -> Path:
        """Write what has been learned so far where there is room.

        In the middle of a step's bookkeeping, which counts the versions of tensors: those of inference have none.
        """
        with torch.inference_mode(False), torch.no_grad():
            return _save(self.residual(), f"partial_{self.training.step}_steps", everywhere=True).path

    def check(self) -> None:
        """Find out before the training, not after it, what would make it worthless."""
        residual = self.training.residual()
        try:
            self._samples.place(residual)
        except NounError as error:
            raise NounError(f"sample_prompt: {error}") from error
        learned = sum(tensor.nbytes for tensor in residual.numbers())
        size = 4 * learned  # with the optimizer's two tensors, and the names
        check_writable(RESIDUALS, with_noun(f"{FOLDER}/%noun%", residual.noun), size, ResidualError)

    def train(self) -> None:
        """Train to the end, drawing a sample at every `sample_every`th step (0: none) and the last.

        What has been learned is on the disk every so many seconds, and before each sample.
        """
        options = self.training.options
        shape = options.batch_size, *self.training.latent_size
        if options.automatic and self.training.step < options.steps:
            self.training.own = self._samples.own(self.training.noun, stop_if_cancelled)
        for stop in pauses(self.training.step, options.steps, self._sample_every):
            self._model.run(lambda stop=stop: self._train_until(stop), shape)
            ended = self.training.why_ended()
            if stop == options.steps or ended:
                self._finish(f"{self.training.step}_steps")
            else:
                self._partial.at_a_pause()
            self.pictures.insert(0, self._samples.draw(self.training.residual()))
            self._progress.report(options.steps if ended else stop, self._preview())
            if ended:
                self._remark(ended)
                break
        _unsaved.pop(self._identity, None)

    def _finish(self, name: str) -> None:
        """Save what has been learned, with the hash of the model's file unless that takes long or Cancel is pressed."""
        try:
            self._base.wait()
        finally:
            self.saved = _save(self.residual(), name)
            self._partial.discard()

    def _train_until(self, stop: int) -> None:
        for _ in self.training.steps(self._partial):
            done = self.training.step
            if done == self.first_step + 1:
                for remark in self.training.remarks():
                    self._remark(remark)
            worth_showing = done % PREVIEW_EVERY == 0 or done in (self.first_step + 1, stop)
            self._progress.report(done, self._preview() if worth_showing else None)
            if done == stop:
                return

    def _preview(self) -> Image.Image:
        """The newest sample above the plot so far; before there is one, what is learned of the pictures."""
        sample = [to_image(picture[0]) for picture in self.pictures[:1]]
        return stacked([*(sample or self._found()), self.plot()])

    def _found(self) -> list[Image.Image]:
        """The pictures, pale where nothing is learned of them, if that was found and not given."""
        training = self.training
        return [tiled(list(masked(self._fitted.pictures.cpu(), training.masks.cpu())))] if training.found_masks else []

    def shown(self) -> Image.Image:
        """What is left under the node: the plot, below what was learned of the pictures where that was found."""
        return stacked([*self._found(), self.plot()])

    def plot(self) -> Image.Image:
        options = self.training.options
        return loss_plot(self.training.losses, options.steps, start=self.first_step, title=options.loss_title)

    def masks(self) -> Tensor:
        """What counted of each picture (M, H, W), in [0, 1]."""
        given = self._fitted.masks.float().cpu()
        if not self.training.found_masks:
            return given
        return smoothly_resized(self.training.masks.float().cpu()[:, None], given.shape[1:])[:, 0].clamp(0, 1)

    def samples(self) -> Tensor:
        """Every sample, (B, H, W, 3), the newest first, and the plain picture."""
        return torch.cat([*self.pictures, self._samples.plain])

    def keep(self) -> str:
        """After a failure: keep what has been learned, and say where."""
        try:
            return self._kept()
        finally:
            self._partial.leave()

    def _kept(self) -> str:
        done = self.training.step
        if self.saved is not None:
            return f"The training is finished, and saved as {self.saved.path}"
        if done == self.first_step and self._identity not in _unsaved:
            return "Nothing had been learned yet."
        try:
            path = self._partial.save()
        except Exception as error:  # whatever it is, the work of hours must not be lost to it
            _unsaved.clear()
            _unsaved[self._identity] = self.residual()
            earlier = f" Fewer of them are saved as {self._partial.path}." if self._partial.path else ""
            return (
                f"The {done} steps so far could not be saved: {error} They are in memory until ComfyUI is closed "
                "or another training cannot be saved: queue the same inputs again to go on from there."
                f"{earlier}"
            )
        return f"The {done} steps so far are saved as {path}; load it into resume to go on from there."


def _save(residual: Residual, name: str, everywhere: bool = False) -> SavedResidual:
    """Write a residual that can be resumed, as models/profusion_residuals/training/<noun>_<name>_<number>_."""
    return save_residual_numbered(
        f"{FOLDER}/%noun%_{name}",
        residual.noun,
        lambda path: save_residual(residual, path, "float32", overwrite=False),
        everywhere,
    )


def _identity(
    model: ModelPatcher,
    conditionings: Sequence[list],
    references: Sequence[Reference],
    noun: str,
    options: TrainingOptions,
    resume: Residual | None,
) -> str:
    """What must be the same for one training to go on as another."""
    evaluated = id(model.model), str(model.patches_uuid)
    contexts = [context for entries in conditionings for context, _ in entries]
    learned = [(reference.latent, reference.mask) for reference in references]
    begun = None if resume is None else (resume.steps, *resume.numbers())
    return digest(evaluated, contexts, learned, noun, options, begun)


@dataclass(frozen=True)
class Samples:
    """The sample pictures that a training draws: their prompt, with %noun% for the noun, every so many steps."""

    prompt: str
    every: int
    sampling: Sampling


def prepare_training(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    images: Tensor | Sequence[Tensor],
    masks: Tensor | Sequence[Tensor] | None,
    noun: str,
    options: TrainingOptions,
    resume: Residual | None,
    samples: Samples,
    checkpointing: str,
    warn: Callable[[str], None],
    remark: Callable[[str], None],
    base: BaseFile,
) -> TrainingRun:
    """Check the inputs and encode them, once. Errors name the input.

    checkpointing: see `plan_training`. warn: see `TrainingRun`. remark: told what takes no part. base: the
    model's file.
    """
    acting = acting_on(model)
    layers, patch = acting.layers, acting.attending.patch
    check_connected(clip=clip, vae=vae)
    fitted = concept_pictures(images, masks, vae.spacial_compression_encode(), native_size(model))
    pictures, weights, _ = fitted
    conditionings, rows = encode_training_prompts(clip, noun, layers)
    references = encode_references(model, vae, pictures, weights, patch)
    identity = _identity(model, conditionings, references, noun, options, resume)
    shape = options.batch_size, *references[0].latent.shape
    budget = plan_training(model, shape, checkpointing, capacity=options.capacity)
    trained = TrainedModel(
        model,
        conditionings,
        memory=budget.step,
        checkpointing=budget.checkpointing,
        warn=remark,
        flow=True,
        blocks_of=acting.blocks_of,
    )
    flipped = encode_references(model, vae, pictures.flip(2), weights.flip(2), patch) if options.flip else ()
    if resume is not None and resume.steps >= options.steps:
        raise ResidualError(
            f"the residual to resume has {resume.steps} steps already, and steps={options.steps} counts from the "
            "first: raise steps to train it further"
        )
    resume = _unsaved.get(identity, resume)
    training = ResidualTraining(
        trained.predict_noise,
        references,
        rows,
        layers,
        noun,
        options,
        flipped,
        resume,
        trained.sigmas,
        budget.queries,
        acting.attending,
        FLOW if is_flow(model) else ADDED,
    )
    text = samples.prompt.replace("%noun%", noun)
    drawn = SamplePictures(model, clip, vae, text, training.latent_size, options.seed, samples.sampling)
    origin = origin_on(model, base, options.learning_rate)
    run = TrainingRun(training, trained, drawn, samples.every, identity, fitted, warn, remark, origin, base)
    run.check()
    return run
