"""ProFusion_ToyboxLoader: the embedded model, so that everything can be tried without a download."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from . import host_models


class ToyboxLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_ToyboxLoader",
            display_name="Toybox Loader",
            category="ProFusion",
            description=(
                "A tiny text-to-image model that ships with this pack: 96x96 pictures of toys, in seconds and on a CPU. "
                "It has the shape of Stable Diffusion 1.5, so every node that works with that works with it."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The UNet, for any sampler. Use latents of 96x96 pixels."),
                io.Clip.Output(tooltip="The text encoder. It knows thirteen nouns, eight colours and six places."),
                io.Vae.Output(tooltip="The autoencoder, 8 pixels a latent cell as in Stable Diffusion."),
                io.ClipVision.Output(tooltip="The image encoder that was trained against the text encoder."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(
            host_models.load_model(),
            host_models.load_clip(folder_paths.get_folder_paths("embeddings")),
            host_models.load_vae(),
            host_models.load_clip_vision(),
        )


NODES = [ToyboxLoader]
