"""ProFusion_ConceptAugment: variants of one picture, the same object on other backgrounds."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..profusion.augment import NOUN, variant_prompts
from ..profusion.pictures import PictureError, captioned, concept_pictures, tiled
from .host.augmenting import variants
from .host.display import show
from .host.drawing import SAMPLERS, SCHEDULERS, Sampling
from .host.encoding import check_connected

PROMPTS = "\n".join(f"a photo of a {NOUN} {place}" for place in ("on grass", "on snow", "on sand", "in a room"))


class ConceptAugment(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_ConceptAugment",
            display_name="Concept Augment",
            category="ProFusion",
            description=(
                "Draws variants of a picture: the object inside the mask stays exactly as it is, and everything around it is "
                "drawn anew (ProFusion, arXiv 2305.13579). For PromptNet Finetune and Residual Trainer, which then learn the "
                "object and not its background."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any model that draws pictures; one for inpainting draws the best backgrounds."
                ),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input("image", tooltip="The picture of the object."),
                io.Mask.Input("mask", tooltip="White where the object is."),
                io.String.Input(
                    "noun",
                    default="",
                    tooltip=f"What the object is, such as cat: it takes the place of {NOUN} in the prompts.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=False,
                    default=PROMPTS,
                    tooltip="What the variants show, one prompt a line, used in turn. Name the object, which the model sees.",
                ),
                io.Int.Input("count", default=4, min=1, max=64, tooltip="How many variants to draw."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the first variant's noise; the second has the next seed, and so on.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps of each variant."),
                io.Float.Input(
                    "cfg",
                    default=6.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance: 4 for Toybox, 6 to 8 for Stable Diffusion.",
                ),
                io.Combo.Input("sampler_name", options=SAMPLERS, default="euler", tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=SCHEDULERS, default="simple", tooltip="As in KSampler."),
                io.Int.Input(
                    "feather",
                    default=4,
                    min=0,
                    max=128,
                    tooltip="Pixels outside the mask over which the picture fades into the new background.",
                ),
                io.Boolean.Input(
                    "include_picture", default=True, tooltip="Put the picture itself before its variants."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The picture, if it is included, and its variants."),
                io.Mask.Output(display_name="masks", tooltip="The object's mask, once for each of them."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        image,
        mask,
        noun,
        prompts,
        count,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        feather,
        include_picture,
    ) -> io.NodeOutput:
        check_connected(clip=clip, vae=vae)
        texts = variant_prompts(prompts, noun)
        pictures, masks = concept_pictures(image, mask, vae.spacial_compression_encode())
        if len(pictures) > 1:
            raise PictureError(f"{len(pictures)} pictures: give one, of which variants are drawn")
        picture, mask = pictures[0].cpu(), masks[0].cpu()
        sampling = Sampling(steps, cfg, sampler_name, scheduler)
        drawn = variants(model, clip, vae, picture, mask, texts, count, seed, sampling, feather)
        images = torch.stack([picture] * include_picture + drawn)
        text = f"{count} variants of a picture of {picture.shape[1]}x{picture.shape[0]} pixels"
        shown = show(cls, text, captioned(tiled(images), text), previewed=True)
        return io.NodeOutput(images, mask.expand(len(images), -1, -1).clone(), ui=shown)


NODES = [ConceptAugment]
