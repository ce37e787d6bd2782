"""A training step of Residual Trainer beside one of ComfyUI's own LoRA trainer: `python -m benchmarks.trainer_cost`.

Both train the host's model in one process, in turns, on the same latents, one thread; medians, and the median of the
ratios of a round. Memory: the most that torch's tensors hold in a step beyond what was there before both, counted in
further steps. A step is the optimizer's. The host's trainer takes one picture at a time, so that more are rounds
whose gradients add up. With `--model sd15`, Stable Diffusion 1.5's UNet in its real size with random weights.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.host_cost import load_pack
from benchmarks.peers.lora import host_nodes, train_lora
from benchmarks.results import table, write
from benchmarks.timing import CLOCKS, interleaved
from profusion.coroutine import Coroutine
from profusion.models.configs import SD15
from profusion.pretraining.peak import PeakMemory
from profusion.residual.training import NOUN_PROMPTS, TrainingOptions
from tools.hosts import needed_host

OURS, THEIRS = "Residual Trainer", "LoRA, the host's trainer"
STEPS = 10**6  # more than are made
NOUN, NOUN_ROWS = "mushroom", (5,)


def sd15() -> object:
    """A MODEL of Stable Diffusion 1.5's UNet in the host's own class, with random weights."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(load_pack(needed_host()).nodes.host.toybox.unet_config(SD15))
    config.set_inference_dtype(torch.float32, None)
    network, generator = config.get_model({}, "", torch.device("cpu")).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.diffusion_model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(float(name.endswith("weight")))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(network, load_device=cpu, offload_device=cpu)


def material(model: str, cells: int | None) -> tuple[object, list[list], Tensor]:
    """A MODEL, a CONDITIONING for each training prompt, and latents (4, 4, cells, cells)."""
    host, generator = host_nodes(), torch.Generator().manual_seed(0)
    if model == "toybox":
        texts = [prompt.format(NOUN) for prompt in NOUN_PROMPTS]
        prompts = [host.clip.encode_from_tokens_scheduled(host.clip.tokenize(text)) for text in texts]
        return host.load_model(), prompts, torch.randn(4, 4, cells or 16, cells or 16, generator=generator)
    prompts = [[[torch.randn(1, 77, SD15.context_dim, generator=generator), {}]] for _ in NOUN_PROMPTS]
    return sd15(), prompts, torch.randn(4, 4, cells or 32, cells or 32, generator=generator)


@dataclass(frozen=True)
class Task:
    """What both trainers are given. rate: 0 is automatic, and 0.01 for the LoRA. within: where a training runs."""

    model: Any
    prompts: list[list]
    latents: Tensor
    batch: int
    rate: float
    within: AbstractContextManager = field(default_factory=nullcontext)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, *self.latents.shape[1:]


def residual_steps(task: Task) -> Iterator:
    """Residual Trainer's own training, an optimizer's step at a time."""
    pack, latents, prompts = load_pack(needed_host()), task.latents, task.prompts
    host, training = pack.nodes.host, pack.profusion.residual.training
    layers = host.families.model_layers(task.model)
    masks = torch.zeros(latents.shape[0], *latents.shape[2:])
    masks[:, 2:-2, 2:-2] = 1.0
    references = [training.Reference(latent, mask) for latent, mask in zip(latents, masks, strict=True)]
    budget = host.budget.plan_training(task.model, task.shape, "off")
    trained = host.evaluation.TrainedModel(task.model, prompts, memory=budget.step)
    one = training.ResidualTraining(
        trained.predict_noise,
        references,
        [NOUN_ROWS] * len(prompts),
        layers,
        NOUN,
        training.TrainingOptions(STEPS, task.rate, task.batch, flip=False),
        sigmas=trained.sigmas,
        queries=budget.queries,
    )

    def run(ask: Callable) -> None:
        trained.run(lambda: [ask(loss) for loss in one.steps()], task.shape)

    return _asked(run, task.within)


def lora_steps(task: Task) -> Iterator:
    """The host's training of a LoRA, an optimizer's step at a time."""
    nodes = SimpleNamespace(trainer=host_nodes().trainer, load_model=task.model.clone)
    positive = [task.prompts[index % len(task.prompts)][0] for index in range(len(task.latents))]
    recipe = TrainingOptions(STEPS, task.rate or 0.01, task.batch)
    return _asked(lambda ask: train_lora(nodes, task.latents, positive, recipe, ask), task.within)


def _asked(run: Callable[[Callable], None], within: AbstractContextManager) -> Iterator:
    """What a function asks, once each time; it runs in a thread of its own, `within` of which is entered there."""

    def entered(ask: Callable) -> None:
        with within:
            run(ask)

    return Coroutine(entered).questions()


TRAININGS = {OURS: residual_steps, THEIRS: lora_steps}


def measure(task: Task, rounds: int, clock: str = "wall") -> dict[str, dict[str, float]]:
    """Seconds and bytes of a step of each, and what ours is of theirs."""
    peaks = {name: peak_bytes(steps, task) for name, steps in TRAININGS.items()}
    running = {name: steps(task) for name, steps in TRAININGS.items()}
    times = interleaved({name: partial(next, steps) for name, steps in running.items()}, rounds, clock)
    for steps in running.values():
        steps.close()
    of_theirs = [own / other for own, other in zip(times[OURS], times[THEIRS], strict=True)]
    shares = {OURS: (statistics.median(of_theirs), peaks[OURS] / peaks[THEIRS]), THEIRS: (1.0, 1.0)}
    return {
        name: {
            "seconds_a_step": round(statistics.median(times[name]), 4),
            "seconds_of_theirs": round(shares[name][0], 3),
            "peak_bytes": peaks[name],
            "bytes_of_theirs": round(shares[name][1], 3),
        }
        for name in running
    }


def peak_bytes(training: Callable[[Task], Iterator], task: Task) -> int:
    """What tensors hold at most in the first two steps of a training, beyond what was there before it."""
    gc.collect()
    counted = PeakMemory(_living())
    before, counted.peak = counted.bytes, counted.bytes
    steps = training(replace(task, within=counted))
    next(steps)
    next(steps)
    steps.close()
    return counted.peak - before


def _living() -> list[Tensor]:
    """All tensors that there are."""
    return [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("toybox", "sd15"), default="toybox")
    parser.add_argument("--cells", type=int, default=None, help="of a latent's side (default: 16, or 32 for sd15)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.0, help="learning rate; 0 is automatic, and 0.01 for the LoRA")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, beside others")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here, and a table beside them")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(Task(*material(given.model, given.cells), given.batch, given.rate), given.rounds, given.clock)
    rows = [
        [
            name,
            f"{one['seconds_a_step']:.3f}",
            f"{one['seconds_of_theirs']:.2f}",
            f"{one['peak_bytes'] / 1e6:.0f}",
            f"{one['bytes_of_theirs']:.2f}",
        ]
        for name, one in found.items()
    ]
    heads = (f"{given.model}, batch {given.batch}", "s a step", "of the LoRA's", "MB at most", "of the LoRA's")
    write(given.json, {**vars(given), "threads": 1}, found, table(heads, rows))


if __name__ == "__main__":
    main()
