"""Painting the toybox world: objects, patterns and backgrounds as 96 x 96 pictures.

Polygons are drawn by Pillow at SUPERSAMPLE times the size and reduced; everything smooth (patterns, light, shadow,
backgrounds) is computed at the final size with numpy. Images are float32 arrays (SIZE, SIZE, 3) of 0..255, masks are
float32 arrays (SIZE, SIZE) of 0..1, positions are (x, y) in pixels.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .shapes import BODY, OUTLINE, OUTLINE_WIDTH, SHAPES

SIZE = 96
SUPERSAMPLE = 3
PATTERNS = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = ("grass", "sand", "snow", "night", "sea", "wall")

_X = np.arange(SIZE, dtype=np.float32)[None, :] + 0.5  # (1, SIZE) and (SIZE, 1): they broadcast
_Y = _X.T
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Sprite:
    """A painted object: `paint` (SIZE, SIZE, 3) is premultiplied by `whole`, the mask of everything painted, outline
    included; `body` is the mask of the part that wears the appearance. `bottom` is the y the object stands on."""

    paint: np.ndarray
    whole: np.ndarray
    body: np.ndarray
    center: tuple[float, float]
    width: float
    bottom: float


def draw_sprite(
    noun: str,
    pattern: str,
    color1: Color | None,
    color2: Color | None,
    center: tuple[float, float],
    diameter: float,
    angle: float = 0.0,
    flip: bool = False,
) -> Sprite:
    """Paint one object; `diameter` is the longer side of its bounding box, `angle` degrees clockwise."""
    layers, (width, height) = _place(noun, center, diameter, angle, flip)
    side = SIZE * SUPERSAMPLE
    paint = Image.new("RGB", (side, side))
    masks = Image.new("RGB", (side, side))  # red: whole, green: body
    on_paint, on_masks = ImageDraw.Draw(paint), ImageDraw.Draw(masks)
    for layer, (grown, polygons) in zip(SHAPES[noun], layers, strict=True):
        for points in grown if layer.outline else ():
            on_paint.polygon(points, fill=OUTLINE)
            on_masks.polygon(points, fill=(255, 0, 0))
        for points in polygons:
            on_paint.polygon(points, fill=(0, 0, 0) if layer.paint is BODY else layer.paint)
            on_masks.polygon(points, fill=(255, 255, 0) if layer.paint is BODY else (255, 0, 0))
    paint = np.asarray(paint.reduce(SUPERSAMPLE), dtype=np.float32)
    masks = np.asarray(masks.reduce(SUPERSAMPLE), dtype=np.float32) / 255
    whole, body = masks[..., 0], masks[..., 1]
    if color1 is not None:
        paint = paint + body[..., None] * fill(pattern, color1, color2, center, diameter, angle)
    return Sprite(_lit(paint, whole, center, width, height), whole, body, center, width, center[1] + height / 2)


def _place(noun, center, diameter, angle, flip):
    """A noun as flat lists of supersampled pixels, ([grown by the outline], [as they are]) a layer, and its size."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn = np.array([[-1.0 if flip else 1.0, 0], [0, 1]]) @ np.array([[c, s], [-s, c]])
    points, mitres, ends = _OUTLINES[noun]
    points, mitres = points @ turn, mitres @ turn
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (diameter - 2 * OUTLINE_WIDTH) / (high - low).max()
    points = SUPERSAMPLE * (scale * (points - (low + high) / 2) + center)
    inner, outer = points.ravel().tolist(), (points + SUPERSAMPLE * mitres).ravel().tolist()
    layers = [([outer[i:j] for i, j in spans], [inner[i:j] for i, j in spans]) for spans in ends]
    return layers, tuple(scale * (high - low))


def _outlines(layers):
    """All points of a shape (n, 2), where each moves in pixels to make room for its layer's outline (n, 2), and for
    each layer the (start, end) of its polygons in the flattened arrays."""
    points, mitres, ends, count = [], [], [], 0
    for layer in layers:
        spans = []
        for polygon in layer.polygons:
            points.append(polygon)
            mitres.append(layer.outline * _mitre(polygon))
            spans.append((2 * count, 2 * (count + len(polygon))))
            count += len(polygon)
        ends.append(spans)
    return np.concatenate(points), np.concatenate(mitres), ends


def _mitre(polygon):
    """Where each corner (n, 2) goes when every edge moves outwards by 1, at most 1.5 away."""
    edge = np.roll(polygon, -1, axis=0) - polygon
    area = np.sum(polygon[:, 0] * np.roll(polygon[:, 1], -1) - polygon[:, 1] * np.roll(polygon[:, 0], -1))
    normal = np.sign(area) * np.stack([edge[:, 1], -edge[:, 0]], axis=1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    both = normal + np.roll(normal, 1, axis=0)
    both /= np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-9)
    return both / np.maximum((both * normal).sum(axis=1, keepdims=True), 1 / 1.5)


_OUTLINES = {noun: _outlines(layers) for noun, layers in SHAPES.items()}


def _lit(paint, whole, center, width, height):
    """Light from the upper left: the far side a little darker, and a soft highlight."""
    u, v = (_X - center[0]) / width * 2, (_Y - center[1]) / height * 2
    shade = 1.03 - 0.13 * np.clip(0.5 * u + 0.8 * v + 0.1, 0, 1.2)
    gleam = 60 * np.exp((u + 0.36) ** 2 / -0.045) * np.exp((v + 0.46) ** 2 / -0.045)
    return np.minimum(paint * shade[..., None] + (gleam * whole)[..., None], 255 * whole[..., None])


def fill(
    pattern: str, color1: Color, color2: Color | None, center: tuple[float, float], diameter: float, angle: float = 0.0
) -> np.ndarray:
    """An endless sheet (SIZE, SIZE, 3) of a pattern that is fixed to the object: striped, dotted or checked.

    The period grows with the object, 11.5 pixels at diameter 42 and 15 at 60, to survive an 8-fold autoencoder.
    """
    base = np.broadcast_to(np.float32(color1), (SIZE, SIZE, 3))
    if pattern == "plain":
        return base
    period = 3.5 + 0.19 * diameter
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    dx, dy = _X - center[0], _Y - center[1]
    x, y = (c * dx + s * dy) / period, (c * dy - s * dx) / period
    if pattern == "striped":
        inside = _wave(x) * period
    elif pattern == "checked":
        a, b = _wave(x + 0.25), _wave(y + 0.25)
        inside = np.sign(a * b) * np.minimum(np.abs(a), np.abs(b)) * period
    else:
        row = np.round(y / 0.87)
        column = x + 0.5 * (row % 2)
        inside = (0.31 - np.hypot(column - np.round(column), y - 0.87 * row)) * period
    share = np.clip(inside + 0.5, 0, 1)[..., None]
    return base + share * (np.float32(color2) - base)


def _wave(x):
    """Signed distance to the edges of a square wave of period 1 that is negative around whole numbers."""
    return np.abs(x - np.round(x)) - 0.25


def compose(background: np.ndarray, sprites: list[Sprite]) -> np.ndarray:
    """Put objects on a background, each with a soft shadow on the ground: uint8 (SIZE, SIZE, 3)."""
    image = background
    for sprite in sprites:
        u = (_X - sprite.center[0] - 2) / (0.56 * sprite.width)
        v = (_Y - sprite.bottom + 1) / (0.13 * sprite.width)
        image = image * (1 - 0.5 * np.exp(-((u * u + v * v) ** 2)))[..., None]
    for sprite in sprites:
        image = image * (1 - sprite.whole[..., None]) + sprite.paint
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def draw_background(name: str, seed: int) -> np.ndarray:
    """One of BACKGROUNDS (SIZE, SIZE, 3); `seed` moves its horizon, clouds, hills, stars and stains."""
    return _PAINTERS[name](np.random.default_rng(seed))


def _noise(rng, columns, rows):
    """Smooth noise of about -1..1 with `columns` x `rows` bumps."""
    grid = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _blend(image, color, share):
    return image + np.clip(share, 0, 1)[..., None] * (np.float32(color) - image)


def _gradient(top, bottom, height=SIZE):
    return _blend(np.broadcast_to(np.float32(top), (SIZE, SIZE, 3)), bottom, _Y / height)


def _below(rng, y, amplitude=2.0):
    """A soft mask of the ground below a rolling horizon at about `y`."""
    phase, length = rng.uniform(0, 2 * np.pi), rng.uniform(55, 85)
    return np.clip(_Y - y - amplitude * np.sin(2 * np.pi * _X / length + phase), 0, 1)


def _clouds(rng, image, y, share=0.75):
    """Two soft white clouds above the horizon, at the sides where objects leave room."""
    for x in (rng.uniform(4, 26), rng.uniform(70, 92)):
        h = y + rng.uniform(-3, 3)
        d = ((_X - x) / 13) ** 2 + ((_Y - h) / 4) ** 2
        d = np.minimum(d, ((_X - x - 3) / 7) ** 2 + ((_Y - h + 3) / 4) ** 2)
        image = _blend(image, (255, 255, 255), share * np.clip(2.2 - 2 * d, 0, 1))
    return image


def _grass(rng):
    horizon = rng.uniform(31, 36)
    image = _clouds(rng, _gradient((118, 192, 240), (206, 234, 248), horizon), 12)
    image = _blend(image, (142, 200, 104), _below(rng, horizon - 5, 3))
    lawn = _gradient((112, 182, 66), (74, 150, 50)) + 13 * _noise(rng, 16, 9)[..., None]
    return _blend(image, lawn, _below(rng, horizon + 3, 1.5))


def _sand(rng):
    horizon = rng.uniform(30, 35)
    image = _gradient((252, 208, 160), (255, 238, 206), horizon)
    image = _blend(image, (226, 178, 116), _below(rng, horizon - 4, 4))
    ripples = np.sin(_Y * 0.72 + 2.2 * _noise(rng, 5, 4))
    dune = _gradient((244, 210, 146), (232, 190, 122)) + 8 * ripples[..., None]
    return _blend(image, dune, _below(rng, horizon + 4, 2.5))


def _snow(rng):
    horizon = rng.uniform(30, 35)
    image = _gradient((160, 188, 216), (208, 222, 236), horizon)
    for x in (rng.uniform(3, 20), rng.uniform(76, 93)):
        top = horizon - 20
        tree = np.clip(0.42 * (_Y - top) - np.abs(_X - x) + 0.5, 0, 1) * (horizon + 6 > _Y)
        image = _blend(image, (92, 132, 128), tree)
    drift = _gradient((240, 245, 252), (222, 232, 246)) + 5 * _noise(rng, 6, 6)[..., None]
    image = _blend(image, drift, _below(rng, horizon + 3, 3))
    return _specks(rng, image, (255, 255, 255), 9, 1.5, 44)


def _specks(rng, image, color, count, radius, lowest):
    for x, y in zip(rng.uniform(3, 93, count), rng.uniform(3, lowest, count), strict=True):
        columns, rows = (slice(max(int(at) - 4, 0), int(at) + 5) for at in (x, y))
        near = np.clip(radius + 0.5 - np.hypot(_X[:, columns] - x, _Y[rows] - y), 0, 1)
        image[rows, columns] = _blend(image[rows, columns], color, near)
    return image


def _night(rng):
    horizon = rng.uniform(62, 68)
    image = _gradient((22, 28, 80), (76, 68, 146), 80)
    image = _specks(rng, image, (255, 250, 214), 16, 1.1, 60)
    moon = np.clip(8.5 - np.hypot(_X - 13, _Y - 13), 0, 1) * np.clip(np.hypot(_X - 17.5, _Y - 11) - 6.8, 0, 1)
    image = _blend(image, (255, 240, 190), moon)
    image = _blend(image, (44, 54, 104), _below(rng, horizon - 6, 4))
    return _blend(image, (30, 42, 76), _below(rng, horizon + 2, 2))


def _sea(rng):
    horizon = rng.uniform(27, 31)
    image = _clouds(rng, _gradient((255, 214, 170), (255, 244, 220), horizon), 11)
    water = _gradient((64, 168, 196), (20, 104, 158))
    crest = np.sin(2 * np.pi * (_Y / 11) + 1.3 * np.sin(2 * np.pi * _X / 24 + rng.uniform(0, 6.3)))
    water = _blend(water, (190, 232, 236), 0.75 * np.clip(3 * crest - 2.1, 0, 1))
    return _blend(image, water, np.clip(_Y - horizon, 0, 1))


def _wall(rng):
    floor = rng.uniform(72, 76)
    height, length = 12, 24
    row = np.floor(_Y / height)
    along = _X + 0.5 * length * (row % 2)
    tint = rng.uniform(-13, 13, (16, 16))[row.astype(int), np.floor(along / length).astype(int)]
    bricks = np.float32((176, 92, 70)) + tint[..., None] * np.float32((1, 0.8, 0.7))
    joint = np.minimum(np.abs(_Y - height * np.round(_Y / height)), np.abs(along - length * np.round(along / length)))
    image = _blend(bricks, (216, 192, 172), 1.7 - joint)
    pavement = _gradient((186, 182, 178), (148, 146, 148)) + 5 * _noise(rng, 8, 8)[..., None]
    return _blend(image, pavement, np.clip(_Y - floor, 0, 1))


_PAINTERS = {"grass": _grass, "sand": _sand, "snow": _snow, "night": _night, "sea": _sea, "wall": _wall}
