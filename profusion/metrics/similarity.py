"""How alike pictures are to their prompts and to the references, from features of a backbone.

Every similarity is a cosine in [-1, 1], one number a picture; its mean over pictures is what papers print. Features
are rows (N, D) of any length.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .checks import MetricError, check_finite


def cosine(features: Tensor, others: Tensor) -> Tensor:
    """Every cosine of two sets of features: (N, D), (M, D) -> (N, M), float32.

    Raises MetricError where there are none, where widths differ, and for features that are not finite or all zeros.
    """
    for rows in (features, others):
        if rows.ndim != 2 or not len(rows):
            raise MetricError(f"features of shape {tuple(rows.shape)}: give at least one row, (N, D)")
        check_finite(rows, "feature", "the picture or the backbone overflowed; run it in float32")
        if not rows.any(dim=1).all():
            raise MetricError("a feature is all zeros and has no direction: the backbone's weights are missing")
    if features.shape[1] != others.shape[1]:
        raise MetricError(
            f"features of width {features.shape[1]} and {others.shape[1]} do not compare: take both from one backbone, "
            "texts from the text encoder that it was trained with"
        )
    unit, other = F.normalize(features.float(), dim=1), F.normalize(others.float(), dim=1).to(features.device)
    return unit @ other.T


def prompt_similarity(pictures: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T (arXiv 2208.12242, section 4): the cosine of each picture with its prompt, (N, D), (N or 1, D) -> (N,)."""
    if len(texts) not in (1, len(pictures)):
        raise MetricError(
            f"{len(texts)} prompts for {len(pictures)} pictures: give one for each, in their order, or one for all"
        )
    cosines = cosine(pictures, texts)
    return cosines[:, 0] if len(texts) == 1 else cosines.diagonal()


def image_similarity(pictures: Tensor, references: Tensor) -> Tensor:
    """CLIP-I, or DINO, as the backbone has it (arXiv 2208.12242, section 4): each picture's mean cosine with all
    references.

    (N, D), (M, D) -> (N,)
    """
    return cosine(pictures, references).mean(dim=1)


def similarity_among(references: Tensor) -> Tensor:
    """What the references themselves score: each one's mean cosine with the others, (M, D) -> (M,). M is at least 2."""
    if len(references) < 2:
        raise MetricError("one reference has none to be compared with: give at least two")
    cosines = cosine(references, references)
    return (cosines.sum(dim=1) - cosines.diagonal()) / (len(references) - 1)


def object_only(pictures: Tensor, masks: Tensor) -> Tensor:
    """Pictures (B, H, W, 3) with grey around their objects, by masks (B, H, W) in [0, 1].

    Compared so, pictures are judged by their objects alone (as arXiv 2305.16311, section 4.1, does).
    """
    if masks.shape != pictures.shape[:-1]:
        raise MetricError(
            f"masks of shape {tuple(masks.shape)} for pictures of {tuple(pictures.shape)}: give (B, H, W) of each"
        )
    check_finite(masks, "mask", "the node that made it overflowed")
    weights = masks.clamp(0, 1)[..., None].to(pictures)
    return pictures * weights + 0.5 * (1 - weights)


def background_only(pictures: Tensor, masks: Tensor) -> Tensor:
    """The same with grey in the place of the objects: likeness to the references here is overfitting."""
    return object_only(pictures, 1 - masks)
