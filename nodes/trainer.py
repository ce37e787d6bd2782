"""ProFusion_ResidualTrainer: one to five pictures of a concept into a residual."""

from __future__ import annotations

from comfy_api.latest import io

from ..profusion.details import MAX_CAPACITY
from ..profusion.pictures import captioned, from_image
from ..profusion.residual.training import TrainingOptions
from . import inputs
from .host.display import Remarks, keeping, show, warn_under
from .host.drawing import Sampling
from .host.identity import BaseFile, other_bases
from .host.residual_training import Samples, prepare_training

_CHOICES = {"auto": None, "on": True, "off": False}


class ResidualTrainer(io.ComfyNode):
    SETS = ("images", "masks")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_ResidualTrainer",
            display_name="Residual Trainer",
            category="ProFusion",
            description=(
                "Learns a concept from one to five pictures: one vector for each cross-attention layer, at the "
                "concept's class noun (Infusion, arXiv 2404.14007). Nothing else of the model changes. What is learned "
                "is saved in models/profusion_residuals/training: every 30 seconds, when you cancel, after an error "
                "and at the end."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "An SD 1.x, SD 2.x, SDXL or Toybox model, or one of the transformers that the help page "
                        "lists. LoRAs and other patches on it take part."
                    ),
                ),
                inputs.clip(),
                inputs.vae(),
                io.Image.Input(
                    "images",
                    tooltip="One to five pictures of the concept: a batch or a list, of any sizes. Transparent parts "
                    "are ignored.",
                ),
                io.String.Input(
                    "noun",
                    default="",
                    tooltip="The class noun: what kind of thing the concept is, such as cat. Later prompts need this "
                    "word.",
                ),
                inputs.steps(
                    300,
                    "Training steps at most, counted from the very first one even if you resume.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.0001,
                    round=False,
                    tooltip="0: automatic, and quickest: the size of the steps and what bounds them are measured on "
                    "the model. Above 0: how far each step goes under the paper's loss; 0.01 to 0.03 is usual.",
                ),
                inputs.batch_size(),
                inputs.seed("Random seed of the training and the samples. The same seed trains the same residual."),
                io.Boolean.Input(
                    "flip",
                    default=True,
                    tooltip="Train on mirrored pictures too. Turn it off if left and right matter, as in writing.",
                ),
                io.Float.Input(
                    "preserve",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the background is held to the plain model's (needs masks, yours or found "
                    "ones). 0: not at all, as in the paper. Above 1: steadier background, weaker concept.",
                ),
                io.Int.Input(
                    "sample_every",
                    default=100,
                    min=0,
                    max=100_000,
                    tooltip="Draw a sample picture every this many steps. 0: only at the end.",
                ),
                io.String.Input(
                    "sample_prompt",
                    default="a photo of a %noun%",
                    tooltip="Prompt of the sample pictures. %noun% becomes the class noun.",
                ),
                inputs.steps(20, "Sampling steps of each sample picture.", "sample_steps", 1000),
                inputs.cfg(
                    "Guidance of the sample pictures: 4 for Toybox, 6 to 8 for Stable Diffusion.",
                    "sample_cfg",
                    rounding=None,
                ),
                inputs.masks("Only this area is learned."),
                io.Custom("RESIDUAL").Input(
                    "resume",
                    optional=True,
                    tooltip="A residual to train further, from Residual Loader: one that this node saved, or one saved "
                    "in float32. With the same inputs the result is that of one uninterrupted training. Or a starting "
                    "point from Residual from PromptNet.",
                ),
                inputs.gradient_checkpointing(),
                io.Combo.Input(
                    "stop_early",
                    options=list(_CHOICES),
                    default="auto",
                    optional=True,
                    tooltip="End before the last step once the loss falls no more. auto: if learning_rate is 0.",
                ),
                io.Combo.Input(
                    "find_object",
                    options=list(_CHOICES),
                    default="auto",
                    optional=True,
                    tooltip="Without masks: learn only what the model itself sees as the noun, not the background. "
                    "auto: if learning_rate is 0.",
                ),
                io.Int.Input(
                    "capacity",
                    default=1,
                    min=1,
                    max=MAX_CAPACITY,
                    optional=True,
                    tooltip="Vectors for each layer. 1: the paper's, the same wherever the noun is, about 10 KB for SD "
                    "1.5. 4: more alike, since parts of the object get their own, in 48 KB.",
                ),
            ],
            outputs=[
                io.Custom("RESIDUAL").Output(tooltip="The concept, for Infusion Attention Patch and Residual Saver."),
                io.Image.Output(display_name="loss_plot", tooltip="Loss of each step and its running mean."),
                io.Image.Output(
                    display_name="samples",
                    tooltip="Sample pictures, newest first. The last one is the plain picture without the concept.",
                ),
                io.Mask.Output(
                    display_name="masks", tooltip="What was learned of each picture: your masks, or those found."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
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
        gradient_checkpointing="auto",
        stop_early="auto",
        find_object="auto",
        capacity=1,
    ) -> io.NodeOutput:
        options = TrainingOptions(
            steps,
            learning_rate,
            batch_size,
            seed,
            flip,
            preserve,
            _CHOICES[stop_early],
            _CHOICES[find_object],
            capacity,
        )
        samples = Samples(sample_prompt, sample_every, Sampling(sample_steps, sample_cfg))
        noun, remarks = noun.strip(), Remarks(cls)
        if resume is not None and (others := other_bases([resume], model)):
            remarks(others[0])
        run = prepare_training(
            model,
            clip,
            vae,
            images,
            masks,
            noun,
            options,
            resume,
            samples,
            gradient_checkpointing,
            warn_under(cls),
            remarks,
            BaseFile.of_node(cls),
        )
        with keeping(cls, run.keep):
            run.train()
        text = remarks.after(
            f"{noun}: {run.training.step} steps\n{run.about}\n{run.saved.path}\n{run.saved.size:,} bytes"
        )
        shown = show(cls, text, captioned(run.shown(), text), previewed=True)
        return io.NodeOutput(run.residual(), from_image(run.plot())[None], run.samples(), run.masks(), ui=shown)


NODES = [ResidualTrainer]
