"""The silhouettes of the toybox world, as polygons.

A shape is a sequence of layers painted one over the other. Coordinates are arbitrary (x right, y down): `drawing`
turns, mirrors and scales a shape so that the longer side of its bounding box is the object's diameter.
"""

from dataclasses import dataclass

import numpy as np

BODY = None  # the paint of the part of a shape that wears the object's appearance
OUTLINE = (44, 36, 48)
OUTLINE_WIDTH = 3.0  # pixels of the picture, outside the polygon


@dataclass(frozen=True)
class Layer:
    """Polygons painted together, so that no outline separates them.

    polygons: arrays (points, 2). paint: an RGB colour 0..255, or BODY. outline: its width in pixels.
    """

    polygons: tuple[np.ndarray, ...]
    paint: tuple[int, int, int] | None
    outline: float = OUTLINE_WIDTH


def polygon(*points: tuple[float, float], rounds: int = 0) -> np.ndarray:
    """A closed polygon (points, 2), its corners cut `rounds` times (Chaikin) to round them."""
    corners = np.array(points, dtype=np.float64)
    for _ in range(rounds):
        after = np.roll(corners, -1, axis=0)
        corners = np.stack([0.8 * corners + 0.2 * after, 0.2 * corners + 0.8 * after], axis=1).reshape(-1, 2)
    return corners


def ellipse(
    x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360, tilt: float = 0
) -> np.ndarray:
    """An ellipse, or its segment from `start` to `end` degrees (clockwise from the right), turned by `tilt`."""
    closed = abs(end - start) == 360  # then the last point would repeat the first
    turn = np.radians(np.linspace(start, end, max(8, round(abs(end - start) / 9)), endpoint=not closed))
    points = np.stack([rx * np.cos(turn), ry * np.sin(turn)], axis=1)
    c, s = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    return points @ np.array([[c, s], [-s, c]]) + (x, y)


def stroke(path: np.ndarray, width: float) -> np.ndarray:
    """A polygon that follows `path` (points, 2) at a constant width."""
    path = np.asarray(path, dtype=np.float64)
    along = np.gradient(path, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True)
    return np.concatenate([path + across * width / 2, (path - across * width / 2)[::-1]])


def mirrored(*polygons: np.ndarray) -> tuple[np.ndarray, ...]:
    """The polygons and their mirror images about x = 0."""
    return polygons + tuple(points * (-1, 1) for points in polygons)


def _ball() -> tuple[Layer, ...]:
    return (Layer((ellipse(0, 0, 1, 1),), BODY),)


def _star() -> tuple[Layer, ...]:
    turn = np.radians(np.arange(10) * 36 - 90)
    radius = np.where(np.arange(10) % 2, 0.56, 1.0)
    tips = np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)
    return (Layer((polygon(*tips, rounds=1),), BODY),)


def _heart() -> tuple[Layer, ...]:
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(turn) ** 3
    y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
    return (Layer((np.stack([x, y], axis=1) / 16,), BODY),)


def _house() -> tuple[Layer, ...]:
    roof = polygon((-1.12, -0.2), (0, -1.06), (1.12, -0.2), (0.98, 0.0), (0, -0.74), (-0.98, 0.0))
    return (
        Layer((polygon((0.4, -0.98), (0.74, -0.98), (0.74, -0.2), (0.4, -0.2)),), (150, 84, 66)),
        Layer((polygon((-0.92, -0.1), (0, -0.8), (0.92, -0.1), (0.92, 1.0), (-0.92, 1.0)),), BODY),
        Layer((roof,), (98, 84, 112)),
        Layer((polygon((-0.2, 1.0), (-0.2, 0.46), (0.2, 0.46), (0.2, 1.0)),), (122, 72, 42), 2.2),
        Layer((ellipse(0, -0.16, 0.18, 0.18),), (255, 240, 170), 2.2),
    )


def _fish() -> tuple[Layer, ...]:
    tail = polygon((0.34, 0), (1.02, -0.66), (0.84, 0), (1.02, 0.66), rounds=1)
    fins = polygon((-0.36, -0.4), (0.02, -0.84), (0.46, -0.68), (0.35, -0.2), rounds=1)
    belly = polygon((-0.2, 0.4), (0.1, 0.8), (0.38, 0.7), (0.3, 0.25), rounds=1)
    return (
        Layer((fins, belly, tail, ellipse(-0.24, 0, 0.8, 0.6)), BODY),
        Layer((ellipse(-0.62, -0.14, 0.21, 0.21),), (252, 252, 252), 1.8),
        Layer((ellipse(-0.66, -0.14, 0.11, 0.11),), OUTLINE, 0),
        Layer((stroke(ellipse(-1.0, 0.12, 0.3, 0.2, 5, 80), 0.1),), OUTLINE, 0),
    )


def _cat() -> tuple[Layer, ...]:
    tail = stroke(ellipse(0.54, 0.44, 0.44, 0.44, 120, -75), 0.26)
    ears = mirrored(polygon((-0.72, -0.4), (-0.7, -1.08), (-0.12, -0.8), rounds=1))
    inner = mirrored(polygon((-0.56, -0.62), (-0.57, -0.9), (-0.3, -0.76)))
    return (
        Layer((tail,), BODY),
        Layer((polygon((-0.6, 0.9), (-0.44, -0.1), (0.44, -0.1), (0.6, 0.9), rounds=2),), BODY),
        Layer(mirrored(ellipse(0.26, 0.82, 0.24, 0.15)), (255, 246, 232), 2.0),
        Layer((*ears, ellipse(0, -0.34, 0.76, 0.54)), BODY),
        Layer(inner, (240, 160, 160), 0),
        Layer((ellipse(0, -0.1, 0.32, 0.22),), (255, 246, 232), 0),
        Layer(mirrored(ellipse(0.34, -0.42, 0.17, 0.19)), (196, 232, 96), 1.8),
        Layer(mirrored(ellipse(0.31, -0.42, 0.08, 0.15)), OUTLINE, 0),
        Layer((polygon((-0.14, -0.22), (0.14, -0.22), (0, -0.04)),), (214, 92, 110), 0),
    )


def _mushroom() -> tuple[Layer, ...]:
    stem = polygon((-0.34, -0.1), (0.34, -0.1), (0.48, 0.92), (0, 1.0), (-0.48, 0.92), rounds=1)
    cap = np.concatenate([ellipse(0, 0.12, 1, 1.08, 180, 360), ellipse(0, 0.12, 1, 0.2, 0, 180)])
    return (
        Layer((stem,), (252, 238, 206)),
        Layer((ellipse(0, 0.2, 0.5, 0.16),), (222, 196, 154), 0),
        Layer((cap,), BODY),
    )


def _cup() -> tuple[Layer, ...]:
    wall = np.concatenate(
        [
            [(-0.78, -0.62)],
            ellipse(0, 0.72, 0.58, 0.2, 180, 0),
            [(0.78, -0.62)],
        ]
    )
    return (
        Layer((stroke(ellipse(0.7, -0.02, 0.52, 0.44, -95, 110), 0.26), wall, ellipse(0, -0.62, 0.78, 0.22)), BODY),
        Layer((ellipse(0, -0.62, 0.62, 0.13),), (108, 66, 40), 2.0),
    )


def _car() -> tuple[Layer, ...]:
    cabin = polygon((-0.8, -0.05), (-0.54, -0.88), (0.42, -0.88), (0.76, -0.05), rounds=1)
    chassis = polygon((-1, -0.16), (0.6, -0.26), (1, -0.1), (1.02, 0.5), (-1.02, 0.5), rounds=1)
    windows = (
        polygon((-0.52, -0.26), (-0.38, -0.64), (-0.12, -0.64), (-0.12, -0.26)),
        polygon((0.06, -0.26), (0.06, -0.64), (0.28, -0.64), (0.46, -0.26)),
    )
    return (
        Layer((cabin, chassis), BODY),
        Layer(windows, (206, 234, 246), 1.6),
        Layer((ellipse(0.9, 0.08, 0.12, 0.13),), (255, 236, 130), 1.6),
        Layer(mirrored(ellipse(0.56, 0.5, 0.28, 0.28)), (58, 56, 64), 1.6),
        Layer(mirrored(ellipse(0.56, 0.5, 0.13, 0.13)), (214, 216, 222), 0),
    )


def _butterfly() -> tuple[Layer, ...]:
    feelers = mirrored(
        stroke(np.array([(0.03, -0.5), (0.1, -0.74), (0.26, -0.9)]), 0.11), ellipse(0.28, -0.9, 0.1, 0.1)
    )
    upper = polygon((0.02, -0.1), (0.3, -0.78), (0.82, -0.92), (1.02, -0.5), (0.72, 0.06), (0.02, 0.12), rounds=2)
    lower = polygon((0.02, 0.0), (0.62, -0.02), (0.88, 0.36), (0.66, 0.86), (0.3, 0.78), (0.02, 0.2), rounds=2)
    return (
        Layer(feelers, OUTLINE, 0),
        Layer(mirrored(lower), BODY),
        Layer(mirrored(upper), BODY),
        Layer((ellipse(0, 0.04, 0.13, 0.54), ellipse(0, -0.48, 0.17, 0.17)), (74, 58, 56), 1.2),
    )


def _lemon() -> tuple[Layer, ...]:
    half = ((-1.04, 0.02), (-0.86, -0.18), (-0.5, -0.6), (0, -0.74), (0.5, -0.6), (0.86, -0.18))
    fruit = polygon(*half, *((-x, 0.04 - y) for x, y in half), rounds=1)
    leaf = polygon((0.0, -0.6), (0.1, -0.92), (0.5, -1.14), (0.92, -1.02), (0.66, -0.72), (0.3, -0.56), rounds=2)
    pores = tuple(ellipse(x, y, 0.09, 0.07) for x, y in ((-0.2, 0.32), (0.3, 0.22), (-0.56, 0.06)))
    return (
        Layer((fruit,), (252, 226, 58)),
        Layer(pores, (226, 178, 36), 0),
        Layer((leaf,), (86, 168, 62), 2.2),
    )


def _ladybird() -> tuple[Layer, ...]:
    legs = tuple(stroke(np.array([(x, 0.4), (x - 0.07, 0.66)]), 0.04) for x in (-0.4, 0.1, 0.6))
    feelers = (stroke(np.array([(-0.82, 0.0), (-0.9, -0.26), (-0.98, -0.34)]), 0.02),)
    dome = ellipse(0.18, 0.46, 0.86, 1.06, 180, 360)
    dots = ((-0.24, 0.16), (0.08, -0.28), (0.34, 0.18), (0.66, -0.14))
    return (
        Layer(legs + feelers, OUTLINE),
        Layer((ellipse(-0.74, 0.18, 0.35, 0.33),), (56, 50, 58)),
        Layer((dome,), (224, 44, 38)),
        Layer(tuple(ellipse(x, y, 0.18, 0.18) for x, y in dots), (44, 36, 40), 0),
        Layer((ellipse(-0.86, 0.1, 0.13, 0.13),), (252, 252, 252), 0),
    )


def _watermelon() -> tuple[Layer, ...]:
    seeds = ((-0.46, -0.16), (0, -0.14), (0.46, -0.16), (-0.24, 0.16), (0.24, 0.16))
    return (
        Layer((ellipse(0, -0.42, 1, 1, 0, 180),), (46, 142, 62)),
        Layer((ellipse(0, -0.42, 0.87, 0.87, 0, 180),), (232, 246, 196), 0),
        Layer((ellipse(0, -0.42, 0.75, 0.75, 0, 180),), (240, 72, 82), 0),
        Layer(tuple(ellipse(x, y, 0.09, 0.12) for x, y in seeds), (52, 34, 36), 0),
    )


SHAPES: dict[str, tuple[Layer, ...]] = {
    "ball": _ball(),
    "star": _star(),
    "heart": _heart(),
    "house": _house(),
    "fish": _fish(),
    "cat": _cat(),
    "mushroom": _mushroom(),
    "cup": _cup(),
    "car": _car(),
    "butterfly": _butterfly(),
    "lemon": _lemon(),
    "ladybird": _ladybird(),
    "watermelon": _watermelon(),
}
