"""ProFusion_ConceptScores: how alike generated pictures are to their prompt and to the references, in numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..profusion.metrics import Pictures, concept_scores, prompt_lines
from ..profusion.metrics.chart import chart
from ..profusion.metrics.encoders import ImageEncoder, PairedEncoder
from ..profusion.pictures import captioned, from_image
from ..profusion.references import gather
from ..profusion.toybox.encoder import ToyboxEncoder
from .host.backbones import ClipPair, VisionEncoder, watched
from .host.display import Progress, show


def _pictures(images: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor] | None, named: str) -> Pictures:
    """A host's IMAGE and MASK; what is transparent is grey, and so has no background that could be compared."""
    shown = gather(images, masks, named)
    return Pictures(
        [one.colours.cpu() for one in shown], None if masks is None else [one.weight.cpu() for one in shown]
    )


def _backbones(clip: Any, vision: Any, second: Any) -> list[ImageEncoder]:
    """What judges: without a CLIP_VISION, Toybox's own pair, which refuses pictures that are not Toybox's."""
    further = [] if second is None else [VisionEncoder(second)]
    if vision is None:
        return [ToyboxEncoder(), *further]
    return [VisionEncoder(vision) if clip is None else ClipPair(clip, vision), *further]


class ConceptScores(io.ComfyNode):
    SETS = ("images", "references", "prompt", "masks", "reference_masks")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_ConceptScores",
            display_name="Concept Scores",
            category="ProFusion",
            description=(
                "Measures generated pictures of a concept: how well they follow their prompt (CLIP-T), and how alike "
                "they are to the pictures that it was learned from (CLIP-I, DINO), with 95 % intervals. Scores of "
                "different image encoders cannot be compared, so each names its own."
            ),
            inputs=[
                io.Image.Input("images", tooltip="The generated pictures."),
                io.Image.Input("references", tooltip="The pictures that the concept was learned from."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=False,
                    default="",
                    tooltip="What the pictures should show: one prompt for all of them, or one line for each, in "
                    "order.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder that was trained with clip_vision, for CLIP-T. ViT-L: CLIP Loader with "
                    "clip_l (the CLIP of an SD 1.x checkpoint lacks its projection). ViT-H: the CLIP of SD 2.x. "
                    "ViT-bigG: the CLIP of SDXL.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Judges how alike pictures are. Default: Toybox's own, for Toybox's pictures only.",
                ),
                io.ClipVision.Input(
                    "image_encoder",
                    optional=True,
                    tooltip="A second judge, such as DINOv2, also from Load CLIP Vision.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White where the object is in the generated pictures. Together with reference_masks it "
                    "compares objects and backgrounds separately.",
                ),
                io.Mask.Input("reference_masks", optional=True, tooltip="White where the object is in the references."),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The scores as a Markdown table."),
                io.Image.Output(display_name="chart", tooltip="The scores and their 95 % intervals as a picture."),
                io.String.Output(display_name="json", tooltip="The scores for programs."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        images,
        references,
        prompt,
        clip=None,
        clip_vision=None,
        image_encoder=None,
        masks=None,
        reference_masks=None,
    ) -> io.NodeOutput:
        generated = _pictures(images, masks, "masks")
        known = _pictures(references, reference_masks, "reference_masks")
        encoders = _backbones(clip, clip_vision, image_encoder)
        pairs = sum(isinstance(encoder, PairedEncoder) for encoder in encoders)
        views = 3 if generated.masks is not None and known.masks is not None else 1
        encodings = (len(generated.images) + len(known.images)) * views * len(encoders)
        tell = Progress(encodings + pairs).advance
        scores = concept_scores(
            generated,
            known,
            prompt_lines(prompt, len(generated.images)),
            [watched(encoder, tell) for encoder in encoders],
        )
        picture = captioned(chart(scores), "\n".join(scores.notes))
        return io.NodeOutput(
            scores.markdown(),
            from_image(picture)[None],
            json.dumps(scores.as_json(), indent=2),
            ui=show(cls, scores.text(), picture),
        )


NODES = [ConceptScores]
