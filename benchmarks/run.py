"""Everything that README and docs claim, measured again: `make bench`, or `python -m benchmarks.run [--setting quick|full]`.

Each result is a file in the work folder, so that a run that was stopped goes on where it was. In order: every peer's learning
rate and guidance are searched on two concepts; then it is trained on the others, and judged; then the parts that are not about
peers run, one after the other, in processes of their own. Jobs use one thread each, and there is one for each processor:
nothing depends on how many there are but the seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

from benchmarks.fusion_ablation import SHIPPED
from benchmarks.jobs import Job, Runner, file_name
from benchmarks.judging import PROMPTS, Yardstick
from benchmarks.overfitting import Overfitting
from benchmarks.peers import PEERS, PLAIN, Peer
from benchmarks.report import write_report
from profusion.demo import Concept, drawn_concept
from profusion.pictures import grid
from profusion.toybox import world
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import Toybox
from profusion.training import TrainingOptions

ROOT = Path(__file__).resolve().parents[1]
TUNING = ("slate and apricot mushroom", "gold and navy cup")  # the first is the demo's, on which Infusion was developed
TABLE = tuple(name for name in world.CONCEPTS if name not in TUNING)
GUIDANCES = (2.0, 4.0)


@dataclass(frozen=True)
class Setting:
    """How much is done. checkpoints: training steps of the overfitting curves, of the first `curve_concepts`."""

    training_steps: int = 150
    sampling_steps: int = 15
    concepts: int = 8
    prompts: int = 8
    seeds: int = 4
    tuning_seeds: int = 2
    rates: int = 3
    curve_concepts: int = 1
    checkpoints: tuple[int, ...] = (50, 150, 400, 800)
    class_pictures: int = 48
    fisher_draws: int = 4


SETTINGS = {
    "quick": Setting(),
    "full": Setting(
        training_steps=400, sampling_steps=25, curve_concepts=4, checkpoints=(50, 100, 200, 500, 1000, 2000), class_pictures=128,
        fisher_draws=16,
    ),
    "tiny": Setting(2, 2, 1, 1, 1, 1, 1, 1, (1, 2), 2, 1),
}  # fmt: skip


@lru_cache(maxsize=1)
def _studio() -> tuple[Toybox, Judge, Yardstick]:
    toybox, judge = Toybox.load(), Judge.load()
    return toybox, judge, Yardstick(toybox, judge)


def stops(losses: Iterable[float], marks: Iterable[int]) -> Iterator[int]:
    """Train, stopping after each of these steps."""
    for step, _ in enumerate(losses, start=1):
        if step in marks:
            yield step


def judged(peer: Peer, concept: Concept, setting: Setting, seeds: int, guidance: float) -> tuple[list[dict], list]:
    """Figures of every picture, and the first picture of each prompt."""
    toybox, _, yardstick = _studio()
    figures, first = [], []
    for index, prompt in enumerate(PROMPTS[: setting.prompts]):
        chosen = [1000 * index + seed for seed in range(1, seeds + 1)]
        latents = peer.generate(prompt.text.format(peer.phrase), chosen, setting.sampling_steps, guidance)
        pictures = toybox.vae.pictures(latents)
        first.append(pictures[0])
        for seed, found in zip(chosen, yardstick.figures(concept, prompt, pictures), strict=True):
            figures.append({"prompt": prompt.text, "seed": seed, **found})
    return figures, first


def tune(kind: type[Peer], rate: float, setting: Setting) -> dict:
    """One trial: a learning rate, judged under every guidance on the concepts that the table leaves out."""
    scores: dict[float, list[float]] = {guidance: [] for guidance in GUIDANCES}
    for name in TUNING:
        concept = drawn_concept(name)
        peer = kind(_studio()[0], concept.noun)
        if rate:
            for _ in peer.steps(concept, TrainingOptions(setting.training_steps, rate)):
                pass
        for guidance, kept in scores.items():
            figures, _ = judged(peer, concept, setting, setting.tuning_seeds, guidance)
            kept += [picture["score"] for picture in figures]
    return {"peer": kind.name, "rate": rate, "scores": {str(g): sum(kept) / len(kept) for g, kept in scores.items()}}


def best(trials: Iterable[dict]) -> tuple[float, float]:
    """The learning rate and guidance of the highest score; of equal ones the first."""
    scored = [(score, trial["rate"], float(g)) for trial in trials for g, score in trial["scores"].items()]
    return max(scored, key=lambda one: one[0])[1:]


def final(kind: type[Peer], name: str, rate: float, guidance: float, setting: Setting, strip: Path) -> dict:
    """A peer on one concept: figures of its pictures, and for the first concepts the overfitting curves."""
    toybox, concept = _studio()[0], drawn_concept(name)
    peer = kind(toybox, concept.noun)
    marks, curve, figures = {setting.training_steps}, [], []
    overfitting = None
    if rate and TABLE.index(name) < setting.curve_concepts:
        marks |= set(setting.checkpoints)
        overfitting = Overfitting(
            toybox, concept.noun, setting.fisher_draws, setting.class_pictures, setting.sampling_steps, guidance
        )
    training = stops(peer.steps(concept, TrainingOptions(max(marks), rate)), marks) if rate else [setting.training_steps]
    for step in training:
        if step == setting.training_steps:
            figures, first = judged(peer, concept, setting, setting.seeds, guidance)
            grid([(kind.name, first)]).save(strip)
        if overfitting is not None:
            curve.append({"steps": step, **overfitting.measure(peer)})
    numbers = sum(value.numel() for value in peer.trained().values())
    return {
        "peer": kind.name, "concept": name, "rate": rate, "guidance": guidance, "numbers": numbers,
        "bytes": peer.size() if numbers else 0, "strip": strip.name, "pictures": figures, "curve": curve,
    }  # fmt: skip


@dataclass
class Bench:
    """The peers' part, in a work folder, by so many processes (0: this one)."""

    setting: Setting
    work: Path
    workers: int
    kinds: tuple[type[Peer], ...] = (*PEERS, PLAIN)
    say: Callable[[str], None] = partial(print, flush=True)

    def run(self, jobs: list[Job]) -> list[dict]:
        """See `Runner`."""
        return Runner(asdict(self.setting), self.workers, self.say).run(jobs)

    def peers(self) -> dict:
        """Every peer that can run here: its trials and its results; and why others cannot."""
        absent = {kind.name: why for kind in self.kinds if (why := kind.why_unavailable())}
        for name, why in absent.items():
            self.say(f"SKIPPED {name}: {why}")
        kinds = [kind for kind in self.kinds if kind.name not in absent]
        trials = self.run([
            Job(self._path("tune", kind.name, str(rate)), partial(tune, kind, rate, self.setting), f"try {kind.name} at {rate:g}")
            for kind in kinds
            for rate in (kind.rates[: self.setting.rates] or (0.0,))
        ])  # fmt: skip
        jobs = []
        for name in TABLE[: self.setting.concepts]:
            for kind in kinds:
                rate, guidance = best(trial for trial in trials if trial["peer"] == kind.name)
                path = self._path("final", kind.name, name, f"{rate:g}_{guidance:g}")  # anew where another rate is the best
                work = partial(final, kind, name, rate, guidance, self.setting, path.with_suffix(".png"))
                jobs.append(Job(path, work, f"{kind.name}: {name}"))
        return {"absent": absent, "trials": trials, "finals": self.run(jobs)}

    def _path(self, *words: str) -> Path:
        return self.work / file_name(*words)


@dataclass(frozen=True)
class Part:
    """A benchmark with a command of its own, which writes the JSON that --json names, and may write more beside it.

    why_not: empty where it can run. long: left to the full setting.
    """

    name: str
    arguments: tuple[str, ...]
    why_not: Callable[[], str] = str
    long: bool = False

    def run(self, work: Path, out: Path, say: Callable[[str], None]) -> None:
        """Run it unless its result is in the work folder, and copy what it wrote: its JSON and what has the same stem."""
        target = work.resolve() / f"{self.name}.json"
        if why := self.why_not():
            say(f"SKIPPED {self.name}: {why}")
            return
        if not target.is_file():
            say(f"{self.name}: {' '.join(self.arguments)}")
            work.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, "-m", *self.arguments, "--json", str(target)], cwd=ROOT, check=True)
        for path in target.parent.glob(f"{self.name}.*"):
            if path.suffix in (".json", ".md", ".png"):
                shutil.copy(path, out)


def _why_no_promptnet() -> str:
    return "" if SHIPPED.is_file() else f"Toybox's PromptNet is not there: {SHIPPED}"


PARTS = (
    Part("mixtures", ("benchmarks.mixtures",)),
    Part("peer_cost", ("benchmarks.peer_cost",)),
    Part("fusion_ablation", ("benchmarks.fusion_ablation",), _why_no_promptnet),
    Part("fusion_tradeoff", ("benchmarks.fusion_tradeoff",), _why_no_promptnet, long=True),
    Part("image_prompt", ("benchmarks.image_prompt",), long=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="quick")
    parser.add_argument("--work", type=Path, help="where unfinished work is kept (default: bench-work/SETTING)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", choices=["peers", *(part.name for part in PARTS)], help="leave the others out")
    given = parser.parse_args()
    work = given.work or ROOT / "bench-work" / given.setting
    given.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(SETTINGS[given.setting], work, given.workers)
    if not given.only or "peers" in given.only:
        write_report(bench.peers(), given.setting, asdict(bench.setting), work, given.out)
    for part in PARTS:
        if part.name in given.only if given.only else given.setting == "full" or not part.long:
            part.run(work, given.out, bench.say)
    bench.say(f"done in {(time.monotonic() - bench.started) / 60:.1f} min: {given.out}")


if __name__ == "__main__":
    main()
