"""ProFusion_InfusionAttentionPatch: concepts into a prompt and a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ..profusion.infusion import Layer, Placement
from ..profusion.prompt import OCCURRENCES, NounError, choose_spans
from ..profusion.residual import Residual, check_architecture
from .host import PlacedConcept, add_streams, carrying, encode_prompt, model_layers, noun_spans
from .host_fusion import WORD

OWN_TRAJECTORY, SHARED_LATENT = "own trajectory", "shared latent"
MORE_CONCEPTS = ("_2", "_3", "_4")


@dataclass(frozen=True)
class ConceptInput:
    """One residual as it comes in, and where its place in the node is (for error messages)."""

    slot: str
    residual: Residual
    strength: float
    occurrence: str
    region: Any = None


def place_concepts(
    clip: Any,
    text: str,
    layers: Sequence[Layer],
    concepts: Sequence[ConceptInput],
    start_percent: float,
    end_percent: float,
    pseudo_words: int = 0,
) -> list[PlacedConcept]:
    """Find each concept's noun in the prompt. Errors say what is wrong with which input and quote the prompt.

    pseudo_words: tokens of the S* that the prompt has, if it has one.
    """
    if not text.strip():
        raise NounError("the prompt is empty: write one that has the noun of each residual")
    if start_percent > end_percent:
        raise ValueError(
            f"start_percent={start_percent} is after end_percent={end_percent}: the concepts would never be active"
        )
    placed = []
    for concept in concepts:
        check_architecture(concept.residual, layers)
        sharing = [c for c in concepts if c.occurrence == "auto" and _same_noun(c, concept)]
        turn = next((index for index, other in enumerate(sharing) if other is concept), 0)
        rows = _rows(clip, text, pseudo_words, concept, turn, len(sharing))
        residual, region = concept.residual, concept.region
        if region is not None and not region.any():
            raise ValueError(f"region{concept.slot} is all black: {residual.noun!r} could appear nowhere")
        placement = Placement(residual.delta, residual.layers, rows, concept.strength, region=region)
        placed.append(PlacedConcept(placement, start_percent, end_percent))
    return placed


def _same_noun(one: ConceptInput, other: ConceptInput) -> bool:
    return one.residual.noun.lower().split() == other.residual.noun.lower().split()


def _rows(clip: Any, text: str, pseudo_words: int, concept: ConceptInput, turn: int, sharing: int) -> tuple[int, ...]:
    noun = concept.residual.noun
    spans = noun_spans(clip, text, noun, pseudo_words)
    if not spans:
        raise NounError(f"residual{concept.slot} is of the noun {noun!r}, which is not a word of the prompt {text!r}")
    try:
        chosen = choose_spans(spans, concept.occurrence, turn, sharing)
    except NounError as error:
        raise NounError(f"residual{concept.slot}: {error} of the noun {noun!r} in the prompt {text!r}") from None
    return tuple(row for span in chosen for row in span)


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
        io.Float.Input(
            f"strength{suffix}",
            default=1.0,
            min=-4.0,
            max=4.0,
            step=0.05,
            optional=True,
            tooltip=f"Strength of concept {number}.",
        ),
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
                "(Infusion, arXiv 2404.14007). Give both outputs to any sampler. Every step evaluates the model twice, "
                "however many concepts there are."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="An SD 1.x, SD 2.x, SDXL or Toybox model; LoRAs and other patches may be on it."
                ),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The positive prompt. It must have each residual's noun as a word; (weights:1.2) are fine.",
                ),
                io.Custom("RESIDUAL").Input(
                    "residual", tooltip="The first concept, from Residual Trainer or Residual Loader."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How much of the first residual is added: 1 as trained, 0 draws the plain picture.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of sampling after which the concepts act.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of sampling until which the concepts act.",
                ),
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
                        "own trajectory: the layout is that of the plain picture with the same seed. shared latent: the "
                        "layout is what the plain model makes of the customised picture so far, as in training."
                    ),
                ),
                io.Mask.Input("region", optional=True, tooltip="Where in the picture the first concept may appear."),
                *[entry for suffix in MORE_CONCEPTS for entry in _concept_inputs(suffix)],
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip=(
                        "The same text, encoded already, such as PromptNet Encode's with S*: the concepts are placed in it. "
                        "Not connected: the text is encoded here."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, ready to draw the concepts of the conditioning."),
                io.Conditioning.Output(tooltip="The encoded prompt with its concepts: the sampler's positive."),
            ],
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
        **more,
    ) -> io.NodeOutput:
        if clip is None:
            raise ValueError("clip is None: the checkpoint that was loaded has no text encoder")
        layers = model_layers(model)
        concepts = [ConceptInput("", residual, strength, occurrence, region), *_more_concepts(more)]
        pseudo_words = 0 if conditioning is None else _pseudo_words(conditioning, text)
        placed = place_concepts(clip, text, layers, concepts, start_percent, end_percent, pseudo_words)
        conditioning = encode_prompt(clip, text, placed) if conditioning is None else carrying(conditioning, placed)
        width = conditioning[0][0].shape[-1]
        if width != layers[0].context_dim:
            raise ValueError(
                f"the text encoder makes a context of width {width} and the model takes {layers[0].context_dim}: "
                "use the clip that belongs to the model"
            )
        return io.NodeOutput(add_streams(model, layers, stream == SHARED_LATENT), conditioning)


NODES = [InfusionAttentionPatch]
