"""Attention as every network here uses it: fused where nobody looks, explicit where the map itself is asked for."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * d) -> (B, heads, T, d)."""
    return rearrange(x, "b t (h d) -> b h t d", h=heads)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, T, d) -> (B, T, heads * d)."""
    return rearrange(x, "b h t d -> b t (h d)")


# Maps up to this size are quicker to hold than to compute twice, where a CPU has to come back through them.
SMALL_MAP = 512 * 512


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + mask) V, (B, Tq, C) x (B, Tk, C) x (B, Tk, C) -> (B, Tq, C).

    Never holds the map, but for small ones where autograd is on and a CPU computes: there the fused backward is slower
    than the explicit one. Which of both does not depend on the tensors' own gradients: streams compare to the bit.
    """
    small = query.shape[1] * key.shape[1] <= SMALL_MAP
    if mask is None and small and query.device.type == "cpu" and torch.is_grad_enabled():
        return apply_map(attention_map(query, key, heads), value, heads)
    query, key, value = (split_heads(x, heads) for x in (query, key, value))
    return merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))


def attention_map(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) itself, (B, Tq, C) x (B, Tk, C) -> (B, heads, Tq, Tk)."""
    query, key = split_heads(query, heads), split_heads(key, heads)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.softmax(dim=-1)


def apply_map(probabilities: Tensor, value: Tensor, heads: int) -> Tensor:
    """A map of (B, heads, Tq, Tk) over values of (B, Tk, C) -> (B, Tq, C)."""
    return merge_heads(probabilities @ split_heads(value, heads))
