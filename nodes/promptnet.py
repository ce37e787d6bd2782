"""ProFusion_PromptNetLoader, ProFusion_PromptNetEncode and ProFusion_ResidualFromPromptNet: one picture into a word."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..profusion.infusion import architecture_name
from ..profusion.pictures import captioned, tiled
from ..profusion.promptnet.network import check_fits
from ..profusion.promptnet.pseudo_word import PLACEHOLDER, with_noun
from ..profusion.promptnet.seed import PROMPT_PAIRS, ResidualSeed, attention_modules
from ..profusion.references import gather, together
from . import inputs
from .host.display import Progress, show
from .host.encoding import check_connected, encode_references
from .host.evaluation import TrainedModel
from .host.families import native_size, promptnet_layers
from .host.files import find_promptnet, fingerprint, promptnet_names, why_not_found
from .host.identity import BaseFile, origin_on
from .host.placing import encode_training_prompts
from .host.words import WordInPrompt, encode_pictures, load


class PromptNetLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_PromptNetLoader",
            display_name="PromptNet Loader",
            category="ProFusion",
            description=(
                "Loads a PromptNet, which turns a picture into the pseudo-word S* (ProFusion, arXiv 2305.13579): "
                "Toybox's own, or a file in models/profusion_promptnets, in this pack's layout or in the authors'."
            ),
            inputs=[
                io.Combo.Input(
                    "promptnet",
                    options=promptnet_names(),
                    tooltip="Toybox's, or a file in models/profusion_promptnets. Press R to list new files.",
                ),
            ],
            outputs=[io.Custom("PROMPTNET").Output(tooltip="For PromptNet Encode and PromptNet Finetune.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, promptnet=None) -> bool | str:
        return why_not_found(find_promptnet, promptnet)

    @classmethod
    def fingerprint_inputs(cls, promptnet=None) -> str:
        return fingerprint(find_promptnet, promptnet)

    @classmethod
    def execute(cls, promptnet) -> io.NodeOutput:
        notes: list[str] = []
        loaded = load(find_promptnet(promptnet), notes.append)
        kind = "made at every step" if loaded.config.with_noise else "made before sampling"
        words = f"{loaded.config.tokens} pseudo-word{'s' * (loaded.config.tokens > 1)}"
        return io.NodeOutput(
            loaded, ui=show(cls, "\n".join([f"{loaded.config.architecture}: {words}, {kind}", *notes]))
        )


class PromptNetEncode(io.ComfyNode):
    SETS = ("images", "masks")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_PromptNetEncode",
            display_name="PromptNet Encode",
            category="ProFusion",
            description=(
                "Writes what pictures show into a prompt, as the pseudo-word S* (ProFusion, arXiv 2305.13579). The "
                "conditioning goes into any sampler; Fusion KSampler and Fusion Guider make S* anew for each step."
            ),
            inputs=[
                inputs.promptnet(),
                inputs.clip(),
                inputs.clip_vision(),
                inputs.vae(),
                io.Image.Input(
                    "images",
                    tooltip="The picture, or several of the same thing, whose mean counts: a batch or a list, of any "
                    "sizes. Transparent parts turn grey.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default=f"a photo of {PLACEHOLDER}",
                    tooltip=f"The prompt. Write {PLACEHOLDER} once, where the thing from the picture belongs.",
                ),
                io.String.Input(
                    "noun",
                    default="",
                    tooltip=f"What the picture shows, such as cat. It replaces {PLACEHOLDER} in the plain prompt.",
                ),
                inputs.masks("The rest turns grey."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="with_word", tooltip=f"The prompt with {PLACEHOLDER}."),
                io.Conditioning.Output(
                    display_name="plain_text", tooltip="The prompt in plain words, for Fusion KSampler's text."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, promptnet, clip, clip_vision, vae, images, text, noun, masks=None) -> io.NodeOutput:
        check_connected(clip=clip, clip_vision=clip_vision, vae=vae)
        plain = with_noun(text, noun)
        seen = encode_pictures(promptnet.config, vae, clip_vision, gather(images, masks), masks is not None)
        word = WordInPrompt(promptnet, clip, seen, text)
        note = f"PromptNet sees {seen.note}"
        return io.NodeOutput(
            word.conditioning(),
            clip.encode_from_tokens_scheduled(clip.tokenize(plain)),
            ui=show(cls, note, captioned(tiled(seen.pictures), note)),
        )


class ResidualFromPromptNet(io.ComfyNode):
    SETS = ("images", "masks")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_ResidualFromPromptNet",
            display_name="Residual from PromptNet",
            category="ProFusion",
            description=(
                "Turns what PromptNet sees in pictures into a residual at the class noun, without training, in the "
                "time of a few training steps. Train it further in Residual Trainer, or draw it with Infusion "
                "Attention Patch."
            ),
            inputs=[
                inputs.promptnet(),
                inputs.clip(),
                inputs.clip_vision(),
                inputs.vae(),
                io.Model.Input(
                    "model", tooltip="The model that the residual is for. LoRAs and other patches on it take part."
                ),
                io.Image.Input(
                    "images",
                    tooltip="The picture, or several of the same thing, whose mean counts: a batch or a list, of any "
                    "sizes. Take those that you train on.",
                ),
                io.String.Input(
                    "noun", default="", tooltip="The class noun, such as cat. Give Residual Trainer the same one."
                ),
                inputs.masks("The residual leaves the rest as it is."),
            ],
            outputs=[
                io.Custom("RESIDUAL").Output(
                    tooltip="For Residual Trainer's resume, Infusion Attention Patch or Residual Saver."
                )
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(cls, promptnet, clip, clip_vision, vae, model, images, noun, masks=None) -> io.NodeOutput:
        check_connected(clip=clip, clip_vision=clip_vision, vae=vae)
        noun, layers, base = noun.strip(), promptnet_layers(model), BaseFile.of_node(cls)
        check_fits(promptnet.config, architecture=architecture_name(layers))
        conditionings, rows = encode_training_prompts(clip, noun, layers)
        given = gather(images, masks)
        pictures, weights, note = together(given, vae.spacial_compression_encode(), native_size(model))
        references = encode_references(model, vae, pictures, weights)
        seen = encode_pictures(promptnet.config, vae, clip_vision, given)
        word = WordInPrompt(promptnet, clip, seen, PROMPT_PAIRS[0][1])
        spoken = [word.in_prompt(prompt) for _, prompt in PROMPT_PAIRS]
        trained, modules = (
            TrainedModel(model, conditionings, gradients=False),
            attention_modules(model.get_model_object("diffusion_model")),
        )
        seeding = ResidualSeed(trained.predict_noise, references, rows, spoken, modules, layers, noun, trained.sigmas)
        progress = Progress(seeding.batches)

        def work() -> None:
            for done in seeding.steps():
                progress.report(done)

        trained.run(work, (seeding.batch_size, *references[0].latent.shape))
        said = f"{note}\nPromptNet sees {seen.note}"
        base.wait()
        origin = replace(origin_on(model, base), base_hash=base.hash_so_far())
        return io.NodeOutput(
            replace(seeding.residual(), origin=origin), ui=show(cls, said, captioned(tiled(seen.pictures), said))
        )


NODES = [PromptNetLoader, PromptNetEncode, ResidualFromPromptNet]
