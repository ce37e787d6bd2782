"""ProFusion_InfusionRegion: where concepts were drawn, as a mask."""

from __future__ import annotations

from comfy_api.latest import io

from ..profusion.holding import HELD, SOFTLY
from .host.streams import drawn_region

_CELL = 8  # pixels a side of a latent cell, of every model that has the streams


class InfusionRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_InfusionRegion",
            display_name="Infusion Region",
            category="ProFusion",
            description=(
                "Where Infusion drew its concepts, as it found them in the plain picture: outside this mask the "
                "picture is the plain one. For pictures that Infusion Attention Patch drew with a background held."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Infusion Attention Patch, its background held."),
                io.Latent.Input("latent", tooltip="What a sampler has drawn with that model, unchanged."),
            ],
            outputs=[io.Mask.Output(tooltip="White where the concepts may be; as large as the picture.")],
        )

    @classmethod
    def execute(cls, model, latent) -> io.NodeOutput:
        region = drawn_region(model, latent["samples"])
        if region is None:
            raise ValueError(
                "latent is none that this model has just drawn with its background held: set background of Infusion "
                f"Attention Patch to {HELD!r} or {SOFTLY!r}, and connect that node's MODEL and, unchanged, the LATENT "
                "of the sampler that draws with it"
            )
        return io.NodeOutput(region.repeat_interleave(_CELL, -2).repeat_interleave(_CELL, -1))


NODES = [InfusionRegion]
