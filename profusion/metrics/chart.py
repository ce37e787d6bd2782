"""Scores as a picture: a panel for each metric, in it a dot and its 95 % interval for each subject."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..pictures import ACCENT, FAINT, INK, PAPER, font
from .scores import Score, Scores, number

_MARGIN, _TITLE, _LINE, _GAP = 16, 28, 24, 26


def chart(scores: Scores, width: int = 640) -> Image.Image:
    """Every score that is a number, (width, as high as it takes) pixels."""
    panels = [[score for score in scores.scores if score.column == column] for column in scores.columns]
    height = 2 * _MARGIN + sum(_TITLE + _LINE * len(panel) + _GAP for panel in panels)
    image = Image.new("RGB", (width, height), PAPER)
    draw, top = ImageDraw.Draw(image), _MARGIN
    labels = max((draw.textlength(subject, font(13)) for subject in scores.subjects), default=0)
    left = min(width // 3, _MARGIN + round(labels) + 12)
    for panel in panels:
        _panel(draw, panel, (left, width - 150), top)
        top += _TITLE + _LINE * len(panel) + _GAP
    return image


def _panel(draw: ImageDraw.ImageDraw, panel: Sequence[Score], sides: tuple[int, int], top: int) -> None:
    """One metric's panel, whose axis goes from the left to the right side."""
    left, right = sides
    first, last = _range(panel)

    def place(value: float) -> float:
        return left + (right - left) * (value - first) / (last - first)

    better = f", {panel[0].better} is better" if panel[0].better else ""  # the font has no arrows
    draw.text((_MARGIN, top), panel[0].name + better, INK, font(14))
    bottom = top + _TITLE + _LINE * len(panel)
    for end, value, anchor in ((left, first, "la"), (right, last, "ra")):
        draw.line([(end, top + _TITLE - 4), (end, bottom)], FAINT)
        draw.text((end, bottom - 2), number(value), INK, font(11), anchor=anchor)
    for index, score in enumerate(panel):
        y = top + _TITLE + _LINE * index + _LINE / 2 - 4
        draw.text((_MARGIN, y), _shortened(draw, score.subject, left - _MARGIN - 8), INK, font(13), anchor="lm")
        draw.line([(left, y), (right, y)], FAINT)
        if not math.isnan(score.low):
            draw.line([(place(score.low), y), (place(score.high), y)], ACCENT, 3)
        draw.ellipse([place(score.mean) - 5, y - 5, place(score.mean) + 5, y + 5], ACCENT)
        draw.text((right + 12, y), str(score), INK, font(12), anchor="lm")


def _range(panel: Sequence[Score]) -> tuple[float, float]:
    """The ends of the axis: from 0 for distances, which have one; for likenesses, around what there is."""
    ends = [value for score in panel for value in (score.mean, score.low, score.high) if not math.isnan(value)]
    first, last = min(ends), max(ends)
    if panel[0].better == "lower":
        first = min(first, 0.0)
    room = 0.08 * (last - first) or max(abs(last), 1.0) * 0.1
    return (first if first == 0 else first - room), last + room


def _shortened(draw: ImageDraw.ImageDraw, text: str, width: float) -> str:
    if draw.textlength(text, font(13)) <= width:
        return text
    while text and draw.textlength(f"{text}..", font(13)) > width:
        text = text[:-1]
    return f"{text}.."
