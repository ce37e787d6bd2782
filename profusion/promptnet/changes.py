"""Changes of a UNet's attention layers that stay beside it, and the patch file they become (ProFusion, arXiv
2305.13579, section 3.1, fine-tunes "all attention layers"; low rank is arXiv 2106.09685).

    W' = W + scale * up @ down        or, in full,        W' = W + difference

The UNet itself is never altered: while it is evaluated with them, hooks add (W' - W) x to each layer's output W x.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import files
from ..infusion import UnsupportedModelError
from .network import PromptNetError

SUFFIX = ".safetensors"
PREFIX = "lora_unet_"  # of a UNet's layers in patch files
_WEIGHT = re.compile(r"(.*\.attn[12]\.(?:to_q|to_k|to_v|to_out\.0))\.weight")
_FILE_TYPE = torch.float16


@dataclass(frozen=True)
class LowRankChange:
    """scale * up @ down: up (out, rank), down (rank, in)."""

    up: Tensor
    down: Tensor
    scale: float = 1.0

    def matrix(self) -> Tensor:
        """W' - W, (out, in)."""
        return self.scale * self.up @ self.down

    def on(self, x: Tensor) -> Tensor:
        """(W' - W) x of (..., in) -> (..., out), in the type of x."""
        return self.scale * F.linear(F.linear(x, self.down.to(x)), self.up.to(x))

    def parameters(self) -> dict[str, Tensor]:
        """What there is to learn, by name."""
        return {"up": self.up, "down": self.down}

    def entries(self) -> dict[str, Tensor]:
        """What a patch file has of it: readers multiply up @ down by alpha / rank."""
        alpha = torch.tensor(self.scale * len(self.down))
        return {"lora_up.weight": self.up, "lora_down.weight": self.down, "alpha": alpha}


@dataclass(frozen=True)
class FullChange:
    """A difference (out, in)."""

    difference: Tensor

    def matrix(self) -> Tensor:
        """See LowRankChange."""
        return self.difference

    def on(self, x: Tensor) -> Tensor:
        """See LowRankChange."""
        return F.linear(x, self.difference.to(x))

    def parameters(self) -> dict[str, Tensor]:
        """See LowRankChange."""
        return {"difference": self.difference}

    def entries(self) -> dict[str, Tensor]:
        """See LowRankChange."""
        return {"diff": self.difference}


Change = LowRankChange | FullChange


def attention_layers(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """The linear layers of all attention of a UNet, by name, and the shape (out, in) of each one's weight.

    parameters: named as in the original layout of Stable Diffusion, ...attn1.to_q.weight; only their shapes are read.
    Raises UnsupportedModelError where there are none.
    """
    found = {match[1]: tuple(weight.shape) for name, weight in parameters.items() if (match := _WEIGHT.fullmatch(name))}
    if not found:
        raise UnsupportedModelError(
            "the model has no attention layers as SD 1.x, SD 2.x and SDXL have them (attn1, attn2): only PromptNet can "
            "be fine-tuned for it. Turn train_attention off"
        )
    return found


def start_changes(
    layers: Mapping[str, tuple[int, int]], rank: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> dict[str, Change]:
    """Changes of nothing yet, in float32, about to be trained; rank 0 is the full difference.

    down is drawn from the generator, with the variance that keeps that of its input; up is zero. A rank that exceeds a
    weight's own is cut to that.
    """
    if rank < 0:
        raise ValueError(f"rank={rank} must not be negative: 0 is the full difference, 4 to 16 is usual")
    changes: dict[str, Change] = {}
    with torch.inference_mode(False):  # a host may call in inference mode, whose tensors autograd does not take
        for name, (rows, columns) in layers.items():
            if not rank:
                changes[name] = FullChange(torch.zeros(rows, columns, device=device))
                continue
            own = min(rank, rows, columns)
            down = torch.randn(own, columns, generator=generator) / columns**0.5
            changes[name] = LowRankChange(torch.zeros(rows, own, device=device), down.to(device))
    return changes


@contextmanager
def changed(network: nn.Module, changes: Mapping[str, Change]) -> Iterator[dict[str, int]]:
    """For the time being the network computes with W' in place of W; its weights are not touched.

    Yields how often each layer was evaluated so. Whatever form the weights are kept in (half precision, 8 bits, on
    another device), the changes stay in float32 and autograd reaches them. Raises KeyError for a layer that the
    network lacks.
    """
    modules, counts = dict(network.named_modules()), dict.fromkeys(changes, 0)

    def hook_of(name: str, change: Change):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            counts[name] += 1
            return output + change.on(inputs[0])

        return hook

    with ExitStack() as hooks:
        for name, change in changes.items():
            hooks.callback(modules[name].register_forward_hook(hook_of(name, change)).remove)
        yield counts


def patch_tensors(changes: Mapping[str, Change]) -> dict[str, Tensor]:
    """The contents of a patch file, in float16 on the CPU: lora_unet_<layer>.lora_up.weight, .lora_down.weight and
    .alpha, or .diff, with _ for every dot of the layer's name. Raises PromptNetError where float16 cannot hold
    them."""
    tensors = {
        f"{PREFIX}{name.replace('.', '_')}.{kind}": value.detach().to("cpu", _FILE_TYPE)
        for name, change in changes.items()
        for kind, value in change.entries().items()
    }
    bad = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)
    if bad:
        raise PromptNetError(
            f"the changes of the attention layers grew out of bounds ({bad}): lower their learning rate"
        )
    return tensors


def save_patch(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None, overwrite: bool = True
) -> int:
    """Write a patch file, whole or not at all, and return its bytes; missing folders are made.

    overwrite: as `save_promptnet` has it. Raises PromptNetError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, files.tensor_pieces(tensors, {"format": "pt", **(metadata or {})}), overwrite)
    except (OSError, ValueError) as problem:
        raise PromptNetError(
            f"The patch file '{path}' could not be saved: {files.why_not_written(problem)}"
        ) from problem
    return path.stat().st_size
