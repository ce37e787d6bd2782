"""Everything that README and docs claim, measured again: `make bench`, or `python -m
benchmarks.run [--setting quick|full]`.

Each result is a file in the work folder, so that a run that was stopped goes on where it was. In order: every peer's
learning rate and guidance are searched on two concepts; it is trained on the others, and judged; it is trained on, and
how far it overfits is measured on the way; then the parts that are not about peers run in processes of their own. Jobs
use one thread each, and there is one for each processor: nothing depends on how many there are but the seconds. At the
end README.md and docs/evidence.md have the new tables.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

from torch import Tensor

from benchmarks.jobs import Job, Runner, file_name
from benchmarks.judging import PEER_PROMPTS, Yardstick
from benchmarks.overfitting import Overfitting
from benchmarks.peers import PEERS, PLAIN, Peer
from benchmarks.peers.lora import Lora
from benchmarks.report import write_curves, write_peers
from benchmarks.results import RESULTS, ROOT, include
from profusion.learning import Concept
from profusion.pictures import grid
from profusion.residual.training import TrainingOptions
from profusion.toybox import world
from profusion.toybox.concepts import drawn_concept
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import Toybox
from tools.hosts import SOUGHT, find_host

TUNING = ("slate and apricot mushroom", "gold and navy cup")  # the first is the demo's, on which Infusion was developed
TABLE = tuple(name for name in world.CONCEPTS if name not in TUNING)
GUIDANCES = (2.0, 4.0)


@dataclass(frozen=True)
class CurveSetting:
    """Overfitting of the first so many concepts, measured at these training steps: see `Overfitting`."""

    checkpoints: tuple[int, ...] = (50, 100, 200, 400)
    concepts: int = 1
    sampling_steps: int = 12
    class_pictures: int = 32
    fisher_draws: int = 4


@dataclass(frozen=True)
class Setting:
    """How much is done to compare the peers."""

    training_steps: int = 100
    sampling_steps: int = 12
    concepts: int = 8
    prompts: int = 8
    seeds: int = 4
    tuning_seeds: int = 2
    rates: int = 3


SETTINGS = {
    "quick": Setting(),
    "full": Setting(training_steps=400, sampling_steps=25),
    "tiny": Setting(2, 2, 1, 1, 1, 1, 1),
}
CURVES = {
    "quick": CurveSetting(),
    "full": CurveSetting((50, 100, 200, 500, 1000, 2000), 4, 25, 128, 16),
    "tiny": CurveSetting((1, 2), 1, 2, 2, 1),
}


@lru_cache(maxsize=1)
def _studio() -> tuple[Toybox, Judge, Yardstick]:
    toybox, judge = Toybox.load(), Judge.load()
    return toybox, judge, Yardstick(toybox, judge)


def stops(losses: Iterable[float], marks: Iterable[int]) -> Iterator[int]:
    """Train, stopping after each of these steps."""
    for step, _ in enumerate(losses, start=1):
        if step in marks:
            yield step


@lru_cache(maxsize=64)
def plain_pictures(prompt: str, seeds: tuple[int, ...], steps: int, guidance: float) -> Tensor:
    """What the plain model draws: the same for every peer."""
    toybox = _studio()[0]
    return toybox.vae.pictures(PLAIN(toybox, "").generate(prompt, list(seeds), steps, guidance))


def judged(peer: Peer, concept: Concept, setting: Setting, seeds: int, guidance: float) -> tuple[list[dict], list]:
    """Figures of every picture, and the first picture of each prompt."""
    toybox, _, yardstick = _studio()
    figures, first = [], []
    for index, prompt in enumerate(PEER_PROMPTS[: setting.prompts]):
        chosen = [1000 * index + seed for seed in range(1, seeds + 1)]
        latents = peer.generate(prompt.text.format(peer.phrase), chosen, setting.sampling_steps, guidance)
        pictures = toybox.vae.pictures(latents)
        first.append(pictures[0])
        plain = plain_pictures(prompt.text.format(concept.noun), tuple(chosen), setting.sampling_steps, guidance)
        for seed, found in zip(chosen, yardstick.figures(concept, prompt, pictures, plain), strict=True):
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
    """A peer trained on one concept: the figures of its pictures."""
    concept = drawn_concept(name)
    peer = kind(_studio()[0], concept.noun)
    if rate:
        for _ in peer.steps(concept, TrainingOptions(setting.training_steps, rate)):
            pass
    figures, first = judged(peer, concept, setting, setting.seeds, guidance)
    grid([(kind.name, first)]).save(strip)
    numbers = sum(value.numel() for value in peer.trained().values())
    return {
        "peer": kind.name,
        "concept": name,
        "rate": rate,
        "guidance": guidance,
        "numbers": numbers,
        "bytes": peer.size() if numbers else 0,
        "strip": strip.name,
        "pictures": figures,
    }


def curve(kind: type[Peer], name: str, rate: float, guidance: float, setting: CurveSetting) -> dict:
    """How far a peer overfits on one concept, after each number of training steps."""
    toybox, concept = _studio()[0], drawn_concept(name)
    peer = kind(toybox, concept.noun)
    overfitting = Overfitting(
        toybox, concept.noun, setting.fisher_draws, setting.class_pictures, setting.sampling_steps, guidance
    )
    training = peer.steps(concept, TrainingOptions(max(setting.checkpoints), rate))
    points = [{"steps": step, **overfitting.measure(peer)} for step in stops(training, setting.checkpoints)]
    return {"peer": kind.name, "concept": name, "rate": rate, "guidance": guidance, "curve": points}


@dataclass
class Bench:
    """The peers' parts, in a work folder, by so many processes (0: this one)."""

    setting: Setting
    curve_setting: CurveSetting
    work: Path
    workers: int
    kinds: tuple[type[Peer], ...] = (*PEERS, PLAIN)
    say: Callable[[str], None] = partial(print, flush=True)

    @cached_property
    def absent(self) -> dict[str, str]:
        """The peers that cannot run here, and why."""
        found = {kind.name: why for kind in self.kinds if (why := kind.why_unavailable())}
        for name, why in found.items():
            self.say(f"SKIPPED {name}: {why}")
        return found

    @cached_property
    def trials(self) -> list[dict]:
        """Every learning rate of every peer, tried."""
        return self._run(
            self.setting,
            [
                Job(
                    self._path("tune", kind.name, str(rate)),
                    partial(tune, kind, rate, self.setting),
                    f"try {kind.name} at {rate:g}",
                )
                for kind in self._present()
                for rate in (kind.rates[: self.setting.rates] or (0.0,))
            ],
        )

    def finals(self) -> list[dict]:
        """Every peer at its best on every concept."""
        jobs = []
        for name in TABLE[: self.setting.concepts]:
            for kind in self._present():
                rate, guidance = self._best(kind)
                path = self._path(
                    "final", kind.name, name, f"{rate:g}_{guidance:g}"
                )  # anew where another rate is the best
                work = partial(final, kind, name, rate, guidance, self.setting, path.with_suffix(".png"))
                jobs.append(Job(path, work, f"{kind.name}: {name}"))
        return self._run(self.setting, jobs)

    def curves(self) -> list[dict]:
        """How every peer that learns overfits, trained by its best rate for longer; the longest first."""
        jobs = []
        for kind in sorted((kind for kind in self._present() if kind.rates), key=lambda kind: kind is not Lora):
            rate, guidance = self._best(kind)
            for name in TABLE[: self.curve_setting.concepts]:
                path = self._path("curve", kind.name, name, f"{rate:g}_{guidance:g}")
                jobs.append(
                    Job(
                        path,
                        partial(curve, kind, name, rate, guidance, self.curve_setting),
                        f"curve of {kind.name}: {name}",
                    )
                )
        return self._run(self.curve_setting, jobs)

    def _present(self) -> list[type[Peer]]:
        return [kind for kind in self.kinds if kind.name not in self.absent]

    def _best(self, kind: type[Peer]) -> tuple[float, float]:
        return best(trial for trial in self.trials if trial["peer"] == kind.name)

    def _run(self, setting: Setting | CurveSetting, jobs: list[Job]) -> list[dict]:
        return Runner(asdict(setting), self.workers, self.say).run(jobs)

    def _path(self, *words: str) -> Path:
        return self.work / file_name(*words)


@dataclass(frozen=True)
class Part:
    """A benchmark with a command of its own, which writes the JSON that --json names, and a
    table and pictures beside it.

    quick: further arguments in the quick setting; None: it is left to the full one. alone: it takes times, or has
    processes of its own; the others run side by side, with one thread each. host: whether it needs a ComfyUI.
    """

    name: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...] | None = ()
    alone: bool = False
    host: bool = False

    def why_not(self) -> str:
        """Why it cannot run here; empty if it can."""
        if self.host and find_host() is None:
            return f"no ComfyUI {SOUGHT}"
        return ""

    def run(self, setting: str, work: Path, out: Path, say: Callable[[str], None]) -> None:
        """Run it unless its result is in the work folder, and copy what it wrote: its JSON
        and what has the same stem."""
        target = work.resolve() / f"{self.name}.json"
        if why := self.why_not():
            say(f"SKIPPED {self.name}: {why}")
            return
        if not target.is_file():
            work.mkdir(parents=True, exist_ok=True)
            arguments = [*self.arguments, *((self.quick or ()) if setting != "full" else ())]
            command = [sys.executable, "-m", *arguments, "--json", str(target)]
            log, started = target.with_suffix(".log"), time.monotonic()
            say(f"{self.name}: {' '.join(arguments)}  (see {log})")
            threads = {} if self.alone else {"OMP_NUM_THREADS": "1"}
            with log.open("w") as lines:
                subprocess.run(command, cwd=ROOT, check=True, stdout=lines, stderr=lines, env={**os.environ, **threads})
            say(f"{self.name}: done in {(time.monotonic() - started) / 60:.1f} min")
        for path in target.parent.glob(f"{self.name}.*"):
            if path.suffix in (".json", ".md", ".png"):
                shutil.copy(path, out)


PARTS = (
    Part("captions", ("benchmarks.toybox_captions",), ("--count", "256")),
    Part("words", ("benchmarks.fusion_ablation", "--figures", "words", "--count", "64")),
    Part("fusion_ablation", ("benchmarks.fusion_ablation",), ("--count", "16")),
    Part("residual_seed", ("benchmarks.residual_seed",), ("--concepts", "2", "--at", "0", "50", "200")),
    Part("mixtures", ("benchmarks.mixtures",)),
    Part("residual_bytes", ("benchmarks.residual_bytes",)),
    Part("image_prompt", ("benchmarks.image_prompt",), None),
    Part("fusion_finetune", ("benchmarks.fusion_finetune",), ("--count", "4", "--regularised", "2"), alone=True),
    Part("fusion_tradeoff", ("benchmarks.fusion_tradeoff",), ("--count", "4", "--rounds", "3"), alone=True),
    Part("peer_cost", ("benchmarks.peer_cost",), alone=True),
    Part("host_cost", ("benchmarks.host_cost",), alone=True, host=True),
)


def run_parts(parts: Sequence[Part], workers: int, run: Callable[[Part], None]) -> None:
    """Those that may run side by side, so many at a time; then each that must run alone."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        together = [pool.submit(run, part) for part in parts if not part.alone]
        try:
            for done in as_completed(together):
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)
    for part in parts:
        if part.alone:
            run(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="quick")
    parser.add_argument("--work", type=Path, help="where unfinished work is kept (default: bench-work/SETTING)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--only", nargs="+", choices=["peers", "curves", *(part.name for part in PARTS)], help="leave the others out"
    )
    parser.add_argument("--checkpoints", nargs="+", type=int, help="training steps at which overfitting is measured")
    given = parser.parse_args()
    started, say = time.monotonic(), partial(print, flush=True)
    work = given.work or ROOT / "bench-work" / given.setting
    given.out.mkdir(parents=True, exist_ok=True)
    curves = CURVES[given.setting]
    curves = replace(curves, checkpoints=tuple(given.checkpoints or curves.checkpoints))
    bench = Bench(SETTINGS[given.setting], curves, work, given.workers, say=say)
    if not given.only or "peers" in given.only:
        write_peers(bench.finals(), bench.trials, bench.absent, asdict(bench.setting), work, given.out)
    if not given.only or "curves" in given.only:
        write_curves(bench.curves(), bench.absent, asdict(curves), given.out)
    chosen = [
        part
        for part in PARTS
        if (part.name in given.only if given.only else given.setting == "full" or part.quick is not None)
    ]
    run_parts(chosen, given.workers, lambda part: part.run(given.setting, work, given.out, say))
    if given.out == RESULTS and not given.only:
        include()
    say(f"done in {(time.monotonic() - started) / 60:.1f} min: {given.out}")


if __name__ == "__main__":
    main()
