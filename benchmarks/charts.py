"""Charts of benchmarks, drawn with Pillow as the pack's own pictures are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from profusion.pictures import ACCENT, FAINT, INK, PAPER, font

COLORS = (
    (214, 86, 48),
    (240, 150, 60),
    (150, 60, 30),
    (120, 120, 128),
    (40, 110, 190),
    (30, 150, 110),
    (130, 60, 170),
    (200, 60, 140),
    (140, 140, 20),
    (20, 20, 24),
)

Line = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Point:
    """x, y and half of y's interval; `mark` is written beside it. Accented points are those to look at."""

    x: float
    y: float
    half: float
    mark: str
    accented: bool = False


def scatter(points: Sequence[Point], x_label: str, y_label: str, size: tuple[int, int] = (900, 460)) -> Image.Image:
    """Points with their intervals, on axes that just hold them."""
    image = Image.new("RGB", size, PAPER)
    draw, (width, height) = ImageDraw.Draw(image), size
    left, right, top, bottom = 64, width - 24, 40, height - 52
    x_low, x_high = _range([point.x for point in points])
    y_low, y_high = _range([point.y + sign * point.half for point in points for sign in (-1, 1)])

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * (x - x_low) / (x_high - x_low), bottom - (bottom - top) * (y - y_low) / (
            y_high - y_low
        )

    draw.text((left, 12), y_label, INK, font(15))
    draw.text((right, height - 14), x_label, INK, font(15), anchor="rm")
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = x_low + share * (x_high - x_low), y_low + share * (y_high - y_low)
        across, up = place(x, y)
        draw.line([(left, up), (right, up)], FAINT)
        draw.text((left - 6, up), f"{y:.2f}", INK, font(12), anchor="rm")
        draw.text((across, bottom + 14), f"{x:.2f}", INK, font(12), anchor="mm")
    for point in points:
        draw.line([place(point.x, point.y - point.half), place(point.x, point.y + point.half)], FAINT, 2)
    for point in points:
        color, (x, y) = ACCENT if point.accented else INK, place(point.x, point.y)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=color)
        draw.text((x + 7, y - 8), point.mark, color, font(13), anchor="lm")
    return image


def lines(series: Mapping[str, Line], title: str, across: str, log_up: bool = False, size=(820, 380)) -> Image.Image:
    """Named lines of (x, y), x > 0 on a logarithmic axis; with `log_up` y too, where zeros stand on the bottom line."""
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    left, right, top, bottom = 64, size[0] - 250, 40, size[1] - 40
    xs = sorted({x for line in series.values() for x, _ in line})
    all_ys = [y for line in series.values() for _, y in line]
    ys = [y for y in all_ys if y > 0] or [1.0]
    zeros = not log_up or min(all_ys) <= 0
    floor = min(ys) / (3 if zeros else 1.5) if log_up else 0.0
    high = max(ys) * (1.5 if log_up else 1.08)

    def across_at(x: float) -> float:
        if len(xs) < 2:
            return (left + right) / 2
        return left + (right - left) * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])

    def up_at(y: float) -> float:
        share = math.log(max(y, floor) / floor) / math.log(high / floor) if log_up else y / high
        return bottom - (bottom - top) * share

    draw.text((12, 10), title, INK, font(15))
    draw.text((right, size[1] - 8), across, INK, font(12), anchor="rb")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - share * (bottom - top)
        value = floor * (high / floor) ** share if log_up else share * high
        draw.line([(left, y), (right, y)], FAINT)
        draw.text((left - 6, y), "0" if zeros and share == 0 else f"{value:.3g}", INK, font(11), anchor="rm")
    for x in xs:
        draw.text((across_at(x), bottom + 6), f"{x:g}", INK, font(11), anchor="ma")
    for index, (name, line) in reversed([*enumerate(series.items())]):  # the first lie on top
        color = COLORS[index % len(COLORS)]
        points = [(across_at(x), up_at(y)) for x, y in sorted(line)]
        if len(points) > 1:
            draw.line(points, color, 3)
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], color)
        y = top + 20 * index
        draw.line([(right + 16, y + 8), (right + 36, y + 8)], color, 3)
        draw.text((right + 42, y), name, INK, font(12))
    return image


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values' range and a twentieth more on each side."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin
