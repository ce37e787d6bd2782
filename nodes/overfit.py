"""ProFusion_OverfitReport: did customisation change what it should have left alone?"""

from __future__ import annotations

import json
from dataclasses import replace

from comfy_api.latest import io

from ..profusion.metrics.chart import chart
from ..profusion.pictures import captioned, from_image, stacked
from . import inputs
from .host.display import show, warn_under
from .host.drawing import Sampling, empty_latents
from .host.encoding import check_connected
from .host.identity import other_bases
from .host.overfit import NOUN, PicturePlan, report, shown_pictures, subjects
from .host.placing import MORE_CONCEPTS

OTHER_SUBJECTS = "a photo of a house\na photo of a tree in a field\na street at night\na bowl of fruit on a table"


class OverfitReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_OverfitReport",
            display_name="Overfit Report",
            category="ProFusion",
            description=(
                "Measures what customisation changed besides the concept (Infusion, arXiv 2404.14007): how far it "
                "moved predictions for other prompts (latent Fisher divergence; 0 is not at all), and how far it moved "
                "the pictures of the whole class (2-Wasserstein). For residuals, and for any customised model, such as "
                "one with a LoRA."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The base model, as it was before customisation."),
                inputs.clip(),
                io.Latent.Input(
                    "latent",
                    tooltip="An Empty Latent Image. Its size is that of the pictures, and its batch_size is how many "
                    "are drawn for the 2-Wasserstein distance: at least 2, and 16 or more for a meaningful number.",
                ),
                io.String.Input(
                    "noun",
                    default="",
                    tooltip="Class noun of the customised model's concept, such as cat. Residuals know theirs.",
                ),
                io.String.Input(
                    "class_prompt",
                    default=f"a photo of a {NOUN}",
                    tooltip=f"Prompt of the class's pictures. {NOUN} becomes the noun.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=False,
                    default=OTHER_SUBJECTS,
                    tooltip="Prompts without the concept, one a line, for the latent Fisher divergence.",
                ),
                io.Int.Input(
                    "draws",
                    default=16,
                    min=1,
                    max=1000,
                    tooltip="Noisy latents per prompt at which predictions are compared. More narrow the interval.",
                ),
                inputs.seed(
                    "Random seed of the first picture. Each further one adds 1. The same seed gives the same report."
                ),
                inputs.steps(20, "Sampling steps of each picture.", largest=1000),
                inputs.cfg("Guidance of the pictures: 4 for Toybox, 6 to 8 for Stable Diffusion."),
                inputs.sampler_name(),
                inputs.scheduler(),
                io.Model.Input(
                    "customised", optional=True, tooltip="A customised model: with a LoRA, fine-tuned, or patched."
                ),
                io.Clip.Input(
                    "customised_clip", optional=True, tooltip="Its text encoder, if customisation changed that too."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="What the customised model draws its concept with, such as the output of Infusion "
                    "Attention Patch or PromptNet Encode. Default: class_prompt.",
                ),
                *[
                    io.Custom("RESIDUAL").Input(f"residual{slot}", optional=True, tooltip="A residual to report on.")
                    for slot in ("", *MORE_CONCEPTS)
                ],
                inputs.vae("Decodes some of the pictures, to show them under the chart.", optional=True),
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
        pictures = PicturePlan(tuple(empty.shape[1:]), len(empty), seed, sampling)
        others = other_bases([residual for residual in residuals.values() if residual is not None], model)
        if others:
            warn_under(cls)("\n".join(others))
        scores, drawn = report(model, clip, customisations, prompts, class_prompt, draws, pictures)
        scores = replace(scores, notes=(*others, *scores.notes))
        image = captioned(chart(scores), "\n".join(scores.notes))
        if vae is not None:
            image = stacked([shown_pictures(model, vae, drawn), image])
        text = json.dumps(scores.as_json(), indent=2)
        return io.NodeOutput(scores.markdown(), from_image(image)[None], text, ui=show(cls, scores.text(), image))


NODES = [OverfitReport]
