"""What is said of a method's pictures: is the concept there, is the rest as the plain picture
has it, is the noun right."""

from __future__ import annotations

import torch
from torch import Tensor

from .judge import Judge
from .similarity import background_change, concept_similarity


def picture_scores(
    pictures: Tensor, plain: Tensor, noun: str, references: Tensor, reference_masks: Tensor, judge: Judge
) -> dict[str, float]:
    """Means over pictures (B, H, W, 3), each drawn from the seed of the plain picture (B, H, W, 3) of the same place.

    concept_similarity: the appearance inside the object, against the references (M, H, W, 3) and masks (M, H, W), 0..1.
    background_change: mean absolute difference (0..1) outside the objects, against the plain picture.
    caption_noun_accuracy: how often the judge sees the prompt's noun.
    """
    masks = judge.object_mask(pictures)
    union = torch.maximum(masks, judge.object_mask(plain))
    similarity = concept_similarity(pictures, masks, references, reference_masks)
    nouns = [seen == noun for seen in judge.nouns(pictures)]
    return {
        "concept_similarity": round(similarity.mean().item(), 4),
        "background_change": round(background_change(pictures, plain, union).mean().item(), 5),
        "caption_noun_accuracy": round(sum(nouns) / len(nouns), 4),
    }


def likeness_among(references: Tensor, masks: Tensor) -> float:
    """How alike references (M, H, W, 3) are among themselves: what a perfect copy would score."""
    if len(references) == 1:
        return 1.0
    kept = []
    for index in range(len(references)):
        rest = [other for other in range(len(references)) if other != index]
        one = slice(index, index + 1)
        kept.append(concept_similarity(references[one], masks[one], references[rest], masks[rest]))
    return torch.cat(kept).mean().item()
