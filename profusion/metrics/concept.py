"""The similarities of generated pictures to a concept's references and to their prompts, all
that can be measured of them."""

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
COSINES = (-1.0, 1.0)
GENERATED, REFERENCES = "generated", "references among themselves"


@dataclass(frozen=True)
class Pictures:
    """Pictures of any sizes, each (H, W, 3) in [0, 1], and where their objects are, (H, W) in [0,
    1] each, if that is known."""

    images: Sequence[Tensor]
    masks: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        for index, image in enumerate(self.images, start=1):
            if image.ndim != 3 or image.shape[-1] != 3:
                raise MetricError(
                    f"picture {index} has shape {tuple(image.shape)}: give (H, W, 3), without an alpha channel"
                )
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


def prompt_lines(text: str, pictures: int) -> list[str]:
    """The prompts of a text, one a line; empty lines part them and are none.

    Raises MetricError where an empty line seems to stand for the prompt of a picture: there are as many as pictures.
    """
    lines = [line.strip() for line in text.splitlines()]
    empty = [str(number) for number, line in enumerate(lines, start=1) if not line]
    if empty and any(lines) and len(lines) == pictures:
        raise MetricError(
            f"of {len(lines)} lines of prompts for {pictures} pictures these are empty: {', '.join(empty)}. Write a "
            "prompt there, or take the empty lines out"
        )
    return [line for line in lines if line]


def concept_scores(
    generated: Pictures,
    references: Pictures,
    prompts: Sequence[str],
    encoders: Sequence[ImageEncoder],
) -> Scores:
    """CLIP-T by every encoder of pictures and texts, likeness to the references by all; also of objects and of
    backgrounds, where there are masks.

    prompts: one for each generated picture, or one for all; not needed where no encoder takes texts. What the
    references score among themselves stands below, as in the papers' tables: what a perfect copy would. Raises
    MetricError where pictures or prompts are missing.
    """
    if not len(generated.images):
        raise MetricError("no generated pictures: give at least one")
    if not len(references.images):
        raise MetricError("no references: give the pictures that the concept was learned from")
    pairs = [encoder for encoder in encoders if isinstance(encoder, PairedEncoder)]
    if pairs and len(prompts) not in (1, len(generated.images)) or not all(prompt.strip() for prompt in prompts):
        raise MetricError(
            f"{len(prompts)} prompts for {len(generated.images)} pictures: give one for each, in their order, or one "
            "for all, none of them empty"
        )
    views, notes = {"": None}, []
    if generated.masks is not None and references.masks is not None:
        views |= {", object": object_only, ", background": background_only}
    elif generated.masks is not None or references.masks is not None:
        notes.append("Objects are compared where both the generated pictures and the references have masks.")
    found: list[Score] = []
    for encoder in encoders:
        for view, only in views.items():
            features = generated.features(encoder, only)
            if encoder in pairs and only is None:
                found += _prompt_scores(features, prompts, encoder, notes)
            found += _image_scores(features, references.features(encoder, only), encoder, view, only)
    return Scores(tuple(found), tuple(notes))


def _prompt_scores(features: Tensor, prompts: Sequence[str], pair: PairedEncoder, notes: list[str]) -> list[Score]:
    """CLIP-T, or a note why there is none."""
    colors = color_check(pair)
    if colors < LEAST_COLORS:
        notes.append(
            f"No CLIP-T: {pair.name} finds {colors} of eight colours from their names, so its text and image encoder "
            "were not trained together, or the text encoder came without its projection, as in SD 1.x checkpoints."
        )
        return []
    samples = prompt_similarity(features, pair.texts(prompts))
    return [Score.of("CLIP-T", GENERATED, samples, COSINES, backbone=pair.name)]


def _image_scores(
    features: Tensor, known: Tensor, encoder: ImageEncoder, view: str, only: Callable | None
) -> list[Score]:
    """Image similarity, and that of the references among themselves, of whole pictures or of a part."""
    metric, better = f"{encoder.measure}{view}", "" if only is background_only else "higher"
    samples = {GENERATED: image_similarity(features, known)}
    if len(known) > 1:
        samples[REFERENCES] = similarity_among(known)
    return [
        Score.of(metric, subject, found, COSINES, backbone=encoder.name, better=better)
        for subject, found in samples.items()
    ]
