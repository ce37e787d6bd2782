"""ProFusion_InfusionAttentionPatch: concepts into a prompt and a model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

from comfy_api.latest import io

from ..profusion.holding import BACKGROUNDS, CONCEPTS, FREE, TOGETHER
from ..profusion.infusion import check_context_width
from ..profusion.joint_attention import COLUMN, LOCKS
from ..profusion.prompt import OCCURRENCES
from ..profusion.stride import EVERY, MOST
from . import inputs
from .host.display import warn_under
from .host.encoding import check_connected
from .host.families import acting_on
from .host.identity import other_bases
from .host.placing import MORE_CONCEPTS, ConceptInput, encode_prompt, place_concepts, placed_in
from .host.streams import add_streams
from .host.words import WORD

OWN_TRAJECTORY, SHARED_LATENT = "own trajectory", "shared latent"
NO_CONCEPT = (
    "A sampler drew with this model and without a concept: as on the plain model. Connect this node's CONDITIONING "
    "output, unchanged, to that sampler's positive."
)
UNET_LOCK = (
    "lock means nothing for this model: in a UNet's cross-attention the plain picture's map is kept whole, as in the "
    "paper. It is for transformers."
)


def _pseudo_words(conditioning: list, text: str) -> int:
    """Tokens of the S* in a CONDITIONING, 0 for none. Raises ValueError where it is known to be of another text."""
    words = [extras[WORD] for _, extras in conditioning if WORD in extras]
    other = next((word.prompt for word in words if word.prompt != text), None)
    if other is not None:
        raise ValueError(
            f"the conditioning is of the prompt {other!r}, and text is {text!r}: give both the same prompt"
        )
    return max((len(word.rows) for word in words), default=0)


def _concept_inputs(suffix: str) -> list:
    """The optional inputs of a further concept."""
    number = suffix.strip("_")
    return [
        io.Custom("RESIDUAL").Input(f"residual{suffix}", optional=True, tooltip=f"Concept {number}, at its own noun."),
        inputs.strength(suffix, f"Strength of concept {number}.", optional=True),
        io.Combo.Input(
            f"occurrence{suffix}",
            options=list(OCCURRENCES),
            default="auto",
            optional=True,
            tooltip=f"Which occurrence of its noun concept {number} takes.",
        ),
        io.Mask.Input(f"region{suffix}", optional=True, tooltip=f"Where in the picture concept {number} may appear."),
    ]


def _more_concepts(inputs: Mapping[str, Any]) -> list[ConceptInput]:
    """The further concepts that are connected; the widgets beside an unconnected residual mean nothing."""
    return [
        ConceptInput(
            suffix,
            inputs[f"residual{suffix}"],
            inputs.get(f"strength{suffix}", 1.0),
            inputs.get(f"occurrence{suffix}", "auto"),
            inputs.get(f"region{suffix}"),
        )
        for suffix in MORE_CONCEPTS
        if inputs.get(f"residual{suffix}") is not None
    ]


class InfusionAttentionPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ProFusion_InfusionAttentionPatch",
            display_name="Infusion Attention Patch",
            category="ProFusion",
            description=(
                "Draws learned concepts at their nouns in a prompt, on the layout and background of the plain picture "
                "(Infusion, arXiv 2404.14007). Give both outputs to any sampler. However many concepts there are, "
                "it costs a fifth more than the plain picture, or as much again where every is 1; kept apart, each "
                "costs that."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "An SD 1.x, SD 2.x, SDXL or Toybox model, or one of the transformers that the help page lists; "
                        "LoRAs and other patches may be on it."
                    ),
                ),
                inputs.clip(),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The positive prompt. It must have each residual's noun as a word; (weights:1.2) are fine.",
                ),
                io.Custom("RESIDUAL").Input(
                    "residual", tooltip="The first concept, from Residual Trainer or Residual Loader."
                ),
                inputs.strength("", "Strength of the first concept. 1: as trained. 0: the plain picture."),
                inputs.share("start_percent", 0.0, "Share of sampling after which the concepts act."),
                inputs.share("end_percent", 1.0, "Share of sampling until which the concepts act."),
                io.Combo.Input(
                    "occurrence",
                    options=list(OCCURRENCES),
                    default="auto",
                    tooltip=(
                        "Which occurrence of its noun the first concept takes. auto: all of them; if several concepts "
                        "have the same noun, one each, in order."
                    ),
                ),
                io.Combo.Input(
                    "stream",
                    options=[OWN_TRAJECTORY, SHARED_LATENT],
                    default=OWN_TRAJECTORY,
                    tooltip=(
                        "own trajectory: keep the layout of the plain picture with the same seed. shared latent: take "
                        "the layout that the plain model sees in the customised picture so far, as in training."
                    ),
                ),
                io.Mask.Input("region", optional=True, tooltip="Where in the picture the first concept may appear."),
                *[entry for suffix in MORE_CONCEPTS for entry in _concept_inputs(suffix)],
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip=(
                        "The same text, already encoded, such as PromptNet Encode's prompt with S*: the concepts are "
                        "placed in it. If not connected, the text is encoded here."
                    ),
                ),
                io.Combo.Input(
                    "background",
                    options=list(BACKGROUNDS),
                    default=FREE,
                    optional=True,
                    tooltip=(
                        "What is around the concepts. free: it may change a little with them. held: exactly the plain "
                        "picture's, around where that one has the nouns. held softly: almost, where a concept must "
                        "outgrow the plain picture's outline. Needs stream: own trajectory."
                    ),
                ),
                io.Combo.Input(
                    "concepts",
                    options=list(CONCEPTS),
                    default=TOGETHER,
                    optional=True,
                    tooltip=(
                        "Several concepts, together: in one evaluation, in which a little of one's look reaches the "
                        "others. each apart: one evaluation each, so that every concept is what it is alone. Needs a "
                        "background that is held."
                    ),
                ),
                io.Int.Input(
                    "every",
                    default=EVERY,
                    min=1,
                    max=MOST,
                    optional=True,
                    tooltip=(
                        "At one step in so many, and at two at least, the concepts are drawn anew; between them what "
                        "they differ by from the plain picture is carried on. 1: at each step, as in the paper, for "
                        "the price of two plain pictures. 5: for a fifth more than one."
                    ),
                ),
                io.Combo.Input(
                    "lock",
                    options=list(LOCKS),
                    default=COLUMN,
                    optional=True,
                    tooltip=(
                        "Of transformers, what of the plain picture's attention is kept. column: where the concept "
                        "lands. whole: all of it, which holds the layout more, lets less of the concept through and "
                        "takes much memory. Means nothing for SD 1.x, SD 2.x and SDXL."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, ready to draw the concepts of the conditioning."),
                io.Conditioning.Output(tooltip="The encoded prompt with its concepts: the sampler's positive."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        text,
        residual,
        strength,
        start_percent,
        end_percent,
        occurrence,
        stream,
        region=None,
        conditioning=None,
        background=FREE,
        concepts=TOGETHER,
        every=1,
        lock=COLUMN,
        **more,
    ) -> io.NodeOutput:
        check_connected(clip=clip)
        acting = acting_on(model, lock)
        layers = acting.layers
        given = [ConceptInput("", residual, strength, occurrence, region), *_more_concepts(more)]
        pseudo_words = 0 if conditioning is None else _pseudo_words(conditioning, text)
        encoded = cache(partial(encode_prompt, clip, text, ()))
        placed = place_concepts(clip, text, layers, given, start_percent, end_percent, pseudo_words, encoded)
        conditioning = (
            encode_prompt(clip, text, placed, encoded)
            if conditioning is None
            else placed_in(clip, text, conditioning, placed, encoded)
        )
        check_context_width(conditioning[0][0].shape[-1], layers)
        warn = warn_under(cls)
        if acting.family is None and lock != COLUMN:
            warn(UNET_LOCK)
        others = other_bases([concept.residual for concept in given], model)
        if others:
            warn("\n".join(others))
        patched = add_streams(
            model,
            layers,
            stream == SHARED_LATENT,
            on_plain=lambda: warn(NO_CONCEPT),
            background=background,
            concepts=concepts,
            every=every,
            attending=acting.attending,
        )
        return io.NodeOutput(patched, conditioning)


NODES = [InfusionAttentionPatch]
