"""Numbers with their intervals, backbones and notes, as a table for people and as rows for programs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from torch import Tensor

from .checks import MetricError, check_finite

_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764)  # for 1 to 4 degrees of freedom, where the expansion below is poor


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.1 % (Cornish-Fisher's expansion; Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def mean_interval(samples: Tensor, least: float = -math.inf, most: float = math.inf) -> tuple[float, float, float]:
    """Mean of independent samples (n,) and its 95 % interval (Student's): mean, low, high. Of
    one sample, no interval: NaN.

    least, most: between which a sample can lie at all.
    """
    if samples.ndim != 1 or not len(samples):
        raise MetricError(f"samples of shape {tuple(samples.shape)}: give at least one, (n,)")
    check_finite(samples, "sample", "leave it out, or find out what made it")
    values = samples.double()
    mean, count = values.mean().item(), len(values)
    if count == 1:
        return mean, math.nan, math.nan
    half = student_quantile(count - 1) * values.std().item() / math.sqrt(count)
    return mean, max(least, mean - half), min(most, mean + half)


@dataclass(frozen=True)
class Score:
    """One result: a metric, its subject, the backbone, the mean and its interval.

    metric: such as "CLIP-T"; subject: what was measured, such as a method's name; backbone: the network that judged, if
    one did; low and high: the 95 % interval, NaN where there is none; better: "higher", "lower", or "" where neither
    is.
    """

    metric: str
    subject: str
    mean: float
    low: float = math.nan
    high: float = math.nan
    count: int = 1
    backbone: str = ""
    better: str = "higher"

    @classmethod
    def of(
        cls, metric: str, subject: str, samples: Tensor, ends: tuple[float, float] = (-math.inf, math.inf), **more: str
    ) -> Score:
        """The mean of samples (n,), which can lie between `ends`, and its interval."""
        return cls(metric, subject, *mean_interval(samples.detach().cpu(), *ends), len(samples), **more)

    @property
    def name(self) -> str:
        """The metric, and the backbone without which it means nothing."""
        return f"{self.metric} ({self.backbone})" if self.backbone else self.metric

    @property
    def column(self) -> str:
        """The heading under which it stands in a table."""
        return self.name + {"higher": " ↑", "lower": " ↓"}.get(self.better, "")

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" ({number(self.low)} to {number(self.high)})"
        return f"{number(self.mean)}{interval}"


def number(value: float) -> str:
    """A number with three or four digits that matter."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3f}" if 0.01 <= size < 1 else f"{value:.4g}"


@dataclass(frozen=True)
class Scores:
    """Many of them: a table whose lines are subjects and whose columns are metrics. notes: what to know about them."""

    scores: tuple[Score, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(score.subject for score in self.scores))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(score.column for score in self.scores))

    def as_json(self) -> dict[str, object]:
        """A row for each number; NaN, which JSON lacks, becomes None."""
        rows = [asdict(score) for score in self.scores]
        return {
            "scores": [{key: None if value != value else value for key, value in row.items()} for row in rows],
            "notes": list(self.notes),
        }

    def markdown(self) -> str:
        """A table, and the notes under it."""
        cells = {(score.subject, score.column): str(score) for score in self.scores}
        lines = [["", *self.columns]]
        lines += [
            [subject, *(cells.get((subject, column), "") for column in self.columns)] for subject in self.subjects
        ]
        lines.insert(1, ["---"] * len(lines[0]))
        table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        return "\n".join([table, *([""] if self.notes else []), *(f"- {note}" for note in self.notes)])

    def text(self) -> str:
        """One number a line, and the notes."""
        return "\n".join([*(f"{score.subject}: {score.name} {score}" for score in self.scores), *self.notes])
