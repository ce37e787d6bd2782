"""What each cheaper Fusion Sampling costs and keeps: `python -m benchmarks.fusion_tradeoff`, on Toybox.

Cost: UNet rows a step, counted, and time over that of plain guidance by text with as many steps, S* included: in
one process, in turns. Scores: `benchmarks.fusion_judging`, and how much lower they are than the full scheme's on
the same pictures and seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.charts import Point, scatter
from benchmarks.fusion_ablation import SHIPPED, Variant, drawn_by
from benchmarks.fusion_judging import FUSION_PROMPTS, References, references, scores
from benchmarks.results import percent, plus_minus, table, write
from benchmarks.timing import against, interleaved
from profusion.fusion import Guidance
from profusion.pictures import stacked
from profusion.promptnet.file import load_promptnet
from profusion.toybox.fused import FusedToybox, first_levels
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import Toybox, seeded


@dataclass(frozen=True)
class Scheme:
    """A way to sample. end: the share of the run that has a fusion stage. refresh: `Guidance.refresh`. text: whether
    the plain text is one of the terms. both: whether it guides the fusion stage too."""

    name: str
    end: float = 0.0
    refresh: int = 1
    text: bool = True
    both: bool = False

    def variant(self, given: Guidance, steps: int) -> Variant:
        """With a fusion stage at the first levels, as many as the share says."""
        weights = given.weights if self.text else given.weights[:1]
        fusion_weights = given.fusion_weights if self.text and not self.both else None
        guidance = replace(given, weights=weights, refresh=self.refresh, fusion_weights=fusion_weights)
        return Variant(self.name, guidance, first_levels(self.end, steps))


def _schemes() -> tuple[Scheme, ...]:
    windows = {
        0.0: "no fusion stage",
        **{end: f"fusion in the first {end:.0%}" for end in (0.2, 0.4, 0.6)},
        1.0: "full",
    }
    return (
        Scheme("plain guidance by S*, C", text=False),
        *(
            Scheme(name if refresh == 1 else f"{name}, refresh {refresh}", end, refresh)
            for end, name in windows.items()
            for refresh in (1, 2, 3)
        ),
        *(
            Scheme(f"{windows[end]}, the text in it too{after}", end, refresh, both=True)
            for end, refresh, after in ((0.2, 2, ", refresh 2"), (1.0, 1, ""))
        ),
    )


SCHEMES = _schemes()
FULL = next(scheme for scheme in SCHEMES if scheme.name == "full")


def costs(fused: FusedToybox, guidance: Guidance, steps: int, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Rows a step, and time over that of plain guidance by text."""
    known, plain = references(batch, 0), "plain guidance by text"
    prompt, starts = FUSION_PROMPTS[0], range(batch)

    def task(scheme: Scheme) -> Callable[[], Tensor]:
        one = scheme.variant(guidance, steps)
        return lambda: fused.generate(
            prompt,
            known.nouns,
            known.pictures.split(1),
            seeded(*starts),
            one.guidance,
            one.options,
            steps,
            torch.Generator(),
        )

    tasks = {scheme.name: task(scheme) for scheme in SCHEMES}
    rows = {plain: 2.0}
    for name, run in tasks.items():
        before = fused.rows
        run()
        rows[name] = round((fused.rows - before) / batch / steps, 2)
    tasks[plain] = lambda: fused.toybox.generate(
        ["a photo of a cat on snow"] * batch, seeded(*starts), steps, guidance.cfg
    )
    times = against(interleaved(tasks, rounds), plain, batch) if rounds else {name: {} for name in tasks}
    return {name: {"rows_a_step": rows[name], **times[name]} for name in tasks}


def judged(
    fused: FusedToybox,
    judge: Judge,
    known: References,
    prompts: Sequence[str],
    guidance: Guidance,
    steps: int,
    batch: int,
) -> dict[str, dict]:
    """Scores of every scheme, and how far they are from the full one's."""
    found = {}
    for scheme in (FULL, *(scheme for scheme in SCHEMES if scheme != FULL)):
        draw = drawn_by(fused, scheme.variant(guidance, steps), steps)
        found[scheme.name] = scores(draw, judge, known, prompts, batch)
        print(scheme.name, json.dumps(found[scheme.name].as_json()), flush=True)
    return {name: {**one.as_json(), "more_than_full": one.minus(found[FULL.name])} for name, one in found.items()}


def markdown(figures: dict[str, dict]) -> str:
    """The table, numbered as in the chart. Without times where none were taken."""
    timed = all("times_plain" in one for one in figures.values())
    rows = []
    for number, (name, one) in enumerate(figures.items(), start=1):
        less = one["more_than_full"]
        rows.append(
            (
                number,
                name,
                f"{one['rows_a_step']:.2f}",
                *([f"{one['times_plain']:.2f}"] if timed else []),
                plus_minus(one["concept"]),
                percent(one["noun"]),
                percent(one["text"]),
                f"{less['concept'][0]:+.3f} ± {less['concept'][1]:.3f}",
                f"{less['text'][0]:+.1%} ± {less['text'][1]:.1%}",
            )
        )
    heads = (
        "",
        "scheme",
        "UNet rows a step",
        *(["time over plain guidance"] if timed else []),
        "likeness",
        "noun",
        "text",
        "likeness, less full",
        "text, less full",
    )
    return table(heads, rows)


def chart(figures: dict[str, dict]) -> Image.Image:
    """Concept and text against cost; what costs at most 1.5 times plain guidance is accented."""
    cost = "times_plain" if "times_plain" in figures[FULL.name] else "rows_a_step"
    most = 1.5 if cost == "times_plain" else 3.0
    panels = []
    for name, label in (("concept", "likeness to the reference"), ("text", "share of prompts followed besides S*")):
        points = [
            Point(
                one[cost],
                one["concept"][0] if name == "concept" else one["text"]["share"],
                half(one, name),
                str(number),
                one[cost] <= most,
            )
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
    parser.add_argument(
        "--prompts", type=int, default=len(FUSION_PROMPTS), help=f"the first so many of {len(FUSION_PROMPTS)}"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--text-weight", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=32, help="pictures judged at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7, help="of timing; 0: rows alone")
    parser.add_argument("--timed-batch", type=int, default=1, help="pictures drawn at once where time is taken")
    parser.add_argument(
        "--json", type=Path, default=None, help="write the figures here, and a table and the curve beside them"
    )
    given = parser.parse_args()
    fused, judge = FusedToybox(Toybox.load(), load_promptnet(given.promptnet)), Judge.load()
    guidance = Guidance((1.0, given.text_weight), given.cfg, fusion_weights=(1.0, 0.0))
    cost = costs(fused, guidance, given.steps, given.timed_batch, given.rounds)
    known = references(given.count, given.seed)
    found = judged(fused, judge, known, FUSION_PROMPTS[: given.prompts], guidance, given.steps, given.batch)
    figures = {scheme.name: {**cost[scheme.name], **found[scheme.name]} for scheme in SCHEMES}
    write(given.json, vars(given), figures, markdown(figures), chart(figures))


if __name__ == "__main__":
    main()
