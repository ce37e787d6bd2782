"""ProFusion_ToyboxLoader: the embedded model, and pictures to try it with, so that nothing need be downloaded."""

from __future__ import annotations

from comfy_api.latest import io

from ..profusion.toybox.concepts import CONCEPT, PICTURES, drawn_concept
from ..profusion.toybox.world import BACKGROUNDS, CONCEPTS
from .host import toybox

UNET = "UNet"
BASES = {UNET: toybox.load_model, "MMDiT": toybox.load_mmdit}


class ToyboxLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_ToyboxLoader",
            display_name="Toybox Loader",
            category="ProFusion",
            description=(
                "A tiny text-to-image model that ships with this pack: 128x128 pictures of toys, in seconds and on a "
                "CPU. It has the shape of Stable Diffusion 1.5, and every node that works with that works with it. It "
                "brings pictures of a toy that it has never seen, to learn from."
            ),
            inputs=[
                io.Combo.Input(
                    "toy",
                    options=list(CONCEPTS),
                    default=CONCEPT,
                    tooltip="Which toy the pictures show. The model was never shown any of these.",
                ),
                io.Int.Input(
                    "count",
                    default=PICTURES,
                    min=1,
                    max=len(BACKGROUNDS),
                    tooltip="How many pictures of the toy to draw.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    tooltip="Decides places and poses in the toy's pictures.",
                ),
                io.Combo.Input(
                    "base",
                    options=list(BASES),
                    default=UNET,
                    tooltip=(
                        "The network that draws: a UNet as Stable Diffusion 1.5 has, or joint attention over text and "
                        "picture as Stable Diffusion 3 has. The rest is the same for both."
                    ),
                    optional=True,
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The network that draws, for any sampler. Use latents of 128x128 pixels."),
                io.Clip.Output(tooltip="The text encoder. It knows thirteen nouns, eight colours and six places."),
                io.Vae.Output(tooltip="The autoencoder, 8 pixels a latent cell as in Stable Diffusion."),
                io.ClipVision.Output(tooltip="The image encoder that was trained against the text encoder."),
                io.Image.Output(display_name="pictures", tooltip="Pictures of the toy, for Residual Trainer."),
                io.Mask.Output(display_name="masks", tooltip="Where the toy is in each picture."),
                io.String.Output(display_name="noun", tooltip="The toy's class noun."),
            ],
        )

    @classmethod
    def execute(cls, toy, count, seed, base=UNET) -> io.NodeOutput:
        drawn = drawn_concept(toy, count, seed)
        return io.NodeOutput(
            BASES[base](),
            toybox.load_clip(toybox.embedding_folders()),
            toybox.load_vae(),
            toybox.load_clip_vision(),
            drawn.pictures,
            drawn.masks,
            drawn.noun,
        )


NODES = [ToyboxLoader]
