"""LoRA by ComfyUI's own trainer (comfy_extras/nodes_train.py) and its own loader; only where a host is found."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import lru_cache
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.host_cost import load_pack
from benchmarks.peers.base import RARE_WORD, Peer
from profusion.coroutine import Coroutine
from profusion.learning import Concept
from profusion.residual.training import NOUN_PROMPTS, TrainingOptions
from tools.hosts import SOUGHT, find_host, needed_host

RANK = 8


@lru_cache(maxsize=1)
def host_nodes() -> SimpleNamespace:
    """The host's nodes, and Toybox in its classes: a model to train on, and one to put LoRAs on meanwhile."""
    models = load_pack(needed_host()).nodes.host.toybox
    import comfy.sd
    import comfy.utils
    from comfy_extras.nodes_train import LoraModelLoader, TrainLoraNode

    comfy.utils.PROGRESS_BAR_ENABLED = False
    return SimpleNamespace(
        trainer=TrainLoraNode,
        loader=LoraModelLoader,
        clip=models.load_clip(),
        load_model=models.load_model,
        merged_into=models.load_model(),
    )


class Lora(Peer):
    """Low rank on every layer as the host's trainer does it: biases and norms too, its own draws and loss, no mask.

    Its batches are pictures one by one whose gradients add up: given four at once, the host evaluates
    every caption on every picture.
    """

    name = "LoRA, the host's trainer"
    rates = (3e-3, 1e-2, 3e-2)
    note = (
        f"rank {RANK} by ComfyUI's Train LoRA and Load LoRA, '{RARE_WORD}' before the noun; its own draws and loss, "
        "no mask"
    )

    def __init__(self, toybox, noun):
        super().__init__(toybox, noun)
        self.phrase = f"{RARE_WORD} {noun}"
        self._lora: dict[str, Tensor] = {}
        self._merged: nn.Module | None = None

    @classmethod
    def why_unavailable(cls) -> str:
        return "" if find_host() else f"no ComfyUI {SOUGHT}, and it is trained by that"

    def trained(self) -> dict[str, Tensor]:
        return self._lora

    @property
    def unet(self) -> nn.Module:
        """The kernel's UNet with the weights that the host's loader makes of what has been learned."""
        if self._merged is None:
            self._merged = _with_lora(self.toybox.unet, self._lora)
        return self._merged

    def steps(self, concept: Concept, recipe: TrainingOptions) -> Iterator[float]:
        host = host_nodes()
        pictures = torch.cat([concept.pictures, concept.pictures.flip(2)]) if recipe.flip else concept.pictures
        latents = self.toybox.vae.encode(pictures.movedim(-1, 1) * 2 - 1)
        captions = [NOUN_PROMPTS[index % len(NOUN_PROMPTS)].format(self.phrase) for index in range(len(latents))]
        positive = [
            entry for text in captions for entry in host.clip.encode_from_tokens_scheduled(host.clip.tokenize(text))
        ]
        training = Coroutine(lambda ask: train_lora(host, latents, positive, recipe, ask))
        with closing(training.questions()) as learned:
            for lora in learned:
                self._lora, self._merged = lora, None
                yield math.nan  # the host keeps its losses to itself until the end


def train_lora(host: SimpleNamespace, latents: Tensor, positive: list, recipe: TrainingOptions, ask: Callable) -> None:
    """The host's training, which stops after every optimizer step to `ask` with the LoRA's tensors as they are then."""

    def optimizer(parameters, lr: float) -> torch.optim.Optimizer:
        replaced.stop()
        names = parameters.mapping  # the trainer gives its dictionary's values

        class Stopping(adamw):
            def step(self, closure=None):
                super().step(closure)
                ask(dict(names))

        return Stopping(parameters, lr=lr)

    adamw = torch.optim.AdamW
    replaced = patch.object(torch.optim, "AdamW", optimizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # the host draws its starting weights, its pictures and its timesteps globally
        replaced.start()
        _call(
            host.trainer,
            model=host.load_model(),
            latents={"samples": latents},
            positive=positive,
            batch_size=1,
            grad_accumulation_steps=recipe.batch_size,
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            rank=RANK,
            optimizer="AdamW",
            loss_function="MSE",
            seed=recipe.seed,
            training_dtype="fp32",
            lora_dtype="fp32",
            algorithm="LoRA",
            gradient_checkpointing=False,
            existing_lora="[None]",
            # what newer hosts ask beside that
            quantized_backward=False,
            checkpoint_depth=1,
            offloading=False,
            bucket_mode=False,
            bypass_mode=False,
        )


def _call(node: type, **inputs: object) -> tuple:
    """A node's outputs. Hosts differ in how they write it, and in which of the inputs theirs takes."""
    newer = hasattr(node, "define_schema")
    function = node.execute if newer else getattr(node(), node.FUNCTION)
    takes = inspect.signature(function).parameters
    given = {name: value for name, value in inputs.items() if name in takes}
    if not newer:
        return function(**given)
    as_lists = node.GET_SCHEMA().is_input_list
    return function(**{name: [value] for name, value in given.items()} if as_lists else given).args


def merged(model, lora: dict[str, Tensor]):
    """A MODEL of the host with the LoRA on it, by its loader."""
    (patched,) = _call(host_nodes().loader, model=model, lora=lora, strength_model=1.0)
    return patched


def _with_lora(unet: nn.Module, lora: dict[str, Tensor]) -> nn.Module:
    """A copy of the kernel's UNet with the weights that the host's loader gives its own."""
    changed = copy.deepcopy(unet)
    if lora:
        tensors = {name: tensor.detach().clone() for name, tensor in lora.items()}
        model = merged(host_nodes().merged_into, tensors)
        prefix = "diffusion_model."
        for key in model.patches:
            model.patch_weight_to_device(key)
        weights = {
            key.removeprefix(prefix): value for key, value in model.model.state_dict().items() if key.startswith(prefix)
        }
        changed.load_state_dict({key: value.detach().clone() for key, value in weights.items()})
        model.unpatch_model()
    return changed.requires_grad_(False)
