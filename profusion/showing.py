"""The map of a noun in a UNet's cross-attention, shown while the model stays what it is.

The map itself, A_i(t, l) = softmax(q(t) k(l)^T / sqrt(d)) of layer i, is nowhere to be had in a host: its attention is
one fused operation. But what attention gives is linear in the values, and those a patch may set. With one value v at
the noun's rows and nothing elsewhere a layer gives, head by head, A(t, noun) W_V v; with v at every row, W_V v. So

    a_i(t) = <out_noun - b, out_all - b> / |out_all - b|^2      b: what it gives of no values at all, its bias

is the mean of the heads' maps at the noun, weighed by what each head makes of v. v is the noun's own row. The model
itself is evaluated as ever: the rows with other values are there within the layer only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .infusion import ExtraOptions, Patches, layer_name

Showing = Callable[[Sequence[int], Callable[[str, Tensor, Tensor], None]], Patches]
"""`showing(rows, see)`: what `map_patches` makes of a UNet."""


def map_patches(rows: Sequence[int], see: Callable[[str, Tensor, Tensor], None]) -> Patches:
    """Patches that leave the model as it is and show the noun's map at every layer.

    rows: the noun's in the context. see: told the layer's name, a_i (B, h, w), and the noun's own row (B, D) there.
    """
    index, noun = list(rows), []

    def spread(n: Tensor, context: Tensor, value: Tensor, extra_options: ExtraOptions):
        own = value[:, index].mean(dim=1, keepdim=True)  # (B, 1, D)
        noun.append(own[:, 0])
        nothing, everywhere = torch.zeros_like(value), own.expand_as(value)
        at_noun = nothing.index_copy(1, torch.tensor(index, device=value.device), own.repeat(1, len(index), 1))
        return n.repeat(4, 1, 1), context.repeat(4, 1, 1), torch.cat([value, at_noun, everywhere, nothing])

    def gather(out: Tensor, extra_options: ExtraOptions):
        plain, at_noun, everywhere, nothing = out.chunk(4)
        whole = (everywhere - nothing).float()
        part = ((at_noun - nothing).float() * whole).sum(-1) / whole.square().sum(-1).clamp_min(1e-12)  # (B, T)
        size = extra_options["activations_shape"][-2:]
        see(layer_name(extra_options), part.view(len(part), *size), noun.pop())
        return plain

    return {"attn2_patch": [spread], "attn2_output_patch": [gather]}
