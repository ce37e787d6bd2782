"""What every metric refuses, in the same words."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problems import Explained


class MetricError(Explained, ValueError):
    """Something that cannot be measured. The message says what is wrong with which input, and what to do."""


def check_finite(values: Tensor, what: str, advice: str) -> None:
    """Raise MetricError, which names the first bad row, where (N, ...) holds NaN or infinity."""
    bad = (~torch.isfinite(values)).reshape(len(values) or 1, -1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise MetricError(
            f"{what} {bad[0] + 1} of {len(values)} has values that are not finite ({len(bad)} in all): {advice}"
        )
