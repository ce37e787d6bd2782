"""ProFusion_PromptNetFinetune: PromptNet, and the model's attention layers, a little further towards one picture."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..profusion.pictures import captioned, concept_pictures, from_image
from ..profusion.promptnet.finetune import FinetuneOptions
from .host.display import keeping, show
from .host.encoding import check_connected
from .host.files import PATCHES, listed_name
from .host.finetuning import Finetuning, FinetuningRun


class PromptNetFinetune(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_PromptNetFinetune",
            display_name="PromptNet Finetune",
            category="ProFusion",
            description=(
                "Fine-tunes a PromptNet to one picture, or to variants of it from Concept Augment, and with it the attention "
                "layers of the model (ProFusion, arXiv 2305.13579). The PromptNet and the model that come in stay as they "
                "are: the model's changes are a patch file, as LoRA loaders read them, in models/loras."
            ),
            inputs=[
                io.Custom("PROMPTNET").Input("promptnet", tooltip="From PromptNet Loader."),
                io.Model.Input(
                    "model", tooltip="The model that the PromptNet serves. LoRAs and other patches on it take part."
                ),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.ClipVision.Input("clip_vision", tooltip="The image encoder that the PromptNet was trained with."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input("images", tooltip="The picture, or variants of it, of one size."),
                io.Int.Input(
                    "steps", default=50, min=1, max=100_000, tooltip="How long to train: about 50 in the paper."
                ),
                io.Float.Input(
                    "learning_rate",
                    default=2e-5,
                    min=1e-7,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="How far each step moves PromptNet: 1e-5 to 1e-4 is usual.",
                ),
                io.Boolean.Input(
                    "train_attention",
                    default=True,
                    tooltip="Train the attention layers of the model too, as in the paper. Off: only PromptNet.",
                ),
                io.Float.Input(
                    "attention_learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="How far each step moves the attention layers: 1e-4 to 1e-3 with a rank, 1e-5 without.",
                ),
                io.Int.Input(
                    "rank",
                    default=8,
                    min=0,
                    max=256,
                    tooltip="Of the attention layers' changes. More can learn more, and makes a larger file. 0: the full "
                    "difference, as in the paper, in a file as large as these layers.",
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
                    tooltip="Of the training's noise. The same seed trains the same.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="profusion/finetuned",
                    tooltip="Of the files, which are numbered and never overwritten; it may have subfolders.",
                ),
                io.Boolean.Input(
                    "save_promptnet",
                    default=True,
                    tooltip="Save the fine-tuned PromptNet in models/profusion_promptnets, for PromptNet Loader. For SD 1.5 it "
                    "takes 0.7 GB.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White where the object is, one for each picture or one for all. Only there is anything learned.",
                ),
            ],
            outputs=[
                io.Custom("PROMPTNET").Output(tooltip="The fine-tuned one, for PromptNet Encode."),
                io.Model.Output(tooltip="The model with its changes as an ordinary patch."),
                io.String.Output(
                    display_name="patch_file",
                    tooltip="The patch file's name, as LoRA loaders list it; empty if there is none.",
                ),
                io.Image.Output(display_name="loss_plot", tooltip="The loss of each step, and its running mean."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        promptnet,
        model,
        clip,
        clip_vision,
        vae,
        images,
        steps,
        learning_rate,
        train_attention,
        attention_learning_rate,
        rank,
        batch_size,
        seed,
        filename_prefix,
        save_promptnet,
        masks=None,
    ) -> io.NodeOutput:
        check_connected(clip=clip, clip_vision=clip_vision, vae=vae)
        options = FinetuneOptions(
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            attention_learning_rate=attention_learning_rate,
            rank=rank,
        )
        pictures, weights = concept_pictures(images, masks, vae.spacial_compression_encode())
        weights = weights if torch.any(weights < 1) else None
        finetuning = Finetuning(promptnet, model, clip, clip_vision, vae, pictures, weights, train_attention, options)
        run = FinetuningRun(finetuning, filename_prefix, save_promptnet)
        with keeping(cls, run.keep):
            saved = run.train()
        name = listed_name(PATCHES, run.patch_path) if run.patch_path else ""
        plot, text = run.plot(), f"{steps} steps\n{saved}"
        shown = show(cls, text, captioned(plot, text), previewed=True)
        return io.NodeOutput(finetuning.promptnet(), finetuning.patched_model(), name, from_image(plot)[None], ui=shown)


NODES = [PromptNetFinetune]
