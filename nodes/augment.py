"""ProFusion_ConceptAugment: variants of one picture, the same object on other backgrounds."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..profusion.augment import NOUN, variant_prompts
from ..profusion.pictures import captioned, tiled
from ..profusion.references import concept_pictures
from . import inputs
from .host.augmenting import PLACES, STAY, variants
from .host.display import show
from .host.drawing import Sampling
from .host.encoding import check_connected
from .host.families import native_size

BACKGROUND_PROMPTS = "\n".join(
    f"a photo of a {NOUN} {place}" for place in ("on grass", "on snow", "on sand", "in a room")
)


class ConceptAugment(io.ComfyNode):
    SETS = ("image", "mask")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_ConceptAugment",
            display_name="Concept Augment",
            category="ProFusion",
            description=(
                "Draws variants of a picture. The object inside the mask stays as it is, and the model paints "
                "everything around it anew (ProFusion, arXiv 2305.13579). Train PromptNet Finetune or Residual Trainer "
                "on the variants: they learn the object and not its background."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any model that draws pictures. An inpainting model draws the best backgrounds."
                ),
                inputs.clip(),
                inputs.vae(),
                io.Image.Input(
                    "image", tooltip="The picture of the object, or several, of which variants are drawn in turn."
                ),
                io.Mask.Input("mask", tooltip="White where the object is, one for each picture or one for all."),
                io.String.Input(
                    "noun", default="", tooltip=f"What the object is, such as cat. It replaces {NOUN} in the prompts."
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=False,
                    default=BACKGROUND_PROMPTS,
                    tooltip="Prompts of the variants, one a line, used in turn. Mention the object: the model sees it "
                    "while it paints around it.",
                ),
                io.Int.Input("count", default=4, min=1, max=64, tooltip="How many variants to draw."),
                inputs.seed("Random seed of the first variant. Each further one adds 1."),
                inputs.steps(20, "Sampling steps of each variant.", largest=1000),
                inputs.cfg("Guidance: 4 for Toybox, 6 to 8 for Stable Diffusion."),
                inputs.sampler_name(),
                inputs.scheduler(),
                io.Int.Input(
                    "feather",
                    default=4,
                    min=0,
                    max=128,
                    tooltip="Width of the soft edge outside the mask, in pixels.",
                ),
                io.Boolean.Input(
                    "include_picture", default=True, tooltip="Put the original picture before its variants."
                ),
                io.Combo.Input(
                    "object_place",
                    options=list(PLACES),
                    default=STAY,
                    optional=True,
                    tooltip="stay: every pixel of the object is the photo's. move and turn: it is elsewhere in each "
                    "variant, turned a little and smaller, so that its place is not learned. Mirror: not for writing.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The original, if it is included, and its variants."),
                io.Mask.Output(display_name="masks", tooltip="The object's mask in each picture."),
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
        object_place=STAY,
    ) -> io.NodeOutput:
        check_connected(clip=clip, vae=vae)
        texts = variant_prompts(prompts, noun)
        compression = vae.spacial_compression_encode()
        pictures, masks, note = concept_pictures(image, mask, compression, native_size(model))
        pictures, masks = list(pictures.cpu()), list(masks.cpu())
        sampling = Sampling(steps, cfg, sampler_name, scheduler)
        drawn, drawn_masks = variants(
            model, clip, vae, pictures, masks, texts, count, seed, sampling, feather, object_place
        )
        images = torch.stack(pictures * include_picture + drawn)
        text = f"{count} variant{'s' * (count != 1)} of {note}"
        shown = show(cls, text, captioned(tiled(images), text), previewed=True)
        return io.NodeOutput(images, torch.stack(masks * include_picture + drawn_masks), ui=shown)


NODES = [ConceptAugment]
