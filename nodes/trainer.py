"""ProFusion_ResidualTrainer: one to five pictures of a concept into a residual."""

from __future__ import annotations

from comfy_api.latest import io

from ..profusion.pictures import captioned, from_image
from ..profusion.residual.training import TrainingOptions
from .host.display import keeping, show
from .host.drawing import Sampling
from .host.residual_training import Samples, prepare_training


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
        samples = Samples(sample_prompt, sample_every, Sampling(sample_steps, sample_cfg))
        run = prepare_training(model, clip, vae, images, masks, noun.strip(), options, resume, samples)
        with keeping(cls, run.keep):
            run.train()
        text = f"{noun.strip()}: {steps} steps\n{run.saved.path}\n{run.saved.size:,} bytes"
        plot = run.plot()
        shown = show(cls, text, captioned(plot, text), previewed=True)
        return io.NodeOutput(run.training.residual(), from_image(plot)[None], run.samples(), ui=shown)


NODES = [ResidualTrainer]
