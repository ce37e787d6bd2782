"""ProFusion_ResidualTrainer: one to five pictures of a concept into a residual."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..profusion.infusion import Layer
from ..profusion.pictures import concept_pictures, from_image, loss_plot, stacked, to_image
from ..profusion.prompt import NounError
from ..profusion.residual import Residual, ResidualError, SavedResidual, save_residual
from ..profusion.training import ResidualTraining, TrainingOptions
from .folders import next_residual_path
from .host import model_layers
from .host_training import Progress, SamplePictures, TrainedModel, encode_prompts, encode_references, keeping
from .messages import show

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "training"
PREVIEW_EVERY = 10

_unsaved: dict[str, Residual] = {}
"""The last training that no file could be written of, by `_identity`: queued again, it goes on from there."""


class _Run:
    """One execution of the node: the training, what is shown of it, and its file."""

    def __init__(self, training: ResidualTraining, model: TrainedModel, samples: SamplePictures, identity: str):
        self.training, self._model, self._samples, self._identity = training, model, samples, identity
        self.first_step = training.step
        self.pictures: list[Tensor] = []  # the newest first
        self.saved: SavedResidual | None = None
        self._progress = Progress(training.options.steps)

    def check(self) -> None:
        """Find out before the training, not after it, what would make it worthless."""
        residual = self.training.residual()
        try:
            self._samples.place(residual)
        except NounError as error:
            raise NounError(f"sample_prompt: {error}") from None
        trial = Residual(
            torch.zeros_like(residual.delta),
            residual.noun,
            residual.layers,
            residual.architecture,
            training_state={name: torch.zeros_like(residual.delta) for name in ("exp_avg", "exp_avg_sq")},
        )
        _save(trial, "trial").path.unlink()

    def train(self, sample_every: int) -> None:
        """Train to the end, drawing a sample at every `sample_every`th step (0: none) and the last."""
        options = self.training.options
        shape = options.batch_size, *self.training.latent_size
        for stop in _stops(self.training.step, options.steps, sample_every):
            self._model.run(lambda stop=stop: self._train_until(stop), shape)
            if stop == options.steps:
                self.saved = _save(self.training.residual(), f"{stop}_steps")
            self.pictures.insert(0, self._samples.draw(self.training.residual()))
            self._progress.report(stop, self._preview())

    def _train_until(self, stop: int) -> None:
        for _ in self.training.steps():
            done = self.training.step
            worth_showing = done % PREVIEW_EVERY == 0 or done in (self.first_step + 1, stop)
            self._progress.report(done, self._preview() if worth_showing else None)
            if done == stop:
                return

    def _preview(self) -> Image.Image:
        """The newest sample above the plot so far."""
        sample = [to_image(picture[0]) for picture in self.pictures[:1]]
        return stacked([*sample, self.plot()])

    def plot(self) -> Image.Image:
        return loss_plot(self.training.losses, self.training.options.steps, start=self.first_step)

    def samples(self) -> Tensor:
        """Every sample, (B, H, W, 3), the newest first, and the plain picture."""
        return torch.cat([*self.pictures, self._samples.plain])

    def keep(self) -> str:
        """After a failure: keep what has been learned, and say where."""
        training, done = self.training, self.training.step
        if self.saved is not None:
            return f"The training is finished, and saved as {self.saved.path}"
        if done == self.first_step and self._identity not in _unsaved:
            return "Nothing had been learned yet."
        try:
            path = _save(training.residual(), f"partial_{done}_steps").path
        except (ResidualError, OSError) as error:
            _unsaved.clear()
            _unsaved[self._identity] = training.residual()
            return (
                f"The {done} steps so far could not be saved: {error} Until ComfyUI is closed they are in memory: queue the "
                "same inputs again to go on from there."
            )
        return f"The {done} steps so far are saved as {path}; load it into resume to go on from there."


def _stops(first: int, last: int, every: int) -> Iterator[int]:
    """The steps at which the training pauses for a sample: multiples of `every`, and the last."""
    if every:
        yield from range(first - first % every + every, last, every)
    yield last


def _save(residual: Residual, name: str) -> SavedResidual:
    """Write a residual that can be resumed, as models/profusion_residuals/training/<noun>_<name>_<number>_."""
    return save_residual(residual, next_residual_path(f"{FOLDER}/%noun%_{name}", residual.noun), "float32")


def _identity(model: Any, pictures: Tensor, masks: Tensor, noun: str, options: TrainingOptions) -> str:
    """What must be the same for one training to go on as another."""
    digest = hashlib.sha256(repr((id(model.model), str(model.patches_uuid), noun, options)).encode())
    for tensor in (pictures, masks):
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _prepare(
    model: Any,
    clip: Any,
    vae: Any,
    images: Tensor,
    masks: Tensor | None,
    noun: str,
    options: TrainingOptions,
    resume: Residual | None,
    sample: tuple[str, int, float],
) -> _Run:
    """Check the inputs and encode them, once."""
    layers: list[Layer] = model_layers(model)
    if vae is None:
        raise ValueError("vae is None: the checkpoint that was loaded has no VAE")
    pictures, weights = concept_pictures(images, masks, vae.spacial_compression_encode())
    identity = _identity(model, pictures, weights, noun, options)
    conditionings, rows = encode_prompts(clip, noun, layers)
    trained = TrainedModel(model, conditionings)
    references = encode_references(model, vae, pictures, weights)
    flipped = encode_references(model, vae, pictures.flip(2), weights.flip(2)) if options.flip else ()
    if resume is not None and resume.steps >= options.steps:
        raise ResidualError(
            f"the residual to resume has {resume.steps} steps already, and steps={options.steps} counts from the first: "
            "raise steps to train it further"
        )
    resume = _unsaved.get(identity, resume)
    training = ResidualTraining(
        trained.predict_noise, references, rows, layers, noun, options, flipped, resume, trained.sigmas
    )
    prompt, steps, guidance = sample
    text = prompt.replace("%noun%", noun)
    samples = SamplePictures(model, clip, vae, text, training.latent_size, options.seed, steps, guidance)
    run = _Run(training, trained, samples, identity)
    run.check()
    return run


class ResidualTrainer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_ResidualTrainer",
            display_name="Residual Trainer",
            category="ProFusion",
            description=(
                "Learns a concept from one to five pictures: one vector for each cross-attention layer, at the concept's "
                "class noun (Infusion, arXiv 2404.14007). Nothing else of the model changes. What is learned is always "
                "saved in models/profusion_residuals/training, also when you cancel."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="An SD 1.x, SD 2.x, SDXL or Toybox model. LoRAs and other patches on it take part."
                ),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input(
                    "images",
                    tooltip="One to five pictures of the concept, of one size; what is transparent is not learned.",
                ),
                io.String.Input(
                    "noun",
                    default="",
                    tooltip="The class noun: what the concept is one of, such as cat. Prompts need this word later.",
                ),
                io.Int.Input(
                    "steps",
                    default=300,
                    min=1,
                    max=100_000,
                    tooltip="How long to train, counted from the first step, also where another training is resumed. "
                    "200 to 500 is usual.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.02,
                    min=0.0001,
                    max=1.0,
                    step=0.0001,
                    round=False,
                    tooltip="How far each step goes: 0.01 to 0.03 is usual.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Noisy pictures in each step. Lower it if memory runs out.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the training's noise and of the samples. The same seed trains the same residual.",
                ),
                io.Boolean.Input(
                    "flip",
                    default=True,
                    tooltip="Train on mirrored pictures too. Turn it off for what has a left and a right, such as writing.",
                ),
                io.Float.Input(
                    "preserve",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How much what is around the concept must stay as the plain model draws it. It needs masks. "
                    "0: no matter, as in the paper. More than 1: an even calmer background, a weaker concept.",
                ),
                io.Int.Input(
                    "sample_every",
                    default=100,
                    min=0,
                    max=100_000,
                    tooltip="Draw a sample picture every so many steps; 0: only at the end.",
                ),
                io.String.Input(
                    "sample_prompt",
                    default="a photo of a %noun%",
                    tooltip="What the sample pictures show. %noun% becomes the class noun.",
                ),
                io.Int.Input(
                    "sample_steps", default=20, min=1, max=1000, tooltip="Sampling steps of the sample pictures."
                ),
                io.Float.Input(
                    "sample_cfg",
                    default=6.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance of the sample pictures: 4 for Toybox, 6 to 8 for Stable Diffusion.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White where the object is, one for each picture or one for all. Only there is anything learned.",
                ),
                io.Custom("RESIDUAL").Input(
                    "resume",
                    optional=True,
                    tooltip="A residual to train further, from Residual Loader: one that this node saved, or one saved in "
                    "float32. With the same inputs, the result is that of a training that never stopped. Or a residual of no "
                    "steps to start from, from Residual from PromptNet.",
                ),
            ],
            outputs=[
                io.Custom("RESIDUAL").Output(tooltip="The concept, for Infusion Attention Patch and Residual Saver."),
                io.Image.Output(display_name="loss_plot", tooltip="The loss of each step, and its running mean."),
                io.Image.Output(
                    display_name="samples",
                    tooltip="The sample pictures, the newest first; the last is the plain picture without the concept.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        images,
        noun,
        steps,
        learning_rate,
        batch_size,
        seed,
        flip,
        preserve,
        sample_every,
        sample_prompt,
        sample_steps,
        sample_cfg,
        masks=None,
        resume=None,
    ) -> io.NodeOutput:
        options = TrainingOptions(steps, learning_rate, batch_size, seed, flip, preserve)
        sample = sample_prompt, sample_steps, sample_cfg
        run = _prepare(model, clip, vae, images, masks, noun.strip(), options, resume, sample)
        with keeping(cls, run.keep):
            run.train(sample_every)
        _unsaved.clear()
        text = f"{noun.strip()}: {steps} steps\n{run.saved.path}\n{run.saved.size:,} bytes"
        return io.NodeOutput(run.training.residual(), from_image(run.plot())[None], run.samples(), ui=show(cls, text))


NODES = [ResidualTrainer]
