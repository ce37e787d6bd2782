"""What a training takes of the device's memory, reckoned before it begins, and what to
change where that is too much."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...profusion.infusion import QueryStore, UnsupportedModelError, architecture_name, cross_attention_layers
from ...profusion.loop import TrainingError
from ...profusion.memory import element_bytes, optimizer_bytes, step_bytes, text_bytes
from ...profusion.queries import TakenOnce, WaitingQueries

CHECKPOINTING = ("auto", "on", "off")
ADAMW_BYTES = 16  # a trained float32 number, its gradient and the optimizer's two moments

# What a step of a model that was not measured needs, in multiples of what the host reckons for inference: without and
# with gradient checkpointing. SD 1.5's are 90,000 and 30,000 numbers a latent cell, where the host reckons 10,500.
_MULTIPLES = 12, 5
_OF_A_DETAIL = 0.3  # of that, for each; SDXL's first one takes as much, others less


@dataclass(frozen=True)
class Budget:
    """Of one training: the bytes of a step beside the models' weights, and whether gradient
    checkpointing makes it so."""

    step: float
    checkpointing: bool

    def queries(self) -> QueryStore:
        """Where F's queries wait in a step. What is computed again on the way back asks for them twice."""
        return WaitingQueries() if self.checkpointing else TakenOnce()


def plan_training(
    model: ModelPatcher,
    shape: Sequence[int],
    checkpointing: str,
    beside: Sequence[ModelPatcher] = (),
    learned: float = 0,
    finetuning: bool = False,
    any_size: bool = True,
    capacity: int = 1,
) -> Budget:
    """Decide on gradient checkpointing ("auto": where there is no room without) for latents (B, C, H, W) of this shape.

    beside: text encoders that must be on the device too. learned: bytes of what is trained, its optimizer included.
    finetuning: whether PromptNet and the attention layers learn, and not a residual. any_size: whether pictures may be
    smaller. capacity: of a residual. Raises TrainingError, which names
    the input to change, where a step does not fit.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"gradient_checkpointing={checkpointing!r}: choose one of {', '.join(CHECKPOINTING)}")
    room, sizes = _memory_of(model.load_device), [_size_of(part) for part in (model, *beside)]
    weights = sum(size for _, size in sizes)

    def step(shape: Sequence[int], twice: bool) -> float:
        texts = sum(text_bytes(*size, shape[0]) for size in sizes[1:]) if finetuning else 0.0
        there_and_back = _step_bytes(model, shape, twice, finetuning, capacity) + texts
        return max(there_and_back, optimizer_bytes(learned)) + learned

    def fits(shape: Sequence[int], twice: bool) -> bool:
        return weights + step(shape, twice) <= room

    twice = checkpointing == "on" or (checkpointing == "auto" and not fits(shape, False))
    if not fits(shape, twice):
        raise TrainingError(
            f"training on {shape[0]} pictures of {shape[-1]}x{shape[-2]} latent cells at a time takes about "
            f"{(weights + step(shape, twice)) / 1e9:.1f} GB, and this GPU has {room / 1e9:.1f} GB for it. "
            f"{_advice(shape, twice, fits, any_size)}"
        )
    return Budget(step(shape, twice), twice)


def make_room(size: float, device: torch.device) -> None:
    """Have the host unload models until so many bytes of a device are free, as it does before it loads one."""
    if not comfy.model_management.is_device_cpu(device):
        comfy.model_management.free_memory(size, device)


def _memory_of(device: torch.device) -> float:
    """Bytes of a device that models may take; not reckoned with: the main memory, and DirectML, which does not tell."""
    management = comfy.model_management
    if management.is_device_cpu(device) or management.directml_enabled:
        return math.inf
    return management.get_total_memory(device) - management.extra_reserved_memory()


def _size_of(model: ModelPatcher) -> tuple[int, int]:
    """A model's parameters, and their bytes as it computes with them, which may be in another type than their file."""
    count = kept = 0
    for part in model.model.modules():
        for name, weight in part.named_parameters(recurse=False):
            count += weight.numel()
            kept += weight.numel() * (getattr(part, f"{name}_comfy_model_dtype", None) or weight.dtype).itemsize
    return count, kept


def _step_bytes(
    model: ModelPatcher, shape: Sequence[int], checkpointing: bool, finetuning: bool, capacity: int
) -> float:
    network = model.get_model_object("diffusion_model")
    try:
        architecture = architecture_name(cross_attention_layers(dict(network.named_parameters())))
    except UnsupportedModelError:
        architecture = ""  # a transformer, of which nothing was measured
    cells, element = math.prod(shape[2:]), element_bytes(model.model)
    measured = step_bytes(architecture, shape[0], cells, element, checkpointing, finetuning, capacity)
    if measured is not None:
        return measured
    details = 1 + _OF_A_DETAIL * (capacity - 1)
    return model.memory_required(list(shape)) * _MULTIPLES[checkpointing] * details * (2 if finetuning else 1)


def _advice(
    shape: Sequence[int], checkpointing: bool, fits: Callable[[Sequence[int], bool], bool], any_size: bool
) -> str:
    """What to change, so that a step fits."""
    if not checkpointing and fits(shape, True):
        return "Set gradient_checkpointing to auto"
    more = "" if checkpointing else " and gradient_checkpointing to auto"
    batch = next((count for count in range(shape[0] - 1, 0, -1) if fits((count, *shape[1:]), True)), None)
    if batch:
        return f"Set batch_size to {batch}{more}"
    sizes = (tuple(max(1, side * share // 10) for side in shape[2:]) for share in range(9 * any_size, 0, -1))
    size = next((size for size in sizes if fits((1, shape[1], *size), True)), None)
    if size:
        return (
            f"Set batch_size to 1{more}, and give smaller pictures: {size[1] / shape[-1]:.0%} of this width and height"
        )
    return "It is too little for the model and what is trained: use a smaller model, or one in float16"
