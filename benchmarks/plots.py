"""Lines over a logarithmic axis, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from profusion.metrics.scores import number
from profusion.pictures import FAINT, INK, PAPER, font

COLORS = (
    (214, 86, 48), (240, 150, 60), (150, 60, 30), (120, 120, 128), (40, 110, 190),
    (30, 150, 110), (130, 60, 170), (200, 60, 140), (140, 140, 20), (20, 20, 24),
)  # fmt: skip
_LEFT, _TOP, _BOTTOM, _LEGEND = 64, 40, 40, 250

Line = Sequence[tuple[float, float]]


def lines(series: Mapping[str, Line], title: str, across: str, log_up: bool = False, size=(820, 380)) -> Image.Image:
    """Named lines of (x, y), x > 0 on a logarithmic axis; with `log_up` y too, where zeros stand on the bottom line."""
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    left, right, top, bottom = _LEFT, size[0] - _LEGEND, _TOP, size[1] - _BOTTOM
    xs = sorted({x for line in series.values() for x, _ in line})
    ys = [y for line in series.values() for _, y in line if y > 0] or [1.0]
    floor = min(ys) / 3 if log_up else 0.0
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
        draw.text((left - 6, y), "0" if share == 0 else number(value), INK, font(11), anchor="rm")
    for x in xs:
        draw.text((across_at(x), bottom + 6), f"{x:g}", INK, font(11), anchor="ma")
    for index, (name, line) in enumerate(series.items()):
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
