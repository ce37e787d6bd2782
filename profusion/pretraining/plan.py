"""What a training will take, before anything runs: memory of each card, days, and their price.

Memory and operations are not guessed: one step of the very networks, in their real sizes, is made on torch's fake
tensors, which have shapes and no contents, and what would be allocated is counted. Only how fast a card is in practice
is an assumption, which `share` states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..diffusion import training_sigmas
from ..models.conditioning import TextTowers
from ..models.configs import TextConfig, UNetConfig, VAEConfig, VisionConfig
from ..models.unet import UNet
from ..models.vae import VAE
from ..promptnet.network import PromptNet, PromptNetConfig
from ..stable_diffusion import StableDiffusion
from .encoding import Encoders
from .engine import Engine, PretrainingOptions, rounds
from .objective import Objective
from .peak import PeakMemory, tensors_of
from .ranks import Ranks

GIB = 1 << 30
ALLOWANCE = 0.1  # of what tensors take, for gaps and workspaces, beside
CONTEXT = 0.6 * GIB  # what a driver takes before anything is allocated
SHARE = 0.35  # of a card's dense bfloat16 products that such networks reach; measure yours and give --samples-a-second


@dataclass(frozen=True)
class Card:
    """A kind of card: GiB of memory, and 10^12 dense bfloat16 operations a second (float32 accumulation)."""

    name: str
    memory: float
    speed: float


CARDS = {
    card.name: card
    for card in (
        Card("rtx3090", 24, 71),
        Card("rtx4090", 24, 165),
        Card("rtx5090", 32, 210),
        Card("l40s", 48, 362),
        Card("a100-40", 40, 312),
        Card("a100-80", 80, 312),
        Card("h100", 80, 989),
        Card("h200", 141, 989),
    )
}


@dataclass(frozen=True)
class Sizes:
    """What a plan is made of: the sizes of the base's networks, of the image tower and of the PromptNet between them,
    and the pictures' side in pixels."""

    unet: UNetConfig
    vae: VAEConfig
    towers: tuple[TextConfig, ...]
    vision: VisionConfig
    config: PromptNetConfig
    size: int


@dataclass(frozen=True)
class Need:
    """Bytes of one card and operations of one row. parameters: how many numbers learn. held: what stays from step to
    step. step and encoding: the most while a step is made, and while its pictures are encoded."""

    parameters: int
    held: int
    step: int
    encoding: int
    operations: float
    encoding_operations: float

    @property
    def card(self) -> float:
        """What a card should have, in bytes."""
        return CONTEXT + (1 + ALLOWANCE) * max(self.step, self.encoding)


def need(
    sizes: Sizes,
    options: PretrainingOptions,
    world: int = 1,
    bfloat16: bool = True,
    checkpointing: bool = False,
    shard: bool = False,
    encode: bool = True,
) -> Need:
    """Measure a step of one process among `world` on fake tensors. encode: whether pictures are encoded in each step
    too, on the same card."""
    training_sigmas()  # what it keeps for later calls is to be real
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    turns = rounds(options, world)
    micro = options.batch_size // world // turns
    kind = torch.bfloat16 if bfloat16 else torch.float32
    with mode:
        base = _base(sizes, kind)
        network = PromptNet(sizes.config)
        vision = _made(_vision, sizes.vision, kind) if encode else None
    objective = Objective(network, base, options.prompts, options.weight_cap, bfloat16)  # tokenises, in earnest
    with mode:
        engine = Engine(objective, options, Ranks(), checkpointing=checkpointing)
        cells = sizes.size // base.cell
        latents = torch.zeros(micro, sizes.config.unet.in_channels, cells, cells)
        image_tokens = torch.zeros(micro, sizes.vision.tokens, sizes.vision.width)
        noise, sigma = torch.zeros_like(latents), torch.ones(micro)
        frozen = [base.unet, *base.towers] + ([base.vae, vision] if vision is not None else [])
        average = list(engine.average.values()) if engine.average else []

        def evaluate() -> None:
            with engine._twice():
                loss = objective(latents, image_tokens, noise, sigma, 0)
            loss.backward()

        with PeakMemory([*tensors_of(*frozen, network), *average]) as memory:
            evaluate()
            engine._optimizer.step()  # makes the moments
            engine._optimizer.zero_grad()
            held = memory.bytes
            memory.reset()
            for _ in range(min(2, turns)):  # in later ones there is a gradient already
                evaluate()
            step = memory.peak
            engine._optimizer.zero_grad()
            memory.reset()
            if vision is not None:
                encoders = Encoders(base.vae, vision)
                pictures = torch.zeros(min(micro, 8), sizes.size, sizes.size, 3, dtype=torch.uint8)
                encoders.features(pictures)
            encoding = memory.peak
        with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
            evaluate()
        encoding_operations = 0.0
        if vision is not None:
            with FlopCounterMode(display=False) as of_encoders, sdpa_kernel(SDPBackend.MATH):
                encoders.features(pictures)
            encoding_operations = of_encoders.get_total_flops() / len(pictures)
        learned = sum(value.numel() for value in network.parameters())
    if shard and world > 1:
        spared = int(learned * 4 * (4 + bool(average)) * (1 - 1 / world))  # weights, gradients, two moments, average
        held, step, encoding = held - int(spared * 3 / 4), step - spared, encoding - int(spared * 3 / 4)
    return Need(learned, held, step, encoding, counted.get_total_flops() / micro, encoding_operations)


def _base(sizes: Sizes, kind: torch.dtype) -> StableDiffusion:
    from ..models.clip import TextModel  # with transformers, which the pack does not wait for

    unet, vae = _made(UNet, sizes.unet, kind), _made(VAE, sizes.vae, kind)
    towers = tuple(_made(TextModel, tower, kind) for tower in sizes.towers)
    return StableDiffusion(unet, vae, TextTowers(towers), "eps", sizes.size, sizes.config.architecture)


def _vision(config: VisionConfig) -> nn.Module:
    from ..models.clip import VisionModel

    return VisionModel(config)


def _made(network: type, config: object, kind: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)  # a fake network cannot be cast afterwards
    try:
        return network(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def report(
    needed: Need,
    options: PretrainingOptions,
    cards: Sequence[Card],
    world: int,
    samples_a_second: float | None = None,
    price: float | None = None,
) -> str:
    """The plan in words, one line for each kind of card. price: of an hour of one card, in any currency."""
    rows = options.batch_size * options.steps
    lines = [
        f"{needed.parameters / 1e6:.0f} million numbers learn; {options.steps} steps of {options.batch_size} rows are "
        f"{rows:,} pictures seen",
        f"each of {world} cards: {needed.held / GIB:.1f} GiB held, {needed.step / GIB:.1f} GiB in a step, "
        f"{needed.encoding / GIB:.1f} GiB while pictures are encoded; with the driver and gaps about "
        f"{needed.card / GIB:.1f} GiB",
        f"a row takes {needed.operations / 1e12:.1f} x 10^12 operations, and "
        f"{needed.encoding_operations / 1e12:.1f} x 10^12 to encode its picture",
    ]
    for card in cards:
        fits = "fits" if needed.card <= card.memory * GIB else "DOES NOT FIT"
        speed = samples_a_second or card.speed * 1e12 * SHARE / (needed.operations + needed.encoding_operations) * world
        hours = rows / speed / 3600
        cost = "" if price is None else f", {hours * world * price:,.0f} at {price:g} a card and hour"
        lines.append(
            f"{world} x {card.name} ({card.memory:g} GiB): {fits}; about {speed:,.1f} pictures a second, "
            f"{hours / 24:.1f} days, {hours * world:,.0f} card hours{cost}"
        )
    if samples_a_second is None:
        lines.append(
            f"speed assumes {SHARE:.0%} of a card's bfloat16 products and data that keeps up; measure a hundred steps "
            "and give --samples-a-second"
        )
    return "\n".join(lines)
