"""From S* (ProFusion, arXiv 2305.13579) to an Infusion residual (arXiv 2404.14007) that a training can start from.

In cross-attention layer i, head h and cell t, let o_ht be what is read from a prompt, and a_ht the noun's share of the
plain prompt's map. A residual delta_i adds a_ht W_V_ih delta_i there, since Infusion keeps the map. It is chosen so
that the plain prompt then gives what the prompt with S* gives in its place, for the same hidden states; outside the
mask m nothing:

    delta_i = argmin  sum_ht m_t |o_ht(S*) - o_ht(noun) - a_ht W_V_ih delta|^2 + (1 - m_t) |a_ht W_V_ih delta|^2

which takes one evaluation of the plain model and no gradient. The plain difference of the two words' rows in their
contexts is simpler and no start: S* is read from other rows, too (its own several, and those behind it), and its map
is not the noun's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from ..devices import solved
from ..diffusion import per_row, training_sigmas
from ..infusion import (
    ExtraOptions,
    Layer,
    architecture_name,
    cross_attention_layers,
    layer_name,
    region_weights,
)
from ..loop import TrainingError
from ..models.attention import attention_map, split_heads
from ..residual import Residual
from ..residual.training import NOUN_PROMPTS, PredictWithPatches, Reference
from .training import WORD_PROMPTS

# What both were trained in: "a photo of a {}", "a photo of S*".
PROMPT_PAIRS = tuple(zip(NOUN_PROMPTS, WORD_PROMPTS, strict=True))
RIDGE = 0.03  # of the mean of the least squares' diagonal; from 0.01 to 0.1 it makes no difference


class Attention(Protocol):
    """A cross-attention module, the kernel's or a host's."""

    heads: int
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module


def attention_modules(network: nn.Module) -> dict[str, Attention]:
    """A UNet's cross-attention modules by their layers' names."""
    found = {}
    for path, module in network.named_modules():
        if path.endswith("attn2"):
            (layer,) = cross_attention_layers({f"{path}.to_v.weight": module.to_v.weight})
            found[layer.name] = module
    return found


def demand(
    attention: Attention, n: Tensor, noun: Tensor, rows: Sequence[int], word: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """How much each head of a layer reads from the noun, sum_t a_ht^2 (h,), and what it should read more there,
    sum_t m_t a_ht (o_ht(S*) - o_ht(noun)) (h, d), both float32.

    n (N, T, C), the layer's input; noun (N, L, D), the plain context, and the noun's rows in it; word (1, L, D), the
    context with S*; mask (N, T, 1) in [0, 1].
    """
    query, heads = attention.to_q(n), attention.heads

    def read(context: Tensor) -> tuple[Tensor, Tensor]:
        shares = attention_map(query, attention.to_k(context), heads).float()  # (N, h, T, L)
        return shares, shares @ split_heads(attention.to_v(context), heads).float()  # (N, h, T, d)

    shares, plain = read(noun)
    missing = read(word.to(n))[1] - plain
    share = shares[..., list(rows)].sum(dim=-1)  # (N, h, T)
    inside = rearrange(mask.float(), "n t 1 -> n 1 t")
    return (share**2).sum(dim=(0, 2)), torch.einsum("nht,nhtd->hd", inside * share, missing)


def least_squares(to_value: Tensor, energy: Tensor, wanted: Tensor) -> Tensor:
    """delta (D,) = argmin sum_h energy_h |W_h delta|^2 - 2 wanted_h W_h delta, with a ridge of RIDGE.

    to_value: W, (h, d, D); energy (h,); wanted (h, d). 0 where nothing is read from the noun.
    """
    matrix = torch.einsum("h,hdi,hdj->ij", energy, to_value, to_value)
    scale = matrix.diagonal().mean()
    if scale == 0:
        return to_value.new_zeros(to_value.shape[-1])
    ridge = RIDGE * scale * torch.eye(len(matrix), device=matrix.device)
    return solved(matrix + ridge, torch.einsum("hdi,hd->i", to_value, wanted))


class ResidualSeed:
    """The residual that does what S* does: `steps()` does the work, `residual()` is the result.

    predict_noise, references, sigmas: as `ResidualTraining` takes them. prompt_rows: for each prompt that
    `predict_noise` knows, the noun's rows in its context. words: the context (1, L, D) with S* of each of these
    prompts. modules: see `attention_modules`; they are called while `predict_noise` evaluates the model.
    """

    def __init__(
        self,
        predict_noise: PredictWithPatches,
        references: Sequence[Reference],
        prompt_rows: Sequence[tuple[int, ...]],
        words: Sequence[Tensor],
        modules: Mapping[str, Attention],
        layers: Sequence[Layer],
        noun: str,
        sigmas: Tensor | None = None,
        batches: int = 6,
        batch_size: int = 4,
    ):
        if not references:
            raise TrainingError("no pictures: connect one to five pictures of the concept")
        if len(words) != len(prompt_rows):
            raise ValueError(
                f"{len(words)} prompts with S* and {len(prompt_rows)} with the noun: give the same ones with both"
            )
        self._predict_noise, self._rows, self._words = predict_noise, list(prompt_rows), list(words)
        self._modules, self._layers, self._noun = modules, tuple(layers), noun
        self._latents = torch.stack([reference.latent for reference in references]).float()
        self._masks = torch.stack([reference.mask for reference in references])
        self._sigmas = (training_sigmas() if sigmas is None else sigmas).float().cpu()
        self.batches, self.batch_size = batches, batch_size
        self._demands: dict[str, tuple[Tensor, Tensor]] = {}
        self._deltas: dict[str, Tensor] = {}

    def steps(self) -> Iterator[int]:
        """Evaluate the model on every batch, yielding how many are done."""
        generator = torch.Generator().manual_seed(0)
        for batch in range(self.batches):
            with torch.no_grad():
                self._evaluate(batch, generator)
            yield batch + 1

    def _evaluate(self, batch: int, generator: torch.Generator) -> None:
        """One batch: pictures and prompts in turn, noise of levels that all batches together spread over all."""
        count, device = self.batch_size, self._latents.device
        picture = (torch.arange(count) + batch) % len(self._latents)
        place = torch.arange(count) * self.batches + batch + torch.rand(count, generator=generator)
        level = (place / (count * self.batches) * len(self._sigmas)).long().clamp(max=len(self._sigmas) - 1)
        sigma = self._sigmas[level].to(device)
        noise = torch.randn(count, *self._latents.shape[1:], generator=generator).to(device)
        prompt, mask = batch % len(self._rows), self._masks[picture]

        def observe(n: Tensor, context: Tensor, value: Tensor, extra_options: ExtraOptions):
            layer, size = layer_name(extra_options), extra_options["activations_shape"][-2:]
            found = demand(
                self._modules[layer],
                n,
                context,
                self._rows[prompt],
                self._words[prompt],
                region_weights(mask, len(n), size),
            )
            before = self._demands.get(layer, (0.0, 0.0))
            self._demands[layer] = tuple(old + new for old, new in zip(before, found, strict=True))
            if batch == self.batches - 1:
                self._deltas[layer] = self._solve(layer, n)
            return n, context, value

        noisy = self._latents[picture] + per_row(sigma, noise) * noise
        self._predict_noise(noisy, sigma, prompt, {"attn2_patch": [observe]})

    def _solve(self, layer: str, n: Tensor) -> Tensor:
        """A layer's delta (D,). The module itself says what W_V is, since a host may keep weights in another form."""
        module, width = self._modules[layer], self._layers[0].context_dim
        values = module.to_v(torch.eye(width, dtype=n.dtype, device=n.device)).float()  # (D, h * d)
        return least_squares(rearrange(values, "width (h d) -> h d width", h=module.heads), *self._demands[layer])

    def residual(self) -> Residual:
        """The residual of no steps. Raises TrainingError before the last batch, or where the model overflowed."""
        names = tuple(layer.name for layer in self._layers)
        if set(names) - set(self._deltas):
            raise TrainingError("the seed is not finished: the model was not evaluated, or not in all of its layers")
        delta = torch.stack([self._deltas[name].cpu() for name in names])
        if not torch.isfinite(delta).all():
            raise TrainingError("the seed is not finite: use a model in float32 or bfloat16")
        return Residual(delta[:, None], self._noun, names, architecture_name(self._layers))
