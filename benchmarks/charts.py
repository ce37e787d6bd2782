"""Charts of benchmarks, drawn with Pillow as the pack's own pictures are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from profusion.pictures import ACCENT, FAINT, INK, PAPER


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
        return left + (right - left) * (x - x_low) / (x_high - x_low), bottom - (bottom - top) * (y - y_low) / (y_high - y_low)

    draw.text((left, 12), y_label, INK, _font(15))
    draw.text((right, height - 14), x_label, INK, _font(15), anchor="rm")
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = x_low + share * (x_high - x_low), y_low + share * (y_high - y_low)
        across, up = place(x, y)
        draw.line([(left, up), (right, up)], FAINT)
        draw.text((left - 6, up), f"{y:.2f}", INK, _font(12), anchor="rm")
        draw.text((across, bottom + 14), f"{x:.2f}", INK, _font(12), anchor="mm")
    for point in points:
        draw.line([place(point.x, point.y - point.half), place(point.x, point.y + point.half)], FAINT, 2)
    for point in points:
        color, (x, y) = ACCENT if point.accented else INK, place(point.x, point.y)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=color)
        draw.text((x + 7, y - 8), point.mark, color, _font(13), anchor="lm")
    return image


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values' range and a twentieth more on each side."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
