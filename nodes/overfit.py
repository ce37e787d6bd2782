"""ProFusion_OverfitReport: did customisation change what it should have left alone?"""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..profusion.metrics.chart import chart
from ..profusion.pictures import captioned, from_image, stacked
from .host.display import show
from .host.drawing import SAMPLERS, SCHEDULERS, Sampling, empty_latents
from .host.encoding import check_connected
from .host.overfit import NOUN, Pictures, report, shown_pictures, subjects
from .host.placing import MORE_CONCEPTS

PROMPTS = "a photo of a house\na photo of a tree in a field\na street at night\na bowl of fruit on a table"


class OverfitReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_OverfitReport",
            display_name="Overfit Report",
            category="ProFusion",
            description=(
                "Measures what customisation changed besides the concept (Infusion, arXiv 2404.14007): how far predictions for "
                "other prompts moved (latent Fisher divergence, 0 is not at all), and how far the pictures of the whole class "
                "did (2-Wasserstein). For residuals, and for any customised model, such as one with a LoRA."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The base model, as it was before customisation."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Latent.Input(
                    "latent",
                    tooltip="Empty Latent Image: its size is that of the pictures, its batch_size how many are drawn for the "
                    "2-Wasserstein distance. At least 2; 16 or more say something.",
                ),
                io.String.Input(
                    "noun",
                    default="",
                    tooltip="What the customised model's concept is one of, such as cat. Residuals know their own noun.",
                ),
                io.String.Input(
                    "class_prompt",
                    default=f"a photo of a {NOUN}",
                    tooltip=f"What the pictures of the class show. {NOUN} becomes the noun.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=False,
                    default=PROMPTS,
                    tooltip="Prompts without the concept, one a line, for the latent Fisher divergence.",
                ),
                io.Int.Input(
                    "draws",
                    default=16,
                    min=1,
                    max=1000,
                    tooltip="Noisy latents at which predictions are compared, for each prompt. More narrow the interval.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the first picture; the second has the next seed, and so on. The same seed gives the same report.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps of each picture."),
                io.Float.Input(
                    "cfg",
                    default=6.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance of the pictures: 4 for Toybox, 6 to 8 for Stable Diffusion.",
                ),
                io.Combo.Input("sampler_name", options=SAMPLERS, default="euler", tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=SCHEDULERS, default="simple", tooltip="As in KSampler."),
                io.Model.Input(
                    "customised", optional=True, tooltip="A customised model: with a LoRA, fine-tuned, or patched."
                ),
                io.Clip.Input(
                    "customised_clip", optional=True, tooltip="Its text encoder, where customisation changed that too."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="What the customised model draws its concept with, such as the one that Infusion Attention Patch or "
                    "PromptNet Encode gives. Default: class_prompt.",
                ),
                *[
                    io.Custom("RESIDUAL").Input(f"residual{slot}", optional=True, tooltip="A residual to report on.")
                    for slot in ("", *MORE_CONCEPTS)
                ],
                io.Vae.Input("vae", optional=True, tooltip="To show some of the pictures under the chart."),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The report as a Markdown table."),
                io.Image.Output(display_name="chart", tooltip="The report as a picture."),
                io.String.Output(display_name="json", tooltip="The report for programs."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        latent,
        noun,
        class_prompt,
        prompts,
        draws,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        customised=None,
        customised_clip=None,
        conditioning=None,
        vae=None,
        **residuals,
    ) -> io.NodeOutput:
        check_connected(clip=clip)
        customisations = subjects(
            model, clip, class_prompt, residuals, customised, customised_clip, conditioning, noun.strip()
        )
        empty = empty_latents(model, latent)
        sampling = Sampling(steps, cfg, sampler_name, scheduler)
        pictures = Pictures(tuple(empty.shape[1:]), len(empty), seed, sampling)
        scores, drawn = report(model, clip, customisations, prompts, class_prompt, draws, pictures)
        image = captioned(chart(scores), "\n".join(scores.notes))
        if vae is not None:
            image = stacked([shown_pictures(model, vae, drawn), image])
        text = json.dumps(scores.as_json(), indent=2)
        return io.NodeOutput(scores.markdown(), from_image(image)[None], text, ui=show(cls, scores.text(), image))


NODES = [OverfitReport]
