"""What a training step of a residual takes on a device, from the shapes alone, on tensors that have no memory.

    python -m benchmarks.training_memory [--model sd15 sd2 sdxl] [--pixels 512 1024] [--batch 1 4]

Every tensor that a step makes is counted while it lives, forward and back, as a device would hold it: attention as
fused kernels do it, which keep no map, and F's queries as `WaitingQueries` lets them wait. Not counted: what the
allocator and the libraries take for themselves.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from profusion import queries
from profusion.checkpointing import checkpointed
from profusion.infusion import Placement, cross_attention_layers, customised_patches, foundation_patches
from profusion.models.configs import SD15, SD21, SDXL, UNetConfig
from profusion.models.unet import BasicTransformerBlock, ResBlock, UNet
from profusion.queries import TakenOnce, WaitingQueries
from profusion.residual.training import masked_noise_error
from profusion.toybox.configs import TOYBOX

MODELS = {"sd15": SD15, "sd2": SD21, "sdxl": SDXL, "toybox": TOYBOX}
TOKENS, ROWS, PIXELS_A_CELL = 77, (5,), 8
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


@dataclass(frozen=True)
class Step:
    """Bytes: the model's weights, what waits for the way back, and the most that a step takes beside the weights."""

    weights: int
    kept: int
    peak: int


def measure(config: UNetConfig, batch: int, cells: tuple[int, int], dtype: torch.dtype, checkpointing: bool) -> Step:
    """One step on latents of cells (height, width)."""
    with torch.device("meta"), mock.patch("torch.nn.functional.scaled_dot_product_attention", _fused), _spilling():
        unet = UNet(config).to(dtype).requires_grad_(False)
        layers = cross_attention_layers(dict(unet.named_parameters()))
        delta = torch.zeros(len(layers), 1, config.context_dim, requires_grad=True)
        x, context = torch.zeros(batch, 4, *cells), torch.zeros(batch, TOKENS, config.context_dim, dtype=dtype)
        parts = [part for part in unet.modules() if isinstance(part, (ResBlock, BasicTransformerBlock))]
        with (
            Living([*unet.parameters(), delta, x, context]) as living,
            checkpointed(parts) if checkpointing else nullcontext(),
        ):
            loss = _loss(unet, x, context, Placement(delta, tuple(layer.name for layer in layers), ROWS), checkpointing)
            kept = living.now
            loss.backward()
    return Step(sum(value.nbytes for value in unet.parameters()), kept, living.peak)


def _loss(unet: UNet, x: Tensor, context: Tensor, placement: Placement, checkpointing: bool) -> Tensor:
    """As `ResidualTraining.loss`: F without autograd, then C with it."""
    store = WaitingQueries() if checkpointing else TakenOnce()
    added = torch.zeros(len(x), unet.config.adm_channels, dtype=context.dtype) if unet.config.adm_channels else None

    def predict(patches: dict) -> Tensor:
        options = {"patches": patches, "cond_or_uncond": [0]}
        return unet(x.to(context), torch.zeros(len(x)), context, added, options).float()

    with torch.no_grad():
        plain = predict(foundation_patches(store))
    predicted = predict(customised_patches(store, lambda options, chunk: (placement,)))
    return masked_noise_error(predicted, x, x[:, 0]) + masked_noise_error(predicted, plain, x[:, 0])


@contextmanager
def _spilling() -> Iterator[None]:
    """Let tensors without memory be spilled as those of a device with its own are: main memory is not counted."""

    class _Elsewhere:
        """Rows in main memory."""

        def __init__(self, rows: Tensor):
            self.shape, self._dtype, self.device = rows.shape, rows.dtype, torch.device("cpu")

        def __len__(self) -> int:
            return self.shape[0]

        def to(self, like: Tensor, non_blocking: bool) -> Tensor:
            return torch.empty(self.shape, dtype=self._dtype, device="meta")

    with mock.patch.object(queries, "APART", ("meta",)), mock.patch.object(queries, "in_main_memory", _Elsewhere):
        yield


def numbers_a_cell(config: UNetConfig, checkpointing: bool, cells: int = 64) -> float:
    """The most that a step takes beside the weights, in numbers of the model's type for each cell of the latents."""
    return measure(config, 1, (cells, cells), torch.float16, checkpointing).peak / 2 / cells**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["sd15", "sd2", "sdxl"])
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    print("float16, GB (1e9 bytes); kept: for the way back; total: weights, peak and a CUDA context\n")
    print("| model | pixels | batch | checkpointing | weights | kept | peak | numbers a cell | total |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.model:
        for pixels in arguments.pixels:
            cells = pixels // PIXELS_A_CELL
            for batch in arguments.batch:
                for checkpointing in (False, True):
                    step = measure(MODELS[name], batch, (cells, cells), torch.float16, checkpointing)
                    total = step.weights + step.peak + CUDA_CONTEXT
                    sizes = (step.weights, step.kept, step.peak)
                    weights, kept, peak = (f"{size / 1e9:.2f}" for size in sizes)
                    share = step.peak / 2 / cells**2 / batch
                    words = "yes" if checkpointing else "no"
                    print(
                        f"| {name} | {pixels} | {batch} | {words} | {weights} | {kept} | {peak} | {share:,.0f} | "
                        f"{total / 1e9:.2f} |"
                    )


if __name__ == "__main__":
    main()
