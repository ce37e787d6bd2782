"""Painting the toybox world: objects, patterns and backgrounds as SIZE x SIZE pictures.

Polygons are drawn by Pillow at SUPERSAMPLE times the size and reduced; everything smooth (patterns, light, shadow,
backgrounds) is computed at the final size with numpy. Images are float32 arrays (SIZE, SIZE, 3) of 0..255, masks are
float32 arrays (SIZE, SIZE) of 0..1, positions are (x, y) in pixels.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .shapes import BODY, OUTLINE, OUTLINE_WIDTH, SHAPES

SIZE = 128  # the picture's side in pixels; every other length here is drawn for it
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


def through_the_lens(image: np.ndarray) -> np.ndarray:
    """Pictures are taken through a lens that is a little soft, so that an edge between two pixels need not be exact: a
    blur by (1, 4, 1) / 6 each way, of an image or a mask."""
    for axis in (0, 1):
        first, last = (np.take(image, [end], axis=axis) for end in (0, -1))
        padded = np.concatenate([first, image, last], axis=axis)
        before, after = (np.take(padded, range(start, start + SIZE), axis=axis) for start in (0, 2))
        image = (before + 4 * image + after) / 6
    return image


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
    gleam = 55 * np.exp((u + 0.36) ** 2 / -0.05) * np.exp((v + 0.46) ** 2 / -0.05)
    return np.minimum(paint * shade[..., None] + (gleam * whole)[..., None], 255 * whole[..., None])


def fill(
    pattern: str, color1: Color, color2: Color | None, center: tuple[float, float], diameter: float, angle: float = 0.0
) -> np.ndarray:
    """An endless sheet (SIZE, SIZE, 3) of a pattern that is fixed to the object: striped, dotted or checked.

    The period is 20 pixels at diameter 60 and 23 at 84, about 2.5 cells of an 8-fold autoencoder or more.
    """
    base = np.broadcast_to(np.float32(color1), (SIZE, SIZE, 3))
    if pattern == "plain":
        return base
    period = 12.5 + 0.125 * diameter
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
    """Put objects on a background, each with a soft shadow on the ground, and take the picture: uint8 (SIZE, SIZE,
    3)."""
    image = background
    for sprite in sprites:
        u = (_X - sprite.center[0] - 2) / (0.54 * sprite.width)
        v = (_Y - sprite.bottom + 2) / (0.13 * sprite.width)
        image = image * (1 - 0.5 * np.exp(-((u * u + v * v) ** 2)))[..., None]
    for sprite in sprites:
        image = image * (1 - sprite.whole[..., None]) + sprite.paint
    return np.clip(through_the_lens(image) + 0.5, 0, 255).astype(np.uint8)


def draw_background(name: str, seed: int) -> np.ndarray:
    """One of BACKGROUNDS (SIZE, SIZE, 3); `seed` decides its hour, horizon, hills, clouds, trees, moon, waves or
    bricks."""
    return _PAINTERS[name](np.random.default_rng(seed))


def _noise(rng, columns, rows):
    """Smooth noise of about -1..1 with `columns` x `rows` bumps."""
    grid = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _blend(image, color, share):
    return image + np.clip(share, 0, 1)[..., None] * (np.float32(color) - image)


def _between(rng, *colors):
    """A colour at random somewhere between neighbours in a row of colours."""
    at = rng.uniform(0, len(colors) - 1)
    return tuple(float(np.interp(at, range(len(colors)), channel)) for channel in zip(*colors, strict=True))


def _gradient(top, bottom, height=SIZE):
    return _blend(np.broadcast_to(np.float32(top), (SIZE, SIZE, 3)), bottom, _Y / height)


def _below(rng, y, amplitude=3.0):
    """A soft mask of the ground below a rolling horizon at about `y`."""
    phase, length = rng.uniform(0, 2 * np.pi), rng.uniform(70, 120)
    return np.clip(_Y - y - amplitude * np.sin(2 * np.pi * _X / length + phase), 0, 1)


def _disc(x, y, radius):
    return np.clip(radius + 0.5 - np.hypot(_X - x, _Y - y), 0, 1)


def _clouds(rng, image, y, share=0.8):
    """One to three soft white clouds above the horizon, anywhere."""
    for x in rng.permutation([18, 62, 108])[: rng.integers(1, 4)] + rng.uniform(-14, 14):
        h, size = y + rng.uniform(-4, 4), rng.uniform(0.85, 1.25)
        d = ((_X - x) / (17 * size)) ** 2 + ((_Y - h) / (6 * size)) ** 2
        d = np.minimum(d, ((_X - x - 4 * size) / (9 * size)) ** 2 + ((_Y - h + 4 * size) / (6 * size)) ** 2)
        image = _blend(image, (255, 255, 255), share * np.clip(2.2 - 2 * d, 0, 1))
    return image


def _at_a_side(rng):
    """A place left or right of where a single object stands."""
    return rng.uniform(6, 20) if rng.random() < 0.5 else rng.uniform(SIZE - 20, SIZE - 6)


def _grass(rng):
    horizon = rng.uniform(38, 54)
    sky = _between(rng, (104, 186, 240), (150, 214, 246), (196, 206, 250))
    image = _clouds(rng, _gradient(sky, (222, 240, 250), horizon), 15)
    image = _blend(image, _between(rng, (148, 204, 108), (112, 182, 130)), _below(rng, horizon - 7, 5))
    for x in (_at_a_side(rng), _at_a_side(rng))[: rng.integers(0, 3)]:
        crown = rng.uniform(10, 14)
        image = _blend(image, (122, 92, 66), (np.abs(_X - x) < 2.5) * (np.abs(_Y - horizon) < 8.0))
        image = _blend(image, _between(rng, (56, 136, 66), (84, 152, 52)), _disc(x, horizon - 14, crown))
    lawn = _between(rng, (124, 192, 72), (94, 172, 84), (150, 188, 66))
    lawn = _gradient(lawn, np.multiply(lawn, 0.72)) + 9 * _noise(rng, 7, 5)[..., None]
    return _blend(image, lawn, _below(rng, horizon + 3, 2.5))


def _sand(rng):
    horizon = rng.uniform(36, 52)
    sky = _between(rng, (252, 196, 150), (252, 220, 176), (150, 208, 236))
    image = _gradient(sky, (255, 240, 212), horizon)
    image = _blend(image, (255, 250, 220), _disc(_at_a_side(rng), rng.uniform(14, 24), rng.uniform(7, 11)))
    image = _blend(image, _between(rng, (226, 176, 112), (214, 160, 118)), _below(rng, horizon - 5, 7))
    ripples = np.sin(_Y * 2 * np.pi / rng.uniform(18, 24) + 3 * _noise(rng, 3, 3))
    dune = _between(rng, (246, 214, 150), (240, 200, 138), (248, 222, 178))
    dune = _gradient(dune, np.multiply(dune, (0.94, 0.9, 0.82))) + 9 * ripples[..., None]
    return _blend(image, dune, _below(rng, horizon + 5, 4))


def _snow(rng):
    horizon = rng.uniform(40, 54)
    sky = _between(rng, (140, 178, 216), (176, 200, 224), (216, 196, 220))
    image = _gradient(sky, (226, 234, 244), horizon)
    pine = _between(rng, (70, 118, 112), (104, 146, 140))
    for x in (_at_a_side(rng), _at_a_side(rng), rng.uniform(24, 104))[: rng.integers(1, 4)]:
        height = rng.uniform(24, 34)
        cone = np.clip(0.36 * (_Y - horizon - 4 + height) - np.abs(_X - x) + 0.5, 0, 1) * (horizon + 4 > _Y)
        image = _blend(image, pine, cone)
    drift = (
        _gradient((244, 248, 254), _between(rng, (214, 226, 244), (230, 224, 242))) + 5 * _noise(rng, 4, 4)[..., None]
    )
    image = _blend(image, drift, _below(rng, horizon + 3, 4))
    return _specks(rng, image, (255, 255, 255), int(rng.integers(4, 9)), 2.6, 36)


def _specks(rng, image, color, count, radius, lowest):
    for x, y in zip(rng.uniform(3, SIZE - 3, count), rng.uniform(4, lowest, count), strict=True):
        columns, rows = (slice(max(int(at) - 5, 0), int(at) + 6) for at in (x, y))
        near = np.clip(radius + 0.5 - np.hypot(_X[:, columns] - x, _Y[rows] - y), 0, 1)
        image[rows, columns] = _blend(image[rows, columns], color, near)
    return image


def _night(rng):
    horizon = rng.uniform(80, 96)
    sky = _between(rng, (20, 24, 74), (28, 30, 96), (16, 44, 86))
    image = _gradient(sky, _between(rng, (82, 70, 150), (60, 92, 150), (124, 70, 140)), 110)
    image = _specks(rng, image, (255, 248, 206), int(rng.integers(7, 14)), 1.9, 70)
    x, y, radius = _at_a_side(rng), rng.uniform(14, 26), rng.uniform(9, 12)
    bite = np.clip(
        np.hypot(_X - x - (0.55 * radius if x < SIZE / 2 else -0.55 * radius), _Y - y + 3) - 0.8 * radius, 0, 1
    )
    image = _blend(image, (255, 240, 190), _disc(x, y, radius) * bite)
    image = _blend(image, (46, 56, 108), _below(rng, horizon - 9, 7))
    return _blend(image, (30, 42, 78), _below(rng, horizon + 3, 3))


def _sea(rng):
    horizon = rng.uniform(32, 46)
    sky = _between(rng, (255, 202, 158), (255, 232, 200), (164, 214, 244))
    image = _gradient(sky, (255, 246, 226), horizon)
    if rng.random() < 0.5:
        image = _blend(image, (255, 214, 104), _disc(_at_a_side(rng), horizon - rng.uniform(0, 14), rng.uniform(9, 12)))
    else:
        image = _clouds(rng, image, 14)
    water = _gradient(_between(rng, (64, 168, 196), (72, 180, 180)), _between(rng, (20, 104, 158), (28, 84, 150)))
    bend = 1.2 * np.sin(2 * np.pi * _X / rng.uniform(40, 56) + rng.uniform(0, 6.3))
    crest = np.sin(2 * np.pi * _Y / rng.uniform(18, 23) + bend + rng.uniform(0, 6.3))
    water = _blend(water, (170, 222, 232), 0.7 * np.clip(3 * crest - 1.6, 0, 1))
    return _blend(image, water, np.clip(_Y - horizon, 0, 1))


def _wall(rng):
    floor = rng.uniform(90, 104)
    height, length = rng.uniform(19, 23), rng.uniform(38, 46)
    y, x = _Y + rng.uniform(0, height), _X + rng.uniform(0, length)
    row = np.floor(y / height)
    along = x + 0.5 * length * (row % 2)
    tint = rng.uniform(-14, 14, (16, 16))[row.astype(int), np.floor(along / length).astype(int)]
    bricks = np.float32(_between(rng, (178, 90, 70), (156, 92, 84), (196, 132, 92)))
    bricks = bricks + tint[..., None] * np.float32((1, 0.8, 0.7))
    joint = np.minimum(np.abs(y - height * np.round(y / height)), np.abs(along - length * np.round(along / length)))
    image = _blend(bricks, (218, 196, 176), 2.2 - joint)
    pavement = _between(rng, (188, 184, 180), (164, 168, 178), (190, 176, 158))
    pavement = _gradient(pavement, np.multiply(pavement, 0.8)) + 4 * _noise(rng, 5, 5)[..., None]
    return _blend(image, pavement, np.clip(_Y - floor, 0, 1))


_PAINTERS = {"grass": _grass, "sand": _sand, "snow": _snow, "night": _night, "sea": _sea, "wall": _wall}
