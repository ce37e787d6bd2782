"""Tables and charts of what `benchmarks.run` found about the peers."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from benchmarks.charts import lines
from benchmarks.judging import BACKBONES, LOWER, METRICS
from benchmarks.peers import OURS, PEERS, PLAIN, Peer
from benchmarks.peers.residuals import InfusionPaperLoss, WithoutLock
from benchmarks.results import table as markdown_table
from benchmarks.results import write
from profusion.metrics.chart import chart
from profusion.metrics.scores import Score, Scores, number
from profusion.pictures import stacked
from profusion.toybox import world

STORED = ("bytes", "numbers")
ENDS = {
    "moved": (0.0, math.inf),
    **{name: (0.0, 1.0) for name in ("likeness", "noun", "place", "score")},
}  # -1 and 1: cosines
COMPARED = ("likeness", "moved", "score")
SHORT = tuple(METRICS[name] for name in ("likeness", "noun", "place", "moved")) + ("bytes",)
FISHER = "Fisher divergence on prompts without the concept, a number per element (0: nothing moved)"
WASSERSTEIN = "Wasserstein distance between the class before and the concept after"


def write_peers(
    finals: Sequence[dict], trials: Sequence[dict], absent: dict[str, str], setting: dict, work: Path, out: Path
) -> None:
    """peers.json, peers.md, peers.short.md, peers.png and samples.jpg; setting: `benchmarks.run.Setting`'s fields."""
    scores = table(finals)
    found = {
        "absent": absent,
        "table": scores.as_json()["scores"],
        "difference": difference(finals).as_json()["scores"],
        "lock": lock(finals).as_json()["scores"],
        "trials": trials,
        "finals": [{key: value for key, value in one.items() if key != "pictures"} for one in finals],
    }
    judged = tuple(score for score in scores.scores if score.metric not in STORED)
    short = Scores(tuple(score for score in scores.scores if score.metric in SHORT))
    parts = (_counts(finals, setting), _missing(absent))
    write(
        out / "peers.json",
        {**setting, **_machine()},
        found,
        markdown(finals, trials, absent, setting, scores),
        chart(Scores(judged), 900),
        "\n\n".join(part for part in (parts[0], short.markdown(), parts[1]) if part),
    )
    _samples(finals, work).save(out / "samples.jpg", quality=88)


def write_curves(curves: Sequence[dict], absent: dict[str, str], setting: dict, out: Path) -> None:
    """curves.json, curves.md, fisher.png and wasserstein.png; setting: `benchmarks.run.CurveSetting`'s fields."""
    found = overfitting_curves(curves)
    said = (
        f"Concepts: {len({one['concept'] for one in curves})}. Each peer is trained on at the rate, and draws with "
        f"the guidance, that were best for it above. {setting['class_pictures']} pictures of the class, and as many "
        f"of the concept.\n\n{_curves(found)}\n\n{_missing(absent)}"
    )
    write(out / "curves.json", {**setting, **_machine()}, {"absent": absent, "curves": found}, said)
    for measure, title in (("fisher", FISHER), ("wasserstein", WASSERSTEIN)):
        series = {peer: [(point["steps"], point[measure]) for point in line] for peer, line in found.items()}
        lines(series, title, "training steps", log_up=True).save(out / f"{measure}.png")


def _machine() -> dict[str, object]:
    return {"processor": platform.machine(), "torch": torch.__version__, "threads_a_job": 1}


def _by_peer(finals: Sequence[dict]) -> dict[str, list[dict]]:
    """The results of each peer, in the order of PEERS."""
    names = [kind.name for kind in (*PEERS, PLAIN)]
    return {
        name: [one for one in finals if one["peer"] == name]
        for name in names
        if any(one["peer"] == name for one in finals)
    }


def concept_means(results: Iterable[dict], metric: str) -> torch.Tensor:
    """The mean over the pictures of each concept, (concepts,): pictures of one concept are
    not independent, concepts are.

    How far pictures moved is taken as a share of how far plain ones of other seeds are apart.
    """

    def mean(pictures: Sequence[dict], metric: str) -> float:
        return sum(picture[metric] for picture in pictures) / len(pictures)

    means = [
        mean(one["pictures"], metric) / (max(mean(one["pictures"], "other_seeds"), 1e-6) if metric == "moved" else 1)
        for one in results
    ]
    return torch.tensor(means, dtype=torch.float64)


def table(finals: Sequence[dict]) -> Scores:
    """The columns of Infusion's Table 1 and the judge's, means over concepts with 95 % intervals."""
    scores = []
    for metric, title in METRICS.items():
        for peer, results in _by_peer(finals).items():
            samples = concept_means(results, metric)
            more = {"backbone": BACKBONES.get(metric, ""), "better": "lower" if metric in LOWER else "higher"}
            scores.append(Score.of(title, peer, samples, ENDS.get(metric, (-1.0, 1.0)), **more))
    for peer, results in _by_peer(finals).items():
        scores += [Score(stored, peer, max(one[stored] for one in results), better="lower") for stored in STORED]
    return Scores(tuple(scores))


def difference(finals: Sequence[dict], base: type[Peer] = OURS) -> Scores:
    """How much each peer differs from one of them on the same concepts, with 95 % intervals:
    what an ordering rests on."""
    peers = _by_peer(finals)
    found = []
    for metric in COMPARED:
        known = concept_means(peers.get(base.name, ()), metric)
        for name, results in peers.items():
            if name != base.name and len(results) == len(known):
                less = concept_means(results, metric) - known
                found.append(Score.of(METRICS[metric], name, less, better="lower" if metric in LOWER else "higher"))
    return Scores(tuple(found))


def lock(finals: Sequence[dict]) -> Scores:
    """What the lock alone changes: without it, less with it, both trained by the same loss."""
    found = difference(finals, InfusionPaperLoss).scores
    return Scores(tuple(score for score in found if score.subject == WithoutLock.name))


def overfitting_curves(curves: Sequence[dict]) -> dict[str, list[dict]]:
    """For each peer, means over concepts of both metrics at each number of steps."""
    return {
        peer: [
            {
                "steps": group[0]["steps"],
                **{key: sum(p[key] for p in group) / len(group) for key in ("fisher", "wasserstein")},
            }
            for group in zip(*(one["curve"] for one in results), strict=True)
        ]
        for peer, results in _by_peer(curves).items()
    }


def markdown(
    finals: Sequence[dict], trials: Sequence[dict], absent: Mapping[str, str], setting: Mapping, scores: Scores
) -> str:
    """What docs include of the peers."""
    parts = [
        _counts(finals, setting),
        scores.markdown(),
        f"Less {OURS.name}, concept by concept:",
        difference(finals).markdown(),
        f"Less {InfusionPaperLoss.name}, which differs by the lock alone:",
        lock(finals).markdown(),
        "How each was tuned, all on the same two other concepts (score at guidance 2 / 4), and what it is:",
        _trials(trials),
        _missing(absent),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _counts(finals: Sequence[dict], setting: Mapping) -> str:
    """From how much the figures are."""
    concepts = len({one["concept"] for one in finals})
    count = sum(len(one["pictures"]) for one in finals) // max(1, len(_by_peer(finals)))
    return (
        f"{concepts} concepts x {setting['prompts']} prompts x {setting['seeds']} seeds = {count} pictures for each; "
        f"{setting['training_steps']} training steps of batch 4 on 4 pictures, {setting['sampling_steps']} sampling "
        "steps. Intervals are 95 %, over concepts (Student's). The rest of the picture, without the concept, is "
        "compared with the plain model's of the same seed: 0 is equal, 1 as far from it as plain pictures of other "
        "seeds are."
    )


def _missing(absent: Mapping[str, str]) -> str:
    return "\n\n".join(f"Not measured: {name} ({why})." for name, why in absent.items())


def _trials(trials: Sequence[dict]) -> str:
    notes = {kind.name: kind.note for kind in (*PEERS, PLAIN)}
    rows = []
    for name in dict.fromkeys(trial["peer"] for trial in trials):
        tried = [
            f"{trial['rate']:g}: {' / '.join(number(score) for score in trial['scores'].values())}"
            for trial in trials
            if trial["peer"] == name
        ]
        rows.append((name, "; ".join(tried), notes[name]))
    return markdown_table(("", "learning rates tried, and their scores", "what is trained"), rows)


def _curves(curves: dict[str, list[dict]]) -> str:
    """Fisher and Wasserstein at each number of steps."""
    steps = [point["steps"] for point in next(iter(curves.values()))]
    rows = [
        (peer, *(f"{number(point['fisher'])} / {number(point['wasserstein'])}" for point in points))
        for peer, points in curves.items()
    ]
    return markdown_table(("Fisher per element / Wasserstein after", *(f"{step} steps" for step in steps)), rows)


def _samples(finals: Sequence[dict], work: Path) -> Image.Image:
    """The first picture of each prompt, a strip for each peer, of the first concept."""
    first = next(name for name in world.CONCEPTS if any(one["concept"] == name for one in finals))
    return stacked([Image.open(work / one["strip"]).convert("RGB") for one in finals if one["concept"] == first])
