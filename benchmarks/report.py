"""Tables and charts of what `benchmarks.run` found about the peers."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image

from benchmarks.charts import lines
from benchmarks.judging import BACKBONES, METRICS
from benchmarks.peers import OURS, PEERS, PLAIN
from benchmarks.results import table as markdown_table
from profusion.metrics.chart import chart
from profusion.metrics.scores import Score, Scores, number
from profusion.pictures import stacked
from profusion.toybox import world

STORED = ("bytes", "numbers")
FISHER = "Fisher divergence on prompts without the concept, a number per element (0: nothing moved)"
WASSERSTEIN = "Wasserstein distance between the class before and the concept after"


def write_report(found: dict, name: str, setting: dict, work: Path, out: Path) -> None:
    """peers.json, peers.md, and the charts peers.png, samples.png, fisher.png and wasserstein.png where there are curves."""
    finals = found["finals"]
    scores, curves = table(finals), overfitting_curves(finals)
    everything = {
        "setting": {"name": name, **setting},
        "machine": {"processor": platform.machine(), "torch": torch.__version__, "threads_a_job": 1},
        "absent": found["absent"],
        "table": scores.as_json()["scores"],
        "difference": difference(finals).as_json()["scores"],
        "curves": curves,
        "trials": found["trials"],
        "finals": [{key: value for key, value in one.items() if key != "pictures"} for one in finals],
    }
    (out / "peers.json").write_text(json.dumps(everything, indent=1) + "\n")
    (out / "peers.md").write_text(markdown(found, setting, scores))
    judged = tuple(score for score in scores.scores if score.metric not in STORED)
    chart(Scores(judged), 900).save(out / "peers.png")
    _samples(finals, work).save(out / "samples.png")
    for measure, title in (("fisher", FISHER), ("wasserstein", WASSERSTEIN)):
        series = {peer: [(point["steps"], point[measure]) for point in line] for peer, line in curves.items()}
        if series:
            lines(series, title, "training steps", log_up=measure == "fisher").save(out / f"{measure}.png")


def _by_peer(finals: Sequence[dict]) -> dict[str, list[dict]]:
    """The results of each peer, in the order of PEERS."""
    names = [kind.name for kind in (*PEERS, PLAIN)]
    return {name: [one for one in finals if one["peer"] == name] for name in names if any(one["peer"] == name for one in finals)}


def concept_means(results: Iterable[dict], metric: str) -> torch.Tensor:
    """The mean over the pictures of each concept, (concepts,): pictures of one concept are not independent, concepts are."""
    means = [sum(picture[metric] for picture in one["pictures"]) / len(one["pictures"]) for one in results]
    return torch.tensor(means, dtype=torch.float64)


def table(finals: Sequence[dict]) -> Scores:
    """The columns of Infusion's Table 1 and the judge's, means over concepts with 95 % intervals."""
    scores = []
    for metric, title in METRICS.items():
        for peer, results in _by_peer(finals).items():
            samples = concept_means(results, metric)
            scores.append(Score.of(title, peer, samples, backbone=BACKBONES.get(metric, "")))
    for peer, results in _by_peer(finals).items():
        scores += [Score(stored, peer, max(one[stored] for one in results), better="lower") for stored in STORED]
    return Scores(tuple(scores))


def difference(finals: Sequence[dict]) -> Scores:
    """Each peer's score less ours on the same concepts, with 95 % intervals: what an ordering rests on."""
    peers = _by_peer(finals)
    ours = concept_means(peers.get(OURS.name, ()), "score")
    others = {name: results for name, results in peers.items() if name != OURS.name and len(results) == len(ours)}
    return Scores(
        tuple(Score.of("score less Infusion's", name, concept_means(results, "score") - ours) for name, results in others.items())
    )


def overfitting_curves(finals: Sequence[dict]) -> dict[str, list[dict]]:
    """For each peer, means over concepts of both metrics at each number of steps."""
    curves = {}
    for peer, results in _by_peer(finals).items():
        points = [one["curve"] for one in results if one["curve"]]
        if points:
            curves[peer] = [
                {"steps": group[0]["steps"], **{key: sum(p[key] for p in group) / len(group) for key in ("fisher", "wasserstein")}}
                for group in zip(*points, strict=True)
            ]
    return curves


def markdown(found: dict, setting: dict, scores: Scores) -> str:
    """The tables that README and docs include."""
    finals = found["finals"]
    count = sum(len(one["pictures"]) for one in finals) // max(1, len(_by_peer(finals)))
    concepts = len({one["concept"] for one in finals})
    parts = [
        f"{concepts} concepts x {setting['prompts']} prompts x {setting['seeds']} seeds = {count} pictures for each; "
        f"{setting['training_steps']} training steps of batch 4 on 4 pictures, {setting['sampling_steps']} sampling steps. "
        "Intervals are 95 %, over concepts (Student's).",
        scores.markdown(),
        "Score less that of Infusion, own trajectory, concept by concept:",
        difference(finals).markdown(),
        "How each was tuned, all on the same two other concepts (score at guidance 2 / 4), and what it is:",
        _trials(found["trials"]),
        _curves(overfitting_curves(finals)),
        *(f"Not measured: {name} ({why})." for name, why in found["absent"].items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


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
    if not curves:
        return ""
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
