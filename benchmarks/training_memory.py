"""What a training step takes on a device, from the shapes alone, on tensors that have no memory.

    python -m benchmarks.training_memory [--method residual|finetune] [--model sd15 sd2 sdxl] [--pixels 512 1024]
        [--batch 1 4]

Every tensor that a step makes is counted while it lives, forward and back, as a device would hold it: attention as
fused kernels do it, which keep no map, and F's queries as `WaitingQueries` lets them wait. Not counted: what the
allocator and the libraries take for themselves, and in fine-tuning the text encoder. There, what learns is float32,
and counts with its gradient and its optimizer.
"""

from __future__ import annotations

import argparse
import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from profusion import queries
from profusion.checkpointing import checkpointed
from profusion.details import Details
from profusion.infusion import Placement, cross_attention_layers, customised_patches, foundation_patches
from profusion.losses import masked_noise_error
from profusion.models.configs import SD15, SD21, SDXL
from profusion.models.unet import BasicTransformerBlock, ResBlock, UNet
from profusion.promptnet.changes import attention_layers, changed, start_changes
from profusion.promptnet.network import SD15_PROMPTNET, SD21_PROMPTNET, SDXL_PROMPTNET, PromptNet
from profusion.queries import TakenOnce, WaitingQueries
from profusion.toybox.configs import TOYBOX, TOYBOX_PROMPTNET

MODELS = {"sd15": SD15, "sd2": SD21, "sdxl": SDXL, "toybox": TOYBOX}
PROMPTNETS = {"sd15": SD15_PROMPTNET, "sd2": SD21_PROMPTNET, "sdxl": SDXL_PROMPTNET, "toybox": TOYBOX_PROMPTNET}
PARTS = (ResBlock, BasicTransformerBlock)  # what gradient checkpointing computes twice
TOKENS, IMAGE_TOKENS, ROWS, PIXELS_A_CELL, RANK = 77, 257, (5,), 8, 8
OPTIMIZER_BYTES = 16  # a trained float32 number, its gradient and AdamW's two moments
CUDA_CONTEXT = 0.5e9  # bytes that a process takes on a card before its first tensor; a common size, not measured here


class Living(TorchDispatchMode):
    """Bytes of the tensors that were made under it and still live; `peak`: the most so far."""

    def __init__(self, apart_from: Iterable[Tensor]):
        """apart_from: tensors that were there before, which views are made of."""
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in apart_from)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._seen.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size


class _Fused(torch.autograd.Function):
    """The shapes of a fused attention kernel: it keeps its inputs, its output and one number a query."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None) -> Tensor:
    return _Fused.apply(query, key, value)


class _Elsewhere:
    """Rows that wait in main memory, which is not counted."""

    def __init__(self, rows: Tensor):
        self.shape, self._dtype, self.device = rows.shape, rows.dtype, torch.device("cpu")

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, like: Tensor, non_blocking: bool) -> Tensor:
        return torch.empty(self.shape, dtype=self._dtype, device="meta")


@contextmanager
def _like_a_card() -> Iterator[None]:
    """Let tensors without memory be those of a device with its own, with fused attention."""
    with (
        torch.device("meta"),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _fused),
        mock.patch.object(queries, "OWN_MEMORY", ("meta",)),
        mock.patch.object(queries, "in_main_memory", _Elsewhere),
    ):
        yield


@dataclass(frozen=True)
class Step:
    """Bytes: the model's weights; what learns, with its gradient and optimizer; what waits for the way back; and the
    most that a step takes beside the first two."""

    weights: int
    learned: int
    kept: int
    peak: int


def measure(
    model: str, batch: int, cells: tuple[int, int], checkpointing: bool, finetuning: bool = False, capacity: int = 1
) -> Step:
    """One step of a float16 model on latents of cells (height, width); capacity: of the residual."""
    config = MODELS[model]
    with _like_a_card():
        unet = UNet(config).half().requires_grad_(False)
        x, context = torch.zeros(batch, 4, *cells), torch.zeros(batch, TOKENS, config.context_dim, dtype=torch.float16)
        method = _Finetuning(unet, model) if finetuning else _Residual(unet, checkpointing, capacity)
        for value in method.learning:
            value.grad = torch.zeros_like(value)
        parts = [part for whole in method.networks for part in whole.modules() if isinstance(part, PARTS)]
        before = [*unet.parameters(), *method.learning, *(value.grad for value in method.learning), x, context]
        with Living(before) as living, method.running(), checkpointed(parts if checkpointing else ()):
            loss = method.loss(x, context)
            kept = living.now
            loss.backward()
    learned = OPTIMIZER_BYTES * sum(value.numel() for value in method.learning)
    return Step(sum(value.nbytes for value in unet.parameters()), learned, kept, living.peak)


class _Residual:
    """As `ResidualTraining.loss`: F without autograd, then C with it."""

    def __init__(self, unet: UNet, checkpointing: bool, capacity: int):
        layers = cross_attention_layers(dict(unet.named_parameters()))
        widths = tuple(layer.width for layer in layers)
        learning = [torch.zeros(len(layers), 1, unet.config.context_dim)]
        if capacity > 1:
            learning.append(torch.zeros(len(layers), capacity - 1, unet.config.context_dim))
            learning.append(torch.zeros(capacity - 1, sum(widths)))
        for value in learning:
            value.requires_grad_(True)
        details = Details(*learning[1:], widths) if capacity > 1 else None
        self._placement = Placement(learning[0], tuple(layer.name for layer in layers), ROWS, details=details)
        self._unet, self._store = unet, WaitingQueries if checkpointing else TakenOnce
        self.learning, self.networks, self.running = learning, [unet], nullcontext

    def loss(self, x: Tensor, context: Tensor) -> Tensor:
        store = self._store()
        with torch.no_grad():
            plain = _predicted(self._unet, x, context, foundation_patches(store))
        patches = customised_patches(store, lambda options, chunk: (self._placement,))
        predicted = _predicted(self._unet, x, context, patches)
        return masked_noise_error(predicted, x, x[:, 0]) + masked_noise_error(predicted, plain, x[:, 0])


class _Finetuning:
    """As `FinetuneTraining.loss`, with the text encoder left out: here S* moves every number of the context."""

    def __init__(self, unet: UNet, model: str):
        with torch.device("cpu"):
            layers = attention_layers(dict(unet.named_parameters()))
            self._changes = start_changes(layers, RANK, torch.Generator(), "meta")
        self._promptnet = PromptNet(replace(PROMPTNETS[model], second_latent="noisy"))
        low_rank = [value for change in self._changes.values() for value in change.parameters().values()]
        self.learning = [*self._promptnet.parameters(), *low_rank]
        self._unet, self.networks = unet, [unet, self._promptnet]

    def running(self) -> AbstractContextManager:
        return changed(self._unet, self._changes)

    def loss(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = torch.zeros(len(x), IMAGE_TOKENS, self._promptnet.config.image_width)
        word = self._promptnet(x, torch.zeros(len(x)), tokens, x)
        predicted = _predicted(self._unet, x, context + word.mean(dim=-1, keepdim=True).to(context), {})
        return masked_noise_error(predicted, x, x[:, 0])


def _predicted(unet: UNet, x: Tensor, context: Tensor, patches: dict) -> Tensor:
    added = torch.zeros(len(x), unet.config.adm_channels, dtype=context.dtype) if unet.config.adm_channels else None
    options = {"patches": patches, "cond_or_uncond": [0]}
    return unet(x.to(context), torch.zeros(len(x)), context, added, options).float()


def numbers_a_cell(
    model: str, checkpointing: bool, finetuning: bool = False, cells: int = 64, capacity: int = 1
) -> float:
    """The most that a step takes beside the weights, in numbers of the model's type for each cell of the latents."""
    return measure(model, 1, (cells, cells), checkpointing, finetuning, capacity).peak / 2 / cells**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("residual", "finetune"), default="residual")
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["sd15", "sd2", "sdxl"])
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    print("float16, GB (1e9 bytes). learned: with its gradient and optimizer. kept: for the way back. numbers: of the")
    print("peak, for each latent cell. total: weights, learned, peak and a CUDA context\n")
    print("| model | pixels | batch | checkpointing | weights | learned | kept | peak | numbers | total |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    cases = itertools.product(arguments.model, arguments.pixels, arguments.batch, (False, True))
    for model, pixels, batch, checkpointing in cases:
        cells = pixels // PIXELS_A_CELL
        step = measure(model, batch, (cells, cells), checkpointing, arguments.method == "finetune")
        total = step.weights + step.learned + step.peak + CUDA_CONTEXT
        sizes = " | ".join(f"{size / 1e9:.2f}" for size in (step.weights, step.learned, step.kept, step.peak))
        numbers = step.peak / 2 / cells**2 / batch
        words = "yes" if checkpointing else "no"
        print(f"| {model} | {pixels} | {batch} | {words} | {sizes} | {numbers:,.0f} | {total / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
