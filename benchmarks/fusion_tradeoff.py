"""What each cheaper Fusion Sampling costs and keeps: `python -m benchmarks.fusion_tradeoff`, on Toybox.

Cost: UNet rows a step, counted, and time over that of plain guidance by text with as many steps, S* included: in one process,
in turns. Scores: `benchmarks.fusion_judging`, and how much lower they are than the full scheme's on the same pictures and seeds.

The guided prediction is written around that of the prompt with S*, e(S*, C), which every scheme evaluates at every call:

    e(S*, C) + d_0 + s (w / (1 + w) d_C - d_0),      d_0 = e(0) - e(S*, C),      d_C = e(C) - e(S*, C).

The differences d change more slowly than the predictions: a scheme can keep them from the call before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.charts import Point, scatter
from benchmarks.fusion_ablation import SHIPPED
from benchmarks.fusion_judging import PROMPTS, References, references, scores
from benchmarks.timing import against, interleaved
from profusion.diffusion import sampling_sigmas, timestep_of
from profusion.fusion import FusionOptions, Guidance, Stage, guide, mean_prediction
from profusion.pictures import stacked
from profusion.promptnet.file import load_promptnet
from profusion.toybox.fused import Conditions, FusedToybox, PredictStage
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import Toybox, seeded


@dataclass(frozen=True)
class Terms:
    """Where a call has the plain text C and the empty prompt 0 from, beside (S*, C), which it evaluates.

    "new": it evaluates them. "kept": the last difference is taken again. "stale": the last prediction e(0) itself is.
    "none": the text is left out.
    """

    text: str = "new"
    nothing: str = "new"


BOTH, ALONE, KEPT = Terms(), Terms("none"), Terms("kept", "kept")
TEXT_KEPT, NOTHING_KEPT, NOTHING_STALE = Terms("kept"), Terms(nothing="kept"), Terms(nothing="stale")


@dataclass(frozen=True)
class Scheme:
    """What is evaluated where. Levels before the share `end` of a run, each `every`-th of them, have a fusion stage, which
    evaluates `fusion`, and the refinement after it `refined`; `rest`, in turns, is for the other levels."""

    name: str
    rest: tuple[Terms, ...]
    fusion: Terms = BOTH
    refined: Terms = BOTH
    end: float = 0.0
    every: int = 1

    def fused(self, step: int, steps: int) -> bool:
        return step < round(self.end * steps) and step % self.every == 0 and step < steps - 1

    def terms(self, stage: Stage, step: int, steps: int) -> Terms:
        if stage == "fusion":
            return self.fusion
        return self.refined if self.fused(step, steps) else self.rest[step % len(self.rest)]


FULL = Scheme("full", (BOTH,), end=1.0)
SCHEMES = (
    Scheme("plain guidance by S*, C", (ALONE,)),
    Scheme("no fusion stage", (BOTH,)),
    Scheme("no fusion stage, d_C every second step", (BOTH, TEXT_KEPT)),
    Scheme("no fusion stage, d_0 and d_C every second step", (BOTH, KEPT)),
    FULL,
    Scheme("full, every second step", (BOTH,), end=1.0, every=2),
    *(Scheme(f"full, first {end:.0%}", (BOTH,), end=end) for end in (0.2, 0.4, 0.6)),
    Scheme("full, first 40%, S* alone in the fusion stage", (BOTH,), ALONE, BOTH, 0.4),
    Scheme("full, first 40%, S* alone after it", (ALONE,), BOTH, BOTH, 0.4),
    Scheme("full, first 40%, S* alone but in the fusion stage", (ALONE,), BOTH, ALONE, 0.4),
    *(Scheme(f"S* alone, first {end:.0%}", (ALONE,), ALONE, ALONE, end) for end in (0.2, 0.4, 0.6)),
    Scheme("e(0) from the fusion stage, first 40%, S* alone after it", (ALONE,), BOTH, NOTHING_STALE, 0.4),
    Scheme("d_0 from the fusion stage, first 40%, S* alone after it", (ALONE,), BOTH, NOTHING_KEPT, 0.4),
    Scheme("d_0 and d_C from the fusion stage", (BOTH,), BOTH, KEPT, 1.0),
    *(
        Scheme(f"d_0 and d_C from the fusion stage, first {end:.0%}, S* alone after it", (ALONE,), BOTH, KEPT, end)
        for end in (0.2, 0.4)
    ),
    Scheme("d_0 and d_C from the fusion stage, first 40%, every second step after it", (BOTH, KEPT), BOTH, KEPT, 0.4),
)


@dataclass(frozen=True)
class Levels(FusionOptions):
    """A fusion stage at these sigmas alone."""

    sigmas: frozenset[float] = frozenset()

    def repeats_at(self, sigma: float, sigma_next: float) -> int:
        return super().repeats_at(sigma, sigma_next) if sigma in self.sigmas else 0


def options_of(scheme: Scheme, steps: int) -> FusionOptions:
    sigmas = sampling_sigmas(steps)[:-1].tolist()
    return Levels(sigmas=frozenset(sigma for step, sigma in enumerate(sigmas) if scheme.fused(step, steps)))


def predictor(fused: FusedToybox, given: Conditions, guidance: Guidance, scheme: Scheme, steps: int) -> PredictStage:
    """The guided noise of a run, which keeps what it may use again."""
    times = timestep_of(sampling_sigmas(steps)[:-1]).tolist()
    predictions: dict[str, Tensor] = {}
    differences: dict[str, Tensor] = {}

    def predict(x: Tensor, t: Tensor, stage: Stage) -> Tensor:
        terms = scheme.terms(stage, times.index(int(t[0])), steps)
        fusing = stage == "fusion"
        new = [name for name in ("text", "nothing") if getattr(terms, name) == "new"]
        contexts = [given.word(t[:1], guidance.gamma if fusing else 1.0), *(getattr(given, name) for name in new)]
        word, *others = fused.evaluate(x, t, contexts)
        for name, prediction in zip(new, others, strict=True):
            predictions[name], differences[name] = prediction, prediction - word
        nothing = predictions["nothing"] if terms.nothing == "stale" else word + differences["nothing"]
        mean = word if terms.text == "none" else mean_prediction([word, word + differences["text"]], guidance.weights)
        return guide(nothing, mean, guidance.fusion_cfg if fusing else guidance.cfg)

    return predict


def draw(
    fused: FusedToybox, guidance: Guidance, scheme: Scheme, steps: int, prompt: str, nouns: Sequence[str],
    pictures: Sequence[Tensor], generators: Sequence[torch.Generator], fresh: torch.Generator,
) -> Tensor:  # fmt: skip
    """Latents by a scheme, one for each picture."""
    given = fused.conditions(prompt, nouns, pictures)
    return fused.sample(predictor(fused, given, guidance, scheme, steps), generators, options_of(scheme, steps), steps, fresh)


def costs(fused: FusedToybox, guidance: Guidance, steps: int, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Rows a step, and time over that of plain guidance by text."""
    known, plain = references(batch, 0), "plain guidance by text"
    prompt, starts = PROMPTS[0], range(batch)

    def task(scheme: Scheme) -> Callable[[], Tensor]:
        return lambda: draw(
            fused, guidance, scheme, steps, prompt, known.nouns, known.pictures.split(1), seeded(*starts), torch.Generator()
        )

    tasks = {scheme.name: task(scheme) for scheme in SCHEMES}
    rows = {plain: 2.0}
    for name, run in tasks.items():
        before = fused.rows
        run()
        rows[name] = round((fused.rows - before) / batch / steps, 2)
    tasks[plain] = lambda: fused.toybox.generate(["a photo of a cat on snow"] * batch, seeded(*starts), steps, guidance.cfg)
    times = against(interleaved(tasks, rounds), plain, batch) if rounds else {name: {} for name in tasks}
    return {name: {"rows_a_step": rows[name], **times[name]} for name in tasks}


def judged(
    fused: FusedToybox, judge: Judge, known: References, prompts: Sequence[str], guidance: Guidance, steps: int, batch: int
) -> dict[str, dict]:
    """Scores of every scheme, and how far they are from the full one's."""
    found = {}
    for scheme in (FULL, *(scheme for scheme in SCHEMES if scheme != FULL)):

        def pictures(*given, scheme=scheme) -> Tensor:
            return fused.toybox.vae.pictures(draw(fused, guidance, scheme, steps, *given))

        found[scheme.name] = scores(pictures, judge, known, prompts, batch)
        print(scheme.name, json.dumps(found[scheme.name].as_json()), flush=True)
    return {name: {**one.as_json(), "more_than_full": one.minus(found[FULL.name])} for name, one in found.items()}


def table(figures: dict[str, dict]) -> str:
    """In Markdown, numbered as in the chart."""
    lines = [
        "|   | scheme | rows a step | time | concept | noun | text | concept, less full | text, less full |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, (name, one) in enumerate(figures.items(), start=1):
        less = one["more_than_full"]
        lines.append(
            f"| {number} | {name} | {one['rows_a_step']:.2f} | {one.get('times_plain', float('nan')):.2f} | "
            f"{one['concept'][0]:.3f} ± {one['concept'][1]:.3f} | {one['noun']['share']:.1%} | {one['text']['share']:.1%} | "
            f"{less['concept'][0]:+.3f} ± {less['concept'][1]:.3f} | {less['text'][0]:+.1%} ± {less['text'][1]:.1%} |"
        )
    return "\n".join(lines)


def chart(figures: dict[str, dict]) -> Image.Image:
    """Concept and text against cost; what costs at most 1.5 times plain guidance is accented."""
    cost = "times_plain" if "times_plain" in figures[FULL.name] else "rows_a_step"
    most = 1.5 if cost == "times_plain" else 3.0
    panels = []
    for name, label in (("concept", "likeness to the reference"), ("text", "share of prompts followed besides S*")):
        points = [
            Point(one[cost], one["concept"][0] if name == "concept" else one["text"]["share"], half(one, name), str(number), one[cost] <= most)
            for number, one in enumerate(figures.values(), start=1)
        ]
        panels.append(scatter(points, "time over plain guidance" if most == 1.5 else "UNet rows a step", label))
    return stacked(panels)


def half(figures: dict, name: str) -> float:
    """Half of a score's interval."""
    if name == "concept":
        return figures["concept"][1]
    low, high = figures["text"]["interval_95"]
    return (high - low) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--promptnet", type=Path, default=SHIPPED, help="the PromptNet's file")
    parser.add_argument("--count", type=int, default=32, help="unseen pictures")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"the first so many of {len(PROMPTS)}")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--text-weight", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=32, help="pictures judged at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7, help="of timing; 0: rows alone")
    parser.add_argument("--timed-batch", type=int, default=1, help="pictures drawn at once where time is taken")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--chart", type=Path, default=None, help="draw the curve here, as PNG")
    given = parser.parse_args()
    fused, judge = FusedToybox(Toybox.load(), load_promptnet(given.promptnet)), Judge.load()
    guidance = Guidance((1.0, given.text_weight), given.cfg)
    cost = costs(fused, guidance, given.steps, given.timed_batch, given.rounds)
    known = references(given.count, given.seed)
    found = judged(fused, judge, known, PROMPTS[: given.prompts], guidance, given.steps, given.batch)
    figures = {scheme.name: {**cost[scheme.name], **found[scheme.name]} for scheme in SCHEMES}
    print(table(figures))
    if given.json:
        given.json.write_text(json.dumps({**{k: str(v) for k, v in vars(given).items()}, "figures": figures}, indent=1) + "\n")
    if given.chart:
        chart(figures).save(given.chart)


if __name__ == "__main__":
    main()
