"""Group norm for training: what torch's own computes, in a few passes over channels-last memory.

On a CPU torch's backward of a bfloat16 group norm takes as long as all convolutions of the autoencoder together; this
one takes a fifth of that. Statistics are float32 whatever the input is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_RUN = 16  # cells


class _GroupNorm(torch.autograd.Function):
    """y = a x + b for each picture and channel, where a and b come from the group's mean and deviation.

    With u = dL/dy, x^ = (x - mean) / deviation and w the weight:
    dL/dx = (w u - mean_group(w u) - x^ mean_group(w u x^)) / deviation.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels = x.shape[:2]
        rows = x.permute(0, 2, 3, 1).reshape(batch, -1, channels)  # (B, T, C), no copy where x is channels-last
        count = rows.shape[1] * channels // groups
        mean = _row_sums(rows).view(batch, groups, -1).sum(dim=2) / count  # (B, groups)
        square = _row_sums(rows * rows).view(batch, groups, -1).sum(dim=2) / count
        rstd = (square - mean * mean).clamp(min=0).add(eps).rsqrt()
        each = channels // groups
        mean, rstd = (stat.repeat_interleave(each, dim=1) for stat in (mean, rstd))  # (B, C)
        scale = weight * rstd
        shift = bias - mean * scale
        ctx.save_for_backward(rows, weight, mean, rstd)
        ctx.groups, ctx.shape = groups, x.shape
        return _picture(torch.addcmul(shift[:, None].to(x), rows, scale[:, None].to(x)), x.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows, weight, mean, rstd = ctx.saved_tensors
        batch, tokens, channels = rows.shape
        given = gradient.permute(0, 2, 3, 1).reshape(batch, tokens, channels).to(rows)
        total = _row_sums(given)  # (B, C)
        along = (_row_sums(given * rows) - mean * total) * rstd  # sum of u x^
        each, count = channels // ctx.groups, tokens * channels // ctx.groups

        def group_mean(values: Tensor) -> Tensor:
            return (values.view(batch, ctx.groups, -1).sum(dim=2) / count).repeat_interleave(each, dim=1)

        first, second = group_mean(weight * total), group_mean(weight * along)
        by_x = -second * rstd * rstd
        shift = -first * rstd - mean * by_x
        dx = torch.addcmul(shift[:, None].to(rows), rows, by_x[:, None].to(rows))
        dx.addcmul_(given, (weight * rstd)[:, None].to(rows))
        return _picture(dx, ctx.shape), along.sum(dim=0), total.sum(dim=0), None, None


def _row_sums(rows: Tensor) -> Tensor:
    """For each picture and channel the sum over the cells, in float32: (B, T, C) -> (B, C).

    A bfloat16 sum is quick where its result is bfloat16 too, so short runs are added up so, and the runs in float32.
    """
    batch, tokens, channels = rows.shape
    if rows.dtype is torch.bfloat16 and tokens % _RUN == 0:
        rows = rows.view(batch, tokens // _RUN, _RUN, channels).sum(dim=2)
    return rows.float().sum(dim=1)


def _picture(rows: Tensor, shape: torch.Size) -> Tensor:
    """(B, T, C) -> (B, C, H, W), channels-last, without a copy."""
    batch, channels, height, width = shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    """torch's group norm with the forward and backward above, under the same parameter names."""

    def forward(self, x: Tensor) -> Tensor:
        return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)


def with_quick_norms(module: nn.Module) -> nn.Module:
    """Replace every group norm inside by `GroupNorm`, which shares its parameters. On accelerators torch's own is
    quick."""
    for name, child in module.named_children():
        if type(child) is nn.GroupNorm:
            quick = GroupNorm(child.num_groups, child.num_channels, child.eps)
            quick.weight, quick.bias = child.weight, child.bias
            setattr(module, name, quick)
        else:
            with_quick_norms(child)
    return module
