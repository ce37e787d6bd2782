"""Prompts as a checkpoint's UNet takes them: one text tower's context or two side by side, and SDXL's vector y."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .tokenizer import tokenize
from .unet import timestep_embedding

if TYPE_CHECKING:
    from .clip import TextModel

SIZE_WIDTH = 256  # of the embedding of each of the six numbers of a picture's size


def size_vector(
    pooled: Tensor,
    size: tuple[int, int],
    crop: tuple[int, int] = (0, 0),
    target: tuple[int, int] | None = None,
) -> Tensor:
    """SDXL's y (arXiv 2307.01952, section 2.2): the pooled prompt, and what the picture's size is said to be.

    pooled (B, 1280); size, crop and target are (height, width) in pixels; no target is the size -> (B, 2816).
    """
    numbers = torch.tensor([*size, *crop, *(target or size)], dtype=torch.float32, device=pooled.device)
    embedded = timestep_embedding(numbers, SIZE_WIDTH).flatten().to(pooled.dtype)
    return torch.cat([pooled, embedded.expand(len(pooled), -1)], dim=1)


@dataclass(frozen=True)
class TextTowers:
    """The text towers of a checkpoint, in the order in which their contexts lie side by side: one, or SDXL's two."""

    towers: tuple[TextModel, ...]

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Prompts -> context (B, 77, D), and of two towers the second's projected pooled state (B, width)."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        contexts, pooled = [], None
        for tower in self.towers:
            tokens = tokenize(texts, tower.sizes.pad).to(next(tower.parameters()).device)
            context, last = tower.encode(tokens)
            contexts.append(context)
        if len(self.towers) > 1:
            pooled = tower.project(last, tokens)
        return torch.cat(contexts, dim=-1), pooled
