"""ProFusion_PromptNetTrainer: a PromptNet for any base model, learned from pictures alone."""

from __future__ import annotations

from comfy_api.latest import io

from ..profusion.pictures import captioned, from_image
from ..profusion.promptnet.pseudo_word import PLACEHOLDER
from ..profusion.promptnet.training import WORD_PROMPTS, PromptNetOptions
from . import inputs
from .host.display import Remarks, keeping, show, warn_under
from .host.drawing import Sampling
from .host.encoding import check_connected
from .host.files import why_not_found
from .host.picture_folders import find_folder, folder_fingerprint, folder_names, sources
from .host.pretraining import Beginning, Pretraining, PretrainingRun, WordSamples, check_prefix

PROMPTS = "\n".join(WORD_PROMPTS)


class PromptNetTrainer(io.ComfyNode):
    SETS = ("images",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_PromptNetTrainer",
            display_name="PromptNet Trainer",
            category="ProFusion",
            description=(
                "Trains a PromptNet, which turns a picture into the pseudo-word S*, for the model that is connected "
                "(ProFusion, arXiv 2305.13579): on pictures alone, without captions, from the encoder of the model's "
                "own UNet on, or going on from a PromptNet. Nothing of the model changes. It is saved in "
                "models/profusion_promptnets; a training that was stopped goes on when the same inputs are queued "
                "again."
            ),
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=folder_names(),
                    tooltip="A folder of pictures in ComfyUI's input folder, and all folders in it. Thousands are "
                    "better than hundreds. none: only the images that are connected. Press R to list new folders.",
                ),
                io.Model.Input(
                    "model",
                    tooltip="The model to train for: SD 1.x, SD 2.x, SDXL or Toybox. LoRAs and other patches on it "
                    "take part in the training; the PromptNet starts from the weights without them.",
                ),
                inputs.clip(),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The image encoder by which the PromptNet will see: ViT-L for SD 1.x, ViT-H for SD 2.x "
                    "and SDXL is usual. PromptNet Encode will need the same.",
                ),
                inputs.vae(),
                inputs.steps(
                    2000,
                    "Training steps. The paper takes 80,000 of 64 pictures; a few thousand of 4 make a beginning.",
                    largest=10_000_000,
                ),
                inputs.learning_rate(
                    2e-5, "How far each step goes: 2e-5 in the paper. A short run may take 1e-4, with warmup."
                ),
                inputs.batch_size(),
                inputs.seed("Random seed of the new PromptNet and the training. The same seed trains the same file."),
                io.String.Input(
                    "filename_prefix",
                    default="profusion/promptnet",
                    tooltip="Name of the file. A number is added, nothing is overwritten, and 'faces/mine' makes a "
                    "subfolder.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures to train on, besides those of the folder: a batch or a list, of any sizes.",
                ),
                io.Custom("PROMPTNET").Input(
                    "promptnet",
                    optional=True,
                    tooltip="A PromptNet for this model to go on from, from PromptNet Loader. Without: a new one.",
                ),
                *_advanced(),
            ],
            outputs=[
                io.Custom("PROMPTNET").Output(tooltip="The trained PromptNet, for PromptNet Encode."),
                io.String.Output(
                    display_name="promptnet_file", tooltip="Name of the file as PromptNet Loader lists it."
                ),
                io.Image.Output(display_name="loss_plot", tooltip="Loss of each step and its running mean."),
                io.Image.Output(
                    display_name="samples",
                    tooltip="Pictures drawn with S*, newest first. The last ones are those that S* was made of.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, folder=None) -> bool | str:
        return why_not_found(find_folder, _one(folder))

    @classmethod
    def fingerprint_inputs(cls, folder=None, **_) -> str:
        return folder_fingerprint(_one(folder))

    @classmethod
    def execute(
        cls,
        folder,
        model,
        clip,
        clip_vision,
        vae,
        steps,
        learning_rate,
        batch_size,
        seed,
        filename_prefix,
        images=None,
        promptnet=None,
        start_word="",
        tokens=0,
        with_noise=False,
        prompts=PROMPTS,
        warmup=0,
        cosine=False,
        weight_cap=1.0,
        level_bias=0.0,
        sample_every=500,
        sample_prompt=f"a photo of {PLACEHOLDER}",
        sample_steps=20,
        sample_cfg=6.0,
        gradient_checkpointing="auto",
    ) -> io.NodeOutput:
        check_connected(clip=clip, clip_vision=clip_vision, vae=vae)
        options = PromptNetOptions(
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            prompts=tuple(line.strip() for line in prompts.splitlines() if line.strip()),
            warmup=warmup,
            cosine=cosine,
            weight_cap=weight_cap,
            level_bias=level_bias,
        )
        samples = WordSamples(sample_prompt, sample_every, Sampling(sample_steps, sample_cfg))
        check_prefix(filename_prefix)
        remarks = Remarks(cls)
        pretraining = Pretraining(
            model,
            clip,
            clip_vision,
            vae,
            sources(folder, images),
            options,
            Beginning(tokens, with_noise, start_word.strip()),
            promptnet,
            gradient_checkpointing,
            remarks,
        )
        run = PretrainingRun(pretraining, filename_prefix, samples, warn_under(cls))
        with keeping(cls, run.keep):
            saved = run.train()
        plot, text = run.plot(), remarks.after(f"{steps} steps\n{pretraining.about}\n{saved}")
        shown = show(cls, text, captioned(plot, text), previewed=True)
        made = pretraining.promptnet(run.path.stem)
        return io.NodeOutput(made, run.name, from_image(plot)[None], run.samples(), ui=shown)


def _one(value: object) -> object:
    """A value of an input, of which a node that takes lists is given one."""
    return value[0] if isinstance(value, list) and value else value


def _advanced() -> list[io.Input]:
    """What a first training can leave as it is."""
    return [
        inputs.advanced(one)
        for one in (
            io.String.Input(
                "start_word",
                default="",
                optional=True,
                tooltip="The word that S* starts as, such as face, for pictures of one kind of thing. Empty: the mean "
                "of all words.",
            ),
            io.Int.Input(
                "tokens",
                default=0,
                min=0,
                max=32,
                optional=True,
                tooltip="Pseudo-words in S*. More hold more of a picture and yield less to the text. 0: as is usual, "
                "which is 1.",
            ),
            io.Boolean.Input(
                "with_noise",
                default=False,
                optional=True,
                tooltip="S* also looks at the latent being drawn, as the authors' does: it is then made anew at every "
                "step of Fusion KSampler.",
            ),
            io.String.Input(
                "prompts",
                multiline=True,
                default=PROMPTS,
                optional=True,
                tooltip=f"The texts to train in, one a line, each with {PLACEHOLDER} once.",
            ),
            io.Int.Input(
                "warmup",
                default=0,
                min=0,
                max=100_000,
                optional=True,
                tooltip="Steps over which the learning rate rises.",
            ),
            io.Boolean.Input(
                "cosine",
                default=False,
                optional=True,
                tooltip="Let the learning rate fall to nothing at the last step. steps can then not be raised later.",
            ),
            io.Float.Input(
                "weight_cap",
                default=1.0,
                min=1.0,
                max=1000.0,
                step=0.5,
                optional=True,
                tooltip="How much more the noisiest pictures may count. 1: all alike, as in the paper. 20 learns "
                "sooner what a thing is.",
            ),
            io.Float.Input(
                "level_bias",
                default=0.0,
                min=0.0,
                max=10.0,
                step=0.1,
                optional=True,
                tooltip="How much more often much noise is drawn. 0: all noise levels alike, as in the paper.",
            ),
            io.Int.Input(
                "sample_every",
                default=500,
                min=0,
                max=100_000,
                optional=True,
                tooltip="Draw samples every this many steps. 0: only at the end.",
            ),
            io.String.Input(
                "sample_prompt",
                default=f"a photo of {PLACEHOLDER}",
                optional=True,
                tooltip=f"Prompt of the samples, with {PLACEHOLDER} once.",
            ),
            io.Int.Input(
                "sample_steps",
                default=20,
                min=1,
                max=1000,
                optional=True,
                tooltip="Sampling steps of each sample.",
            ),
            io.Float.Input(
                "sample_cfg",
                default=6.0,
                min=0.0,
                max=100.0,
                step=0.1,
                optional=True,
                tooltip="Guidance of the samples: 4 for Toybox, 6 to 8 for Stable Diffusion.",
            ),
            inputs.gradient_checkpointing(),
        )
    ]


NODES = [PromptNetTrainer]
