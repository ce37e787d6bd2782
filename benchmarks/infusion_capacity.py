"""What a capacity of the residual brings: `python -m benchmarks.infusion_capacity`, on Toybox.

Concepts are learned from the same pictures and masks in as many steps by Infusion with each capacity, as Residual
Trainer does it of itself (automatic, background held), and by the host's LoRA trainer at each rate; a host has to be
found for that. Of each way, over concepts, prompts and seeds, with 95 % intervals:

- way: likeness to the references, 0 for the plain picture's and 1 for theirs
- moved: how far the rest of the picture moved, as a share of what another seed moves it
- noun: how often the judge sees the noun
- W: the 2-Wasserstein distance of the class's latents ("a photo of a cat") from the plain model's, and how far the
  plain model's own are from those of other seeds, over concepts. What the concept's look takes of a class's variety is
  in it too
- bytes, and seconds of a training step; a LoRA in float16, a residual as the pack writes it
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import PLAIN, Infusion, Peer
from benchmarks.peers.lora import Lora
from benchmarks.results import plus_minus, table, write
from profusion.holding import HELD
from profusion.learning import Concept
from profusion.metrics import wasserstein_distance
from profusion.residual.training import TrainingOptions
from profusion.toybox import world
from profusion.toybox.concepts import DEMO_PROMPTS, drawn_concept
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import CUSTOMISED_GUIDANCE, Toybox, seeded
from profusion.toybox.scores import likeness_among
from profusion.toybox.similarity import background_change, concept_similarity

CLASS_SEED = 50_000
HEADS = {
    "way": "way",
    "moved": "moved",
    "noun": "noun right",
    "wasserstein": "W",
    "bytes": "bytes",
    "seconds": "s/step",
}


class HeldInfusion(Infusion):
    """Infusion with its background held."""

    @torch.no_grad()
    def generate(self, prompt: str, seeds: list[int], steps: int, guidance: float) -> Tensor:
        return self.toybox.generate_customised(
            prompt, [self.residual()], seeded(*seeds), steps, guidance, background=HELD
        )[1]


@dataclass
class Gathered:
    """Of one way: figures of each picture, and of each concept."""

    pictures: dict[str, list[Tensor]] = field(default_factory=dict)
    concepts: dict[str, list[float]] = field(default_factory=dict)

    def add(self, pictures: Mapping[str, Tensor], concept: Mapping[str, float]) -> None:
        for name, values in pictures.items():
            self.pictures.setdefault(name, []).append(values)
        for name, value in concept.items():
            self.concepts.setdefault(name, []).append(value)

    def figures(self) -> dict[str, list[float]]:
        """Means and half their 95 % intervals."""
        pictures = {name: interval(torch.cat(values)) for name, values in self.pictures.items()}
        return pictures | {name: interval(torch.tensor(values)) for name, values in self.concepts.items()}


def interval(values: Tensor) -> list[float]:
    """A mean and half its 95 % interval; 0 for a single value."""
    half = 1.96 * values.float().std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return [values.float().mean().item(), half]


def ways(
    capacities: Sequence[int], rates: Sequence[float], steps: int
) -> Iterator[tuple[str, type[Peer], TrainingOptions]]:
    """What is compared, by name: the peer and how it is trained."""
    for capacity in capacities:
        recipe = TrainingOptions(steps, learning_rate=0.0, stop_early=False, capacity=capacity)
        yield f"Infusion, capacity {capacity}", HeldInfusion, recipe
    if rates and Lora.why_unavailable():
        print(f"without LoRA: {Lora.why_unavailable()}", flush=True)
        return
    for rate in rates:
        yield f"LoRA at {rate:g}", Lora, TrainingOptions(steps, learning_rate=rate)


class Bench:
    """One concept's pictures by the plain model, which every way is compared with."""

    def __init__(self, toybox: Toybox, judge: Judge, concept: Concept, given: argparse.Namespace):
        self._toybox, self._judge, self._concept, self._given = toybox, judge, concept, given
        self._ceiling = likeness_among(concept.pictures, concept.masks)
        self._drawn: dict[int, Tensor] = {}
        plain = PLAIN(toybox, concept.noun)
        self._plain, self._others = self._pictures(plain), self._pictures(plain, others=1000)
        self._masks = judge.object_mask(self._plain)
        self._likeness = self._alike(self._plain, self._masks)
        self._unit = self._moved(self._others).mean()
        self._class = self._latents(plain)

    def _pictures(self, peer: Peer, others: int = 0) -> Tensor:
        given, parts = self._given, []
        seeds = [others + seed for seed in range(1, given.seeds + 1)]
        for prompt in DEMO_PROMPTS[: given.prompts]:
            latents = peer.generate(prompt.format(peer.phrase), seeds, given.sampling_steps, CUSTOMISED_GUIDANCE)
            parts.append(self._toybox.vae.pictures(latents))
        return torch.cat(parts)

    def _latents(self, peer: Peer, first: int = CLASS_SEED) -> Tensor:
        seeds = list(range(first, first + self._given.class_pictures))
        text = f"a photo of a {peer.phrase}"
        return torch.cat(
            [
                peer.generate(text, seeds[start : start + 8], self._given.sampling_steps, CUSTOMISED_GUIDANCE)
                for start in range(0, len(seeds), 8)
            ]
        )

    def _alike(self, pictures: Tensor, masks: Tensor) -> Tensor:
        return concept_similarity(pictures, masks, self._concept.pictures, self._concept.masks)

    def _moved(self, pictures: Tensor) -> Tensor:
        objects = torch.maximum(self._judge.object_mask(pictures), self._masks)
        return background_change(pictures, self._plain, objects)

    def figures(self, peer: Peer) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Of each picture, and of the concept."""
        pictures = self._pictures(peer)
        alike = self._alike(pictures, self._judge.object_mask(pictures))
        nouns = [seen == self._concept.noun for seen in self._judge.nouns(pictures)]
        distance = wasserstein_distance(self._class, self._latents(peer)).distance
        of_pictures = {
            "way": (alike - self._likeness) / (self._ceiling - self._likeness.mean()),
            "moved": self._moved(pictures) / self._unit,
            "noun": torch.tensor(nouns).float(),
        }
        return of_pictures, {"wasserstein": distance}

    def of_plain(self) -> dict[str, float]:
        """How far the class's latents are from the plain model's own of other seeds."""
        others = self._latents(PLAIN(self._toybox, self._concept.noun), CLASS_SEED + 5000)
        return {"wasserstein": wasserstein_distance(self._class, others).distance}


def report(gathered: Mapping[str, Gathered], concepts: int, pictures: int, steps: int) -> str:
    """In Markdown."""
    rows = []
    for name, of_way in gathered.items():
        figures = of_way.figures()
        cells = [plus_minus(figures[key], 2 if key == "seconds" else 3) if key in figures else "" for key in HEADS]
        rows.append([name, *cells])
        if "bytes" in figures:
            rows[-1][1 + list(HEADS).index("bytes")] = f"{figures['bytes'][0]:,.0f}"
    shown = table([f"{steps} steps", *HEADS.values()], rows)
    return f"{concepts} concepts, {pictures} pictures of each, held backgrounds for Infusion.\n\n{shown}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=list(world.CONCEPTS)[:8], choices=list(world.CONCEPTS))
    parser.add_argument("--capacities", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rates", nargs="*", type=float, default=list(Lora.rates), help="of LoRA")
    parser.add_argument("--steps", type=int, default=100, help="of the training, such as 100 or 300")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--class-pictures", type=int, default=32)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    toybox, judge = Toybox.load(), Judge.load()
    gathered: dict[str, Gathered] = {}
    for done, name in enumerate(given.concepts, start=1):
        concept = drawn_concept(name)
        bench = Bench(toybox, judge, concept, given)
        gathered.setdefault("plain, other seeds", Gathered()).add({}, bench.of_plain())
        for way, kind, recipe in ways(given.capacities, given.rates, given.steps):
            peer, started = kind(toybox, concept.noun), time.monotonic()
            for _ in peer.steps(concept, recipe):
                pass
            seconds = (time.monotonic() - started) / given.steps
            of_pictures, of_concept = bench.figures(peer)
            of_concept |= {"bytes": peer.size(), "seconds": seconds}
            gathered.setdefault(way, Gathered()).add(of_pictures, of_concept)
            found = {key: round(values.mean().item(), 3) for key, values in of_pictures.items()}
            print(f"{name}, {way}: {found}", flush=True)
        figures = {way: of_way.figures() for way, of_way in gathered.items()}
        shown = report(gathered, done, given.prompts * given.seeds * done, given.steps)
        write(given.out, vars(given), figures, shown)


if __name__ == "__main__":
    main()
