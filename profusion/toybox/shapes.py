"""The silhouettes of the toybox world, as polygons.

A shape is a sequence of layers painted one over the other. Coordinates are arbitrary (x right, y down): `drawing`
turns, mirrors and scales a shape so that the longer side of its bounding box is the object's diameter.
"""

from dataclasses import dataclass

import numpy as np

BODY = None  # the paint of the part of a shape that wears the object's appearance
OUTLINE = (44, 36, 48)
OUTLINE_WIDTH = 1.7  # pixels of the picture, outside the polygon


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
    radius = np.where(np.arange(10) % 2, 0.52, 1.0)
    tips = np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)
    return (Layer((polygon(*tips, rounds=1),), BODY),)


def _heart() -> tuple[Layer, ...]:
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(turn) ** 3
    y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
    return (Layer((np.stack([x, y], axis=1) / 16,), BODY),)


def _house() -> tuple[Layer, ...]:
    roof = polygon((-1.08, -0.12), (0, -1.02), (1.08, -0.12), (0.94, 0.08), (0, -0.7), (-0.94, 0.08))
    return (
        Layer((polygon((0.42, -0.95), (0.7, -0.95), (0.7, -0.2), (0.42, -0.2)),), (150, 84, 66)),
        Layer((polygon((-0.86, 0), (0, -0.8), (0.86, 0), (0.86, 0.95), (-0.86, 0.95)),), BODY),
        Layer((roof,), (98, 84, 112)),
        Layer((polygon((-0.16, 0.95), (-0.16, 0.4), (0.2, 0.4), (0.2, 0.95)),), (122, 72, 42), 1.3),
        Layer((ellipse(0.02, -0.14, 0.2, 0.2),), (255, 240, 170), 1.3),
    )


def _fish() -> tuple[Layer, ...]:
    tail = polygon((0.42, 0), (1.0, -0.52), (0.86, 0), (1.0, 0.52), rounds=1)
    fins = polygon((-0.3, -0.4), (0.1, -0.72), (0.42, -0.6), (0.35, -0.2), rounds=1)
    belly = polygon((-0.15, 0.4), (0.12, 0.68), (0.32, 0.6), (0.3, 0.25), rounds=1)
    return (
        Layer((fins, belly, tail, ellipse(-0.22, 0, 0.78, 0.52)), BODY),
        Layer((ellipse(-0.62, -0.12, 0.17, 0.17),), (252, 252, 252), 1.0),
        Layer((ellipse(-0.65, -0.12, 0.09, 0.09),), OUTLINE, 0),
        Layer((stroke(ellipse(-0.98, 0.12, 0.26, 0.16, 10, 80), 0.07),), OUTLINE, 0),
    )


def _cat() -> tuple[Layer, ...]:
    tail = stroke(ellipse(0.52, 0.46, 0.42, 0.42, 120, -75), 0.2)
    ears = mirrored(polygon((-0.66, -0.42), (-0.64, -1.05), (-0.12, -0.78), rounds=1))
    inner = mirrored(polygon((-0.54, -0.62), (-0.55, -0.88), (-0.32, -0.76)))
    whiskers = mirrored(
        stroke(np.array([(0.3, -0.16), (0.8, -0.24)]), 0.035), stroke(np.array([(0.3, -0.1), (0.78, -0.04)]), 0.035)
    )
    return (
        Layer((tail,), BODY),
        Layer((polygon((-0.56, 0.9), (-0.4, -0.1), (0.4, -0.1), (0.56, 0.9), rounds=2),), BODY),
        Layer(mirrored(ellipse(0.24, 0.84, 0.22, 0.13)), (255, 246, 232), 1.2),
        Layer((*ears, ellipse(0, -0.36, 0.68, 0.5)), BODY),
        Layer(inner, (240, 160, 160), 0),
        Layer((ellipse(0, -0.12, 0.26, 0.18),), (255, 246, 232), 0),
        Layer(mirrored(ellipse(0.29, -0.4, 0.14, 0.17)), (196, 232, 96), 1.0),
        Layer(mirrored(ellipse(0.27, -0.4, 0.06, 0.14)), OUTLINE, 0),
        Layer((polygon((-0.1, -0.2), (0.1, -0.2), (0, -0.08)),), (214, 92, 110), 0),
        Layer(whiskers, OUTLINE, 0),
    )


def _mushroom() -> tuple[Layer, ...]:
    stem = polygon((-0.28, -0.1), (0.28, -0.1), (0.42, 0.92), (0, 1.0), (-0.42, 0.92), rounds=1)
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
        Layer((stroke(ellipse(0.68, -0.02, 0.48, 0.42, -95, 110), 0.2), wall, ellipse(0, -0.62, 0.78, 0.22)), BODY),
        Layer((ellipse(0, -0.62, 0.66, 0.15),), (108, 66, 40), 1.1),
    )


def _car() -> tuple[Layer, ...]:
    cabin = polygon((-0.72, -0.05), (-0.46, -0.62), (0.36, -0.62), (0.66, -0.05), rounds=1)
    chassis = polygon((-1, -0.06), (0.6, -0.16), (1, 0.0), (1.02, 0.44), (-1.02, 0.44), rounds=1)
    windows = (
        polygon((-0.52, -0.12), (-0.36, -0.46), (-0.1, -0.46), (-0.1, -0.12)),
        polygon((0.03, -0.12), (0.03, -0.46), (0.28, -0.46), (0.46, -0.12)),
    )
    return (
        Layer((cabin, chassis), BODY),
        Layer(windows, (206, 234, 246), 1.1),
        Layer((ellipse(0.93, 0.1, 0.09, 0.1),), (255, 236, 130), 0.9),
        Layer(mirrored(ellipse(0.54, 0.42, 0.27, 0.27)), (58, 56, 64), 1.2),
        Layer(mirrored(ellipse(0.54, 0.42, 0.12, 0.12)), (214, 216, 222), 0),
    )


def _butterfly() -> tuple[Layer, ...]:
    feelers = mirrored(
        stroke(np.array([(0.03, -0.5), (0.1, -0.74), (0.28, -0.88)]), 0.06), ellipse(0.29, -0.88, 0.06, 0.06)
    )
    upper = polygon((0.02, -0.1), (0.3, -0.78), (0.82, -0.92), (1.02, -0.5), (0.72, 0.06), (0.02, 0.12), rounds=2)
    lower = polygon((0.02, 0.0), (0.62, -0.02), (0.88, 0.36), (0.66, 0.86), (0.3, 0.78), (0.02, 0.2), rounds=2)
    return (
        Layer(feelers, OUTLINE, 0),
        Layer(mirrored(lower), BODY),
        Layer(mirrored(upper), BODY),
        Layer((ellipse(0, 0.04, 0.1, 0.52), ellipse(0, -0.48, 0.13, 0.13)), (74, 58, 56), 0.8),
    )


def _lemon() -> tuple[Layer, ...]:
    fruit = polygon(
        (-1.04, 0.02),
        (-0.86, -0.16),
        (-0.5, -0.56),
        (0, -0.68),
        (0.5, -0.56),
        (0.86, -0.16),
        (1.04, 0.02),
        (0.86, 0.2),
        (0.5, 0.56),
        (0, 0.68),
        (-0.5, 0.56),
        (-0.86, 0.2),
        rounds=1,
    )
    leaf = polygon((0.78, -0.1), (0.5, -0.5), (0.62, -0.86), (1.0, -0.8), (1.02, -0.4), rounds=2)
    pores = tuple(ellipse(x, y, 0.05, 0.04) for x, y in ((-0.2, 0.3), (0.25, 0.2), (-0.55, 0.08), (0.05, 0.48)))
    return (
        Layer((fruit,), (252, 226, 58)),
        Layer(pores, (226, 178, 36), 0),
        Layer((leaf,), (86, 168, 62), 1.3),
    )


def _ladybird() -> tuple[Layer, ...]:
    legs = tuple(stroke(np.array([(x, 0.4), (x - 0.08, 0.68)]), 0.12) for x in (-0.4, 0.1, 0.6))
    feelers = (stroke(np.array([(-0.86, 0.0), (-0.96, -0.22), (-1.08, -0.3)]), 0.07),)
    dome = ellipse(0.18, 0.46, 0.86, 1.06, 180, 360)
    dots = ((-0.22, 0.16), (0.1, -0.3), (0.36, 0.18), (0.66, -0.12), (0.84, 0.3))
    return (
        Layer(legs + feelers, OUTLINE, 0),
        Layer((ellipse(-0.74, 0.18, 0.33, 0.31),), (56, 50, 58)),
        Layer((dome,), (224, 44, 38)),
        Layer(tuple(ellipse(x, y, 0.15, 0.15) for x, y in dots), (44, 36, 40), 0),
        Layer((ellipse(-0.86, 0.12, 0.1, 0.1),), (252, 252, 252), 0),
    )


def _watermelon() -> tuple[Layer, ...]:
    seeds = ((-0.5, -0.16), (-0.18, -0.14), (0.18, -0.16), (0.5, -0.14), (-0.32, 0.14), (0.02, 0.18), (0.34, 0.12))
    return (
        Layer((ellipse(0, -0.42, 1, 1, 0, 180),), (46, 142, 62)),
        Layer((ellipse(0, -0.42, 0.87, 0.87, 0, 180),), (232, 246, 196), 0),
        Layer((ellipse(0, -0.42, 0.78, 0.78, 0, 180),), (240, 72, 82), 0),
        Layer(tuple(ellipse(x, y, 0.055, 0.085) for x, y in seeds), (52, 34, 36), 0),
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
