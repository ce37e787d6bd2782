"""The error of a predicted noise, as the methods weigh it, in float32: scalars, or one number a row.

Four means of |eps_theta - eps|^2, which differ in what counts as one:

    residual        a cell of a mask: a batch's masks are one set of cells, and a picture with a large object says more.
                    It learns one vector from a few pictures of one thing, and more cells of it are more evidence.
    residual, automatic   a row, as a share of what the plain model misses there: else a step with little noise, whose
                    error is large whatever is learned, outweighs those that say how the concept looks.
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


def relative_noise_error(predicted: Tensor, target: Tensor, mask: Tensor, unit: Tensor) -> Tensor:
    """Mean over rows of a row's own mean |eps_theta - target|^2 over its mask's cells, in units of `unit` (B,).

    predicted and target (B, C, H, W), weights of the cells (B, H, W); a row whose weights are all 0 counts as 0.
    """
    return (row_noise_error(predicted, target, mask) / unit).mean()


def row_noise_error(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Each row's mean |eps_theta - target|^2 over its mask's cells: (B, C, H, W) twice and (B, H, W) -> (B,), float32;
    0 for a mask of nothing."""
    error = ((predicted.float() - target.float()) ** 2).mean(dim=1)
    mask = mask.float()
    return (error * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp_min(1e-6)


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
