"""Prompts as a checkpoint's UNet takes them: one text tower's context or two side by side, and SDXL's vector y."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .chunks import Token, chunks, empty_chunk
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
        """See `encode_prompts`."""
        return encode_prompts(self.towers, prompts)


def encode_prompts(towers: Sequence[TextModel], prompts: str | Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Prompts, with weights and of any length, as the host encodes them -> (B, L, D) and, of two towers, (B, width).

    L is 77 rows for each chunk; a prompt of fewer chunks than another is repeated, see `of_one_length`. The second is
    the second tower's projected pooled state of the first chunk. Raises PromptError.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    contexts: list[list[Tensor]] = [[] for _ in texts]
    for tower in towers:
        parted = [chunks(text, tower.sizes.pad) for text in texts]
        counts = [len(part) for part in parted]
        context, last, tokens = _encode_chunks(tower, [chunk for part in parted for chunk in part])
        for found, rows in zip(contexts, context.split(counts), strict=True):
            found.append(rows.flatten(0, 1))  # (77 * chunks, D)
    pooled = None
    if len(towers) > 1:
        first = [sum(counts[:index]) for index in range(len(counts))]
        pooled = tower.project(last[first], tokens[first])
    return torch.stack(of_one_length([torch.cat(found, dim=-1) for found in contexts])), pooled


def _encode_chunks(tower: TextModel, parts: Sequence[Sequence[Token]]) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks -> their contexts (N, 77, D), weighed, last hidden states (N, 77, D) and ids (N, 77).

    A weight moves a row away from that of an empty prompt, or towards it: z_0 + w (z - z_0).
    """
    device, count = next(tower.parameters()).device, len(parts)
    weights = torch.tensor([[token.weight for token in part] for part in parts], device=device)
    weighed = bool((weights != 1).any())
    rows = [*parts, empty_chunk(tower.sizes.pad)] if weighed else parts
    tokens = torch.tensor([[token.id for token in part] for part in rows], device=device)
    context, last = tower.encode(tokens)
    if weighed:
        nothing, plain, scale = context[-1], context[:-1], weights[..., None]
        context = torch.where(scale == 1, plain, nothing + scale.to(plain) * (plain - nothing))
    return context, last[:count], tokens[:count]


def of_one_length(contexts: Sequence[Tensor]) -> list[Tensor]:
    """Contexts (..., L, D), each repeated until all have as many rows; attention gives the same of a repeated one."""
    length = math.lcm(*(context.shape[-2] for context in contexts))
    times = [length // context.shape[-2] for context in contexts]
    return [
        torch.cat([context] * count, dim=-2) if count > 1 else context
        for context, count in zip(contexts, times, strict=True)
    ]
