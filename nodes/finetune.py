"""ProFusion_PromptNetFinetune: PromptNet, and the model's attention layers, a little further towards one picture."""

from __future__ import annotations

from comfy_api.latest import io

from ..profusion.pictures import captioned, from_image
from ..profusion.promptnet.finetune import FinetuneOptions
from ..profusion.references import gather
from . import inputs
from .host.display import Remarks, keeping, show, warn_under
from .host.encoding import check_connected
from .host.files import PATCHES, listed_name
from .host.finetuning import Finetuning, FinetuningRun


class PromptNetFinetune(io.ComfyNode):
    SETS = ("images", "masks")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_PromptNetFinetune",
            display_name="PromptNet Finetune",
            category="ProFusion",
            description=(
                "Fine-tunes a PromptNet, and with it the model's attention layers, to one picture or to the variants "
                "that Concept Augment draws of it (ProFusion, arXiv 2305.13579). The PromptNet and the model that come "
                "in stay as they are: the changes to the model are a patch file in models/loras, which LoRA loaders "
                "read. A training that was stopped goes on when the same inputs are queued again."
            ),
            inputs=[
                inputs.promptnet(),
                io.Model.Input(
                    "model", tooltip="The model that the PromptNet serves. LoRAs and other patches on it take part."
                ),
                inputs.clip(),
                inputs.clip_vision(),
                inputs.vae(),
                io.Image.Input("images", tooltip="The picture, or variants of it, as a batch or a list, of any sizes."),
                inputs.steps(50, "Training steps. The paper takes about 50."),
                inputs.learning_rate(2e-5, "How far each step moves PromptNet. 1e-5 to 1e-4 is usual."),
                io.Boolean.Input(
                    "train_attention",
                    default=True,
                    tooltip="Train the model's attention layers too, as in the paper. Off: only PromptNet.",
                ),
                inputs.learning_rate(
                    1e-4,
                    "How far each step moves the attention layers: 1e-4 to 1e-3 with a rank, 1e-5 without.",
                    "attention_learning_rate",
                ),
                io.Int.Input(
                    "rank",
                    default=8,
                    min=0,
                    max=256,
                    tooltip="Rank of the attention LoRA. Higher learns more and makes a larger file. 0: full matrices, "
                    "as in the paper, in a file as large as these layers.",
                ),
                inputs.batch_size(),
                inputs.seed("Random seed of the training. The same seed trains the same files."),
                io.String.Input(
                    "filename_prefix",
                    default="profusion/finetuned",
                    tooltip="Name of the files. A number is added, nothing is overwritten, and 'pets/cat' makes a "
                    "subfolder.",
                ),
                io.Boolean.Input(
                    "save_promptnet",
                    default=True,
                    tooltip="Save the fine-tuned PromptNet in models/profusion_promptnets, for PromptNet Loader. It "
                    "takes 0.7 GB for SD 1.5.",
                ),
                inputs.masks("Only this area is learned."),
                inputs.gradient_checkpointing(),
                io.Boolean.Input(
                    "mix_variants",
                    default=False,
                    optional=True,
                    tooltip="Show PromptNet one of the pictures and draw another, as the authors do: it learns what "
                    "they share. For variants whose backgrounds differ, without masks. Off: each draws itself.",
                ),
            ],
            outputs=[
                io.Custom("PROMPTNET").Output(tooltip="The fine-tuned PromptNet, for PromptNet Encode."),
                io.Model.Output(tooltip="The model with its changes as an ordinary patch."),
                io.String.Output(
                    display_name="patch_file",
                    tooltip="Name of the patch file as LoRA loaders list it. Empty if there is none.",
                ),
                io.Image.Output(display_name="loss_plot", tooltip="Loss of each step and its running mean."),
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
        gradient_checkpointing="auto",
        mix_variants=False,
    ) -> io.NodeOutput:
        check_connected(clip=clip, clip_vision=clip_vision, vae=vae)
        options = FinetuneOptions(
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            attention_learning_rate=attention_learning_rate,
            rank=rank,
            mixed=mix_variants,
        )
        given = gather(images, masks)
        remarks = Remarks(cls)
        finetuning = Finetuning(
            promptnet,
            model,
            clip,
            clip_vision,
            vae,
            given,
            any(bool((one.weight < 1).any()) for one in given),
            train_attention,
            options,
            gradient_checkpointing,
            remarks,
        )
        run = FinetuningRun(finetuning, filename_prefix, save_promptnet, warn_under(cls))
        with keeping(cls, run.keep):
            saved = run.train()
        name = listed_name(PATCHES, run.patch_path) if run.patch_path else ""
        plot, text = run.plot(), remarks.after(f"{steps} steps\n{finetuning.about}\n{saved}")
        shown = show(cls, text, captioned(plot, text), previewed=True)
        return io.NodeOutput(finetuning.promptnet(), finetuning.patched_model(), name, from_image(plot)[None], ui=shown)


NODES = [PromptNetFinetune]
