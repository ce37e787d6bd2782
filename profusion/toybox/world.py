"""The toybox world: drawn, captioned pictures in which nouns matter.

A scene is one object near the centre, or two side by side, on one of six backgrounds. Ten generic nouns fix a
silhouette and wear any appearance (a pattern in one or two colours); three more imply theirs (a lemon is yellow).
Captions leave attributes out at random, so that a bare noun stands for many appearances: Infusion (arXiv 2404.14007)
moves only the noun's value, and can work only where that row carries the object.

Some of the world is never drawn for training: `is_held_out` keeps back about 8 % of the nameable combinations, and
`CONCEPTS` wear pairs of colours whose neighbourhood the sampler avoids.
"""

import colorsys
import zlib
from dataclasses import dataclass, replace

import numpy as np

from . import drawing
from .drawing import BACKGROUNDS, PATTERNS, SIZE, Color

PALETTE: dict[str, Color] = {
    "red": (216, 32, 36),
    "orange": (250, 134, 10),
    "yellow": (252, 222, 40),
    "green": (40, 160, 62),
    "blue": (36, 92, 224),
    "purple": (126, 44, 172),
    "pink": (252, 146, 196),
    "white": (250, 250, 250),
}
GENERIC_NOUNS = ("ball", "star", "heart", "house", "fish", "cat", "mushroom", "cup", "car", "butterfly")
FIXED_NOUNS = ("lemon", "ladybird", "watermelon")  # the name alone implies the appearance
NOUNS = GENERIC_NOUNS + FIXED_NOUNS
OPENINGS = ("", "a photo of", "a picture of")
BACKGROUND_PHRASES = {
    "grass": "on grass",
    "sand": "on sand",
    "snow": "on snow",
    "night": "at night",
    "sea": "on the sea",
    "wall": "by a brick wall",
}
_TURN = {
    "ball": 14,
    "star": 8,
    "heart": 9,
    "house": 2,
    "fish": 10,
    "cat": 4,
    "mushroom": 6,
    "cup": 4,
    "car": 4,
    "butterfly": 10,
    "lemon": 12,
    "ladybird": 6,
    "watermelon": 10,
}

# Pixels: where objects stand, alone or side by side, and their longer sides.
MIDDLE, LEFT, RIGHT = (SIZE / 2, 67), (SIZE / 4 + 0.5, 68), (3 * SIZE / 4 - 0.5, 68)
SINGLE_DIAMETERS, PAIR_DIAMETERS = (78, 92), (57, 60)
OFF_PALETTE_SHARE = 0.35
TWO_OBJECT_SHARE = 0.25
HELD_OUT_SHARE = 0.08
CONCEPT_RADIUS = 75.0  # RGB distance; a pair of colours closer than this to a concept's, both at once, is not drawn


@dataclass(frozen=True)
class Appearance:
    """What a generic noun wears: a pattern of PATTERNS in RGB colours 0..255, and their names in PALETTE if any."""

    pattern: str
    color1: Color
    color2: Color | None = None
    name1: str | None = None
    name2: str | None = None

    def __post_init__(self):
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern is {self.pattern!r}; use one of {', '.join(PATTERNS)}")
        if (self.color2 is None) != (self.pattern == "plain"):
            raise ValueError("color2 must be None for a plain appearance and given for every other pattern")
        for name, color in ((self.name1, self.color1), (self.name2, self.color2)):
            if color is not None and not (len(color) == 3 and all(0 <= value <= 255 for value in color)):
                raise ValueError(f"colour {color!r} is not three numbers 0..255")
            if name is not None and PALETTE.get(name) != color:
                raise ValueError(f"colour name {name!r} does not stand for {color} in the palette")

    @property
    def named(self) -> bool:
        """Whether a caption can name every colour."""
        return self.name1 is not None and (self.color2 is None or self.name2 is not None)


@dataclass(frozen=True)
class SceneObject:
    """One object: appearance is None exactly for FIXED_NOUNS. center, diameter in pixels; angle in degrees."""

    noun: str
    appearance: Appearance | None
    center: tuple[float, float]
    diameter: float
    angle: float = 0.0
    flip: bool = False

    def __post_init__(self):
        if self.noun not in NOUNS:
            raise ValueError(f"noun is {self.noun!r}; use one of {', '.join(NOUNS)}")
        if (self.appearance is None) != (self.noun in FIXED_NOUNS):
            raise ValueError(f"a {self.noun} {'has its own' if self.noun in FIXED_NOUNS else 'needs an'} appearance")
        if not 8 <= self.diameter <= SIZE:
            raise ValueError(f"diameter is {self.diameter}; it must lie in 8..{SIZE} pixels")


@dataclass(frozen=True)
class Scene:
    """One or two objects, left one first, on one of BACKGROUNDS; `seed` decides the background's texture."""

    objects: tuple[SceneObject, ...]
    background: str
    seed: int = 0

    def __post_init__(self):
        if len(self.objects) not in (1, 2):
            raise ValueError(f"a scene holds one or two objects, not {len(self.objects)}")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background is {self.background!r}; use one of {', '.join(BACKGROUNDS)}")
        if len(self.objects) == 2 and self.objects[0].center[0] >= self.objects[1].center[0]:
            raise ValueError("the left object must come first")


@dataclass(frozen=True)
class Picture:
    """A drawn scene: image uint8 (SIZE, SIZE, 3); for each object, uint8 0..255 (objects, SIZE, SIZE), `masks` of its
    whole silhouette and `bodies` of the part that wears the appearance (a fixed noun's is all of it)."""

    image: np.ndarray
    masks: np.ndarray
    bodies: np.ndarray
    scene: Scene


@dataclass(frozen=True)
class Caption:
    """A caption and where its parts are, as indices into `text.split()`.

    noun_words: one index an object. attribute_words: a tuple an object, of the colour and pattern words present (not
    the "and" between colours). background_words: those that name the background ("brick", "wall"), if any do.
    """

    text: str
    noun_words: tuple[int, ...]
    attribute_words: tuple[tuple[int, ...], ...]
    background_words: tuple[int, ...]


def render(scene: Scene) -> Picture:
    """Draw a scene."""
    sprites = []
    for item in scene.objects:
        look = item.appearance
        wear = ("plain", None, None) if look is None else (look.pattern, look.color1, look.color2)
        sprites.append(drawing.draw_sprite(item.noun, *wear, item.center, item.diameter, item.angle, item.flip))
    image = drawing.compose(drawing.draw_background(scene.background, scene.seed), sprites)
    masks = np.stack([_bytes(sprite.whole) for sprite in sprites])
    bodies = np.stack(
        [masks[i] if item.appearance is None else _bytes(sprites[i].body) for i, item in enumerate(scene.objects)]
    )
    return Picture(image, masks, bodies, scene)


def _bytes(mask: np.ndarray) -> np.ndarray:
    return np.round(255 * drawing.through_the_lens(mask)).astype(np.uint8)


def sample_scene(rng: np.random.Generator, *, hold_out: bool = True) -> Scene:
    """Draw a scene at random; with `hold_out`, never one that `is_held_out`."""
    while True:
        background = str(rng.choice(BACKGROUNDS))
        if rng.random() < TWO_OBJECT_SHARE:
            left, right = rng.choice(NOUNS, size=2, replace=False)
            objects = (
                _sample_object(rng, str(left), LEFT, 1.0, PAIR_DIAMETERS),
                _sample_object(rng, str(right), RIGHT, 1.0, PAIR_DIAMETERS),
            )
        else:
            objects = (_sample_object(rng, str(rng.choice(NOUNS))),)
        scene = Scene(objects, background, int(rng.integers(2**31)))
        if not (hold_out and is_held_out(scene)):
            return scene


def _sample_object(rng, noun, center=MIDDLE, offset=6.0, diameters=SINGLE_DIAMETERS, appearance=None) -> SceneObject:
    if appearance is None and noun in GENERIC_NOUNS:
        appearance = sample_appearance(rng)
    x, y = center + rng.uniform(-offset, offset, 2)
    turn = rng.uniform(-1, 1) * _TURN[noun]
    return SceneObject(
        noun, appearance, (float(x), float(y)), float(rng.uniform(*diameters)), float(turn), bool(rng.random() < 0.5)
    )


def sample_appearance(rng: np.random.Generator) -> Appearance:
    """An appearance in palette colours, or (OFF_PALETTE_SHARE) in others that have no name here."""
    pattern = str(rng.choice(PATTERNS, p=(0.28, 0.24, 0.24, 0.24)))
    if rng.random() >= OFF_PALETTE_SHARE:
        first, second = (str(name) for name in rng.choice(list(PALETTE), size=2, replace=False))
        if pattern == "plain":
            return Appearance(pattern, PALETTE[first], None, first)
        return Appearance(pattern, PALETTE[first], PALETTE[second], first, second)
    while True:
        first, second = _off_palette_color(rng), _off_palette_color(rng)
        if pattern == "plain":
            return Appearance(pattern, first)
        if _distance(first, second) >= 120 and not near_concept(first, second):
            return Appearance(pattern, first, second)


def _off_palette_color(rng) -> Color:
    while True:
        red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.15, 1), rng.uniform(0.35, 1))
        color = (round(255 * red), round(255 * green), round(255 * blue))
        if min(_distance(color, other) for other in PALETTE.values()) > 40:
            return color


def _distance(a: Color, b: Color) -> float:
    return float(np.hypot(np.hypot(a[0] - b[0], a[1] - b[1]), a[2] - b[2]))


def near_concept(first: Color, second: Color) -> bool:
    """Whether two colours, in either order, are within CONCEPT_RADIUS of a concept's two at once."""
    return any(
        max(_distance(a, look.color1), _distance(b, look.color2)) < CONCEPT_RADIUS
        for _, look in CONCEPTS.values()
        for a, b in ((first, second), (second, first))
    )


def is_held_out(scene: Scene) -> bool:
    """Whether a nameable object's (colours, pattern, noun, background) is one of the ~8 % kept from training."""
    for item in scene.objects:
        look = item.appearance
        if look is not None and look.named:
            key = f"{look.name1} {look.name2} {look.pattern} {item.noun} {scene.background}"
            if zlib.crc32(key.encode()) % 1000 < 1000 * HELD_OUT_SHARE:
                return True
    return False


def caption(scene: Scene, rng: np.random.Generator, *, bare: float = 0.25, no_background: float = 0.15) -> Caption:
    """Describe a scene, leaving things out at random.

    bare: how often an object whose attributes have names is mentioned by its noun alone (half more often where only
    its pattern has one). no_background: how often the background is left out.
    """
    opening = str(rng.choice(OPENINGS, p=(0.35, 0.45, 0.2)))
    mentions = [_attributes(item.appearance, rng, bare) for item in scene.objects]
    return _assemble(scene, opening, mentions, rng.random() >= no_background)


def full_caption(scene: Scene, opening: str = "a photo of") -> Caption:
    """Describe a scene with every attribute that has a name."""
    return _assemble(scene, opening, [_all_attributes(item.appearance) for item in scene.objects], True)


def bare_caption(scene: Scene, opening: str = "a photo of", background: bool = True) -> Caption:
    """Describe a scene by its nouns alone: what Infusion is trained and asked with."""
    return _assemble(scene, opening, [[] for _ in scene.objects], background)


def _all_attributes(look: Appearance | None) -> list[str]:
    if look is None:
        return []
    colors = [name for name in (look.name1, look.name2) if name is not None]
    return " and ".join(colors).split() + ([] if look.pattern == "plain" else [look.pattern])


def _attributes(look: Appearance | None, rng, bare: float) -> list[str]:
    words = _all_attributes(look)
    if not words or rng.random() < (bare if look.named else 1.5 * bare):
        return []
    if look.pattern == "plain" or not look.named:
        return words
    first, second, pattern = look.name1, look.name2, look.pattern
    choices = (words, [pattern], [first, pattern], [first, "and", second])
    return choices[rng.choice(4, p=(0.6, 0.15, 0.15, 0.1))]


def _assemble(scene: Scene, opening: str, mentions: list[list[str]], with_background: bool) -> Caption:
    words, nouns, attributes = opening.split(), [], []
    for i, (item, mention) in enumerate(zip(scene.objects, mentions, strict=True)):
        first = (mention or [item.noun])[0]
        words += (["and"] if i else []) + ["an" if first[0] in "aeiou" else "a"]
        attributes.append(tuple(len(words) + k for k, word in enumerate(mention) if word != "and"))
        words += [*mention, item.noun]
        nouns.append(len(words) - 1)
    background = ()
    if with_background:
        phrase = BACKGROUND_PHRASES[scene.background].split()
        small = ("on", "at", "by", "a", "the")
        background = tuple(len(words) + k for k, word in enumerate(phrase) if word not in small)
        words += phrase
    return Caption(" ".join(words), tuple(nouns), tuple(attributes), background)


def unseen_prompts(n: int, rng: np.random.Generator) -> list[tuple[Scene, Caption]]:
    """n scenes of one nameable object that training never draws, each with its full caption."""
    prompts = []
    while len(prompts) < n:
        item = _sample_object(rng, str(rng.choice(GENERIC_NOUNS)))
        scene = Scene((item,), str(rng.choice(BACKGROUNDS)), int(rng.integers(2**31)))
        if is_held_out(scene):
            prompts.append((scene, full_caption(scene)))
    return prompts


# name -> (noun, appearance): for training nothing here, nor anything near its two colours together, is ever drawn.
CONCEPTS: dict[str, tuple[str, Appearance]] = {
    "teal and coral ball": ("ball", Appearance("striped", (0, 140, 140), (255, 120, 96))),
    "gold and navy cup": ("cup", Appearance("checked", (232, 178, 34), (22, 34, 104))),
    "magenta and lime fish": ("fish", Appearance("striped", (214, 24, 132), (164, 232, 44))),
    "chocolate and cream cat": ("cat", Appearance("striped", (112, 62, 28), (252, 226, 176))),
    "turquoise and maroon butterfly": ("butterfly", Appearance("dotted", (72, 216, 208), (124, 14, 44))),
    "indigo and peach star": ("star", Appearance("striped", (66, 40, 140), (255, 204, 138))),
    "olive and sky house": ("house", Appearance("checked", (126, 128, 28), (150, 214, 252))),
    "rust and lavender heart": ("heart", Appearance("dotted", (180, 70, 20), (204, 180, 252))),
    "mint and plum car": ("car", Appearance("checked", (152, 240, 190), (96, 22, 82))),
    "slate and apricot mushroom": ("mushroom", Appearance("dotted", (72, 100, 128), (255, 180, 100))),
}


def concept(name: str) -> tuple[str, Appearance]:
    """The (noun, appearance) of one of CONCEPTS."""
    if name not in CONCEPTS:
        raise ValueError(f"no concept {name!r}; use one of {', '.join(CONCEPTS)}")
    return CONCEPTS[name]


def concept_pictures(name: str, n: int, rng: np.random.Generator) -> list[Picture]:
    """n pictures of a concept alone, on backgrounds in random order, none repeated before all six were used."""
    noun, look = concept(name)
    order = np.concatenate([rng.permutation(len(BACKGROUNDS)) for _ in range(-(-n // len(BACKGROUNDS)))] or [[]])[:n]
    pictures = []
    for index in order:
        item = _sample_object(rng, noun, offset=5.0, appearance=look)
        scene = Scene((replace(item, flip=False),), BACKGROUNDS[int(index)], int(rng.integers(2**31)))
        pictures.append(render(scene))
    return pictures
