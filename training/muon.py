"""Muon: momentum whose matrices are orthogonalised before each step, and AdamW for everything that is no matrix.

On the VAE it reaches in one minute what AdamW alone reaches in four (Jordan et al. 2024, "Muon: an optimizer for hidden
layers"; torch's own takes no convolutions).
"""

from __future__ import annotations

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest matrix with all singular values about 1, by a quintic Newton-Schulz iteration: (m, n) -> (m, n).

    The iteration X <- (a + b A + c A^2) X with A = X X^T is run on the polynomial P of the Gram matrix G in X = P X_0,
    which is min(m, n) square, so the long side is met twice only.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    gram = x @ x.T
    polynomial = torch.eye(len(gram), dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        current = polynomial @ gram @ polynomial
        polynomial = a * polynomial + (b * current + c * current @ current) @ polynomial
    x = polynomial @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """For weights of two or more dimensions; a convolution's kernel is flattened to (out, in * k * k)."""

    def __init__(self, parameters, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"]).flatten(1)
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalise(update).view_as(parameter), alpha=-group["lr"] * scale)
