"""ProFusion_AttentionProbe: how much of a model's attention a noun has."""

from __future__ import annotations

from comfy_api.latest import io

from ..profusion.probing import report
from . import inputs
from .host.display import show
from .host.drawing import Sampling, drawn_latent, empty_latents
from .host.encoding import check_connected
from .host.probing import probe


class AttentionProbe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="ProFusion_AttentionProbe",
            display_name="Attention Probe",
            category="ProFusion",
            description=(
                "How much of your model's attention a noun has, layer by layer, inside its object and outside: what a "
                "residual at that noun can act through. Look here first when a concept does not come. Draws the plain "
                "picture, as KSampler does."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Any model that Infusion Attention Patch takes."),
                inputs.clip(),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True, default="a photo of a cat", tooltip="The prompt."
                ),
                io.String.Input("noun", default="cat", tooltip="The noun in it, as a residual has it."),
                io.Latent.Input("latent_image", tooltip="An empty latent, or one to start from."),
                inputs.seed("Random seed, as in KSampler."),
                inputs.steps(20, "Sampling steps. A few show as much.", largest=10_000),
                inputs.cfg("As in KSampler: 1 for models with their guidance built in."),
                inputs.sampler_name(),
                inputs.scheduler(),
                io.Conditioning.Input("negative", optional=True, tooltip="As in KSampler. Default: an empty prompt."),
                io.Mask.Input(
                    "object",
                    optional=True,
                    tooltip="White where the object is. If not connected, it is where the noun has most of the "
                    "attention, all layers together.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The table, as text."),
                io.Latent.Output(tooltip="The plain picture's latent, for VAE Decode."),
                io.Mask.Output(
                    display_name="attention", tooltip="The noun's attention, the mean of all layers; 1 at its most."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return inputs.found_by(schema, "attention map", "cross-attention", "noun", "heatmap", "DAAM")

    @classmethod
    def execute(
        cls,
        model,
        clip,
        text,
        noun,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        negative=None,
        object=None,  # noqa: A002 (what the input is called)
    ) -> io.NodeOutput:
        check_connected(clip=clip)
        if object is not None and not object.any():
            raise ValueError("object is all black: make it white where the object is, or leave it unconnected")
        samples = empty_latents(model, latent_image)
        sampling = Sampling(steps, cfg, sampler_name, scheduler)
        shares, drawn = probe(model, clip, text, noun.strip(), negative, samples, seed, sampling)
        size = drawn.shape[-2:]
        region = shares.region(size) if object is None else object.reshape(-1, *object.shape[-2:]).float().mean(0)
        said, mean = report(noun.strip(), shares.shares(region)), shares.mean(size)
        return io.NodeOutput(
            said, drawn_latent(latent_image, drawn), (mean / mean.amax().clamp_min(1e-12))[None], ui=show(cls, said)
        )


NODES = [AttentionProbe]
