"""The similarities of generated pictures to a concept's references and to their prompts, all that can be measured of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import MetricError, check_finite
from .encoders import ImageEncoder, PairedEncoder, color_check
from .scores import Score, Scores
from .similarity import background_only, image_similarity, object_only, prompt_similarity, similarity_among

LEAST_COLORS = 5  # of eight, for a pair to be one: by chance it happens once in a thousand
GENERATED, REFERENCES = "generated", "references among themselves"


@dataclass(frozen=True)
class Pictures:
    """Pictures of any sizes, each (H, W, 3) in [0, 1], and where their objects are, (H, W) in [0, 1] each, if that is known."""

    images: Sequence[Tensor]
    masks: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        for index, image in enumerate(self.images, start=1):
            if image.ndim != 3 or image.shape[-1] != 3:
                raise MetricError(f"picture {index} has shape {tuple(image.shape)}: give (H, W, 3), without an alpha channel")
            check_finite(image[None], f"picture {index}: number", "the VAE or the model that made it overflowed")
        if self.masks is not None and len(self.masks) != len(self.images):
            raise MetricError(f"{len(self.masks)} masks for {len(self.images)} pictures: give one for each, or none")

    def features(self, encoder: ImageEncoder, only: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """(N, D), of their objects or backgrounds only where that is asked for."""
        rows = []
        for index, image in enumerate(self.images):
            batch = image[None] if only is None else only(image[None], self.masks[index][None].to(image))
            rows.append(encoder.images(batch))
        return torch.cat(rows)


def concept_scores(
    generated: Pictures,
    references: Pictures,
    prompts: Sequence[str],
    pair: PairedEncoder | None,
    encoders: Sequence[ImageEncoder] = (),
) -> Scores:
    """CLIP-T and CLIP-I of a pair, image similarity by further backbones; of objects and of backgrounds where there are masks.

    prompts: one for each generated picture, or one for all. What the references score among themselves stands below, as in the
    papers' tables: what a perfect copy would. Raises MetricError where pictures or prompts are missing.
    """
    if not len(generated.images):
        raise MetricError("no generated pictures: give at least one")
    if not len(references.images):
        raise MetricError("no references: give the pictures that the concept was learned from")
    if len(prompts) not in (1, len(generated.images)) or not all(prompt.strip() for prompt in prompts):
        raise MetricError(
            f"{len(prompts)} prompts for {len(generated.images)} pictures: give one for each, in their order, or one for all, "
            "none of them empty"
        )
    found = [] if pair is None else [_prompt_scores(generated, prompts, pair)]
    views = {"": None}
    if generated.masks is not None and references.masks is not None:
        views |= {", object": object_only, ", background": background_only}
    for encoder in [*([] if pair is None else [pair]), *encoders]:
        found += [_image_scores(generated, references, encoder, name, only) for name, only in views.items()]
    return Scores(
        tuple(score for scores in found for score in scores.scores), tuple(note for scores in found for note in scores.notes)
    )


def _prompt_scores(generated: Pictures, prompts: Sequence[str], pair: PairedEncoder) -> Scores:
    """CLIP-T, or a note why there is none."""
    colors = color_check(pair)
    if colors < LEAST_COLORS:
        return Scores(
            notes=(
                f"No CLIP-T: {pair.name} finds {colors} of eight colours from their names, so its text and image encoder were "
                "not trained together, or the text encoder came without its projection, as in SD 1.x checkpoints.",
            )
        )
    samples = prompt_similarity(generated.features(pair), pair.texts(prompts))
    return Scores((Score.of("CLIP-T", GENERATED, samples, backbone=pair.name),))


def _image_scores(
    generated: Pictures, references: Pictures, encoder: ImageEncoder, view: str, only: Callable | None
) -> Scores:
    """Image similarity, and that of the references among themselves, of whole pictures or of a part."""
    metric, better = f"{encoder.measure}{view}", "" if only is background_only else "higher"
    known = references.features(encoder, only)
    samples = image_similarity(generated.features(encoder, only), known)
    scores = [Score.of(metric, GENERATED, samples, backbone=encoder.name, better=better)]
    if len(known) > 1:
        scores.append(Score.of(metric, REFERENCES, similarity_among(known), backbone=encoder.name, better=better))
    return Scores(tuple(scores))
