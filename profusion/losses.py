"""The error of a predicted noise, as the methods weigh it; all results are float32 scalars.

Three means of |eps_theta - eps|^2, which differ in what counts as one:

    residual        a cell of a mask: a batch's masks are one set of cells, and a picture with a large object says more.
                    It learns one vector from a few pictures of one thing, and more cells of it are more evidence.
    PromptNet       a picture, times a weight of its noise level, as its paper has it.
    fine-tuning     a picture too, over its own mask, or a picture that shows the object small would not be learned.
                    With a mask of everything it is PromptNet's.
"""

from __future__ import annotations

from torch import Tensor


def masked_noise_error(predicted: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """Mean of |eps_theta - eps|^2 over all masks' cells together (arXiv 2404.14007, section 5.1).

    predicted and noise (B, C, H, W), weights of the cells (B, H, W), not all of them 0.
    """
    error = (predicted.float() - noise.float()) ** 2
    weights = mask.float()[:, None].expand_as(error)
    return (error * weights).sum() / weights.sum()


def weighted_noise_error(predicted: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """Mean over rows of weight * mean |eps_theta - eps|^2 (arXiv 2305.13579, section 3.1).

    predicted and noise (B, C, H, W), weight (B,).
    """
    return (weight * ((predicted.float() - noise.float()) ** 2).mean(dim=(1, 2, 3))).mean()


def masked_weighted_noise_error(predicted: Tensor, noise: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """`weighted_noise_error` in which each row's mean is over its own mask (B, H, W), none of them empty."""
    error = ((predicted.float() - noise.float()) ** 2).mean(dim=1)  # (B, H, W)
    mask = mask.float()
    return (weight * (error * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))).mean()
