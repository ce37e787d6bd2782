"""Pictures as people have them, as one set: batches and lists, of any sizes and shapes, and their masks alike.

A picture is brought to another size by cropping it to the new proportions, where that keeps most of its object if a
mask says where that is, and resizing the rest (Lanczos). What was done is said in words, for whoever gave the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decoding import PictureError
from .devices import smoothly_resized

NATIVE = {"SD 1.x": 512, "SD 2.x": 512, "SDXL": 1024, "Toybox": 128}
"""Pixels a side of the pictures that a model was trained on, by its name; SD 2.x has some of 768."""

INVERT_MASK = (
    "Load Image gives such a mask for a picture whose background is transparent: put Invert Mask between. If the "
    "object does reach all edges, paint a corner of the mask black, or leave the mask out"
)
INVERT_ALPHA = "Make the rest transparent in its place. If the object does reach all edges, make a corner transparent"
HOLE = 0.01  # of a mask: a smaller black part is no sign that it is inverted
SMALLEST = 8  # pixels a side of a picture that is resized
MOST_LISTED = 4  # sizes, or pictures, in a note
MOST_AREAS = 4  # of the model's own size: larger pictures are brought to that, since memory and time run out at theirs
AS_MUCH = 0.01  # of an object: parts of a picture that differ by less of it hold as much of it
KEPT = 0.9  # of an object: where a crop keeps less, that is said


class Shown(NamedTuple):
    """One picture (H, W, 3) in [0, 1], and how much each of its pixels belongs to the object (H, W)."""

    colours: Tensor
    weight: Tensor


class Fitted(NamedTuple):
    """Pictures of one size (M, h, w, 3), their object masks (M, h, w), and what was done to them, in words."""

    pictures: Tensor
    masks: Tensor
    note: str


def gather(
    images: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor] | None = None, measured: str = ""
) -> list[Shown]:
    """Every picture of a host's IMAGE, or of a list of them, each of its own size, with its object's mask.

    images: (M, H, W, C) or (H, W, C). C is 1 (grey), 2 (grey, alpha), 3 or 4 (RGB, alpha); alpha is a mask too, and
    what is transparent turns grey. masks: (N, H, W) or (H, W), white at the object: one for each picture or one for
    all, of any size with the picture's proportions. measured: the masks' input, where nothing is learned. Raises
    PictureError, which says what is wrong with which.
    """
    pictures = list(_pictures(images))
    if not pictures:
        raise PictureError("no pictures: connect one to five pictures of the concept")
    shown = [_opaque(picture, number) for number, picture in enumerate(pictures, start=1)]
    if masks is not None:
        drawn = _masks(masks, len(shown), measured)
        shown = [Shown(one.colours, one.weight * _fitting(mask, one)) for one, mask in zip(shown, drawn, strict=True)]
    empty = next((number for number, one in enumerate(shown, start=1) if not one.weight.any()), None)
    if empty:
        raise PictureError(f"picture {empty} has nothing to learn: no pixel of it is both opaque and inside its mask")
    return shown


def together(shown: Sequence[Shown], multiple: int = 8, native: int | None = None) -> Fitted:
    """Pictures of one size, whose sides are multiples of `multiple`, as encoders want them.

    Those of one size keep it and lose at most their edges, unless they have more than MOST_AREAS times native x native
    pixels. Others get the mean of their proportions, and that area (default: that of the smallest).
    """
    sizes = [_size(one) for one in shown]
    for size in sizes:
        _check_size(size, multiple)
    large = native is not None and len(set(sizes)) == 1 and math.prod(sizes[0]) > MOST_AREAS * native**2
    if len(set(sizes)) == 1 and not large:
        height, width = (side - side % multiple for side in sizes[0])
        parts, how = [_trimmed(one, height, width) for one in shown], "cropped"
    else:
        height, width = _common_size(sizes, multiple, native)
        parts, how = [_brought(one, height, width) for one in shown], "cropped and resized"
    fitted = _stacked(parts, how)
    if native is None or (not large and (height, width) == (native, native)):
        return fitted
    if large:
        said = (
            f"More than {MOST_AREAS} times the model's own {_written((native, native))} is brought to as many as those"
        )
        return fitted._replace(note=f"{fitted.note}. {said}")
    advice = ": resize the pictures to about that, it trains better and faster" * (height * width > 2 * native**2)
    return fitted._replace(note=f"{fitted.note}. The model's own size is {_written((native, native))}{advice}")


def framed(shown: Iterable[Shown], side: int, names: Sequence[str] = ()) -> Fitted:
    """Pictures as squares of `side` pixels: the largest square of each, around its object, resized.

    They may be made one after the other: of each no more is kept than the square. names: what they are called.
    """
    parts = []
    for one in shown:
        _check_size(_size(one), SMALLEST)
        parts.append(_brought(one, side, side))
    return _stacked(parts, "cropped and resized", names)


def concept_pictures(
    images: Tensor | Sequence[Tensor],
    masks: Tensor | Sequence[Tensor] | None = None,
    multiple: int = 8,
    native: int | None = None,
) -> Fitted:
    """The pictures of a concept as training takes them; see `gather` and `together`."""
    return together(gather(images, masks), multiple, native)


def check_not_inverted(mask: Tensor, said: str, fix: str, learned: bool = True) -> None:
    """Raise PictureError where a mask (H, W) is white all around and black inside: most likely it is the wrong way
    round. All around: at the four corners and along three whole borders, since a bust reaches one. said: which mask and
    how it looks; fix: what to do."""
    white = mask > 0.5
    borders = white[0], white[-1], white[:, 0], white[:, -1]
    corners = all(bool(border[0] & border[-1]) for border in borders)
    whole = sum(bool(border.all()) for border in borders)
    if corners and whole >= 3 and (~white).float().mean() > HOLE:
        harm = ": what surrounds the object would be learned" * learned
        raise PictureError(f"{said}, so it seems to be inverted{harm}. {fix}")


def over_grey(colours: Tensor, alpha: Tensor) -> Tensor:
    """Grey under what is transparent: whatever colour hides there is not part of the picture."""
    return colours * alpha[..., None] + 0.5 * (1 - alpha[..., None])


def grey_around(pictures: Tensor, masks: Tensor) -> Tensor:
    """Pictures (P, H, W, 3) as a PromptNet sees them: grey where their mask (P, H, W) is black."""
    return torch.lerp(torch.full_like(pictures, 0.5), pictures, masks[..., None])


def _pictures(images: Tensor | Sequence[Tensor]) -> Iterator[Tensor]:
    """(H, W, C) each."""
    for part in [images] if isinstance(images, Tensor) else images:
        part = part[None] if part.ndim == 3 else part
        if part.ndim != 4 or not 1 <= part.shape[-1] <= 4:
            raise PictureError(
                f"pictures of shape {tuple(part.shape)}: give (pictures, height, width, 1 to 4 channels)"
            )
        if 0 in part.shape[1:3]:
            raise PictureError(f"pictures of {part.shape[2]}x{part.shape[1]} pixels: give some that show anything")
        yield from part


def _opaque(picture: Tensor, number: int) -> Shown:
    """A picture (H, W, C) and what is opaque in it."""
    if not torch.isfinite(picture).all():
        raise PictureError(f"picture {number} has values that are not numbers: the node that made it overflowed")
    picture, channels = picture.float().clamp(0, 1), picture.shape[-1]
    colours = picture[..., : channels - (channels % 2 == 0)].expand(*picture.shape[:2], 3)
    alpha = torch.ones_like(picture[..., 0]) if channels % 2 else picture[..., -1]
    if channels % 2 == 0:
        check_not_inverted(alpha, f"picture {number} is opaque all around and transparent inside", INVERT_ALPHA)
    return Shown(over_grey(colours, alpha), alpha)


def _masks(masks: Tensor | Sequence[Tensor], count: int, measured: str = "") -> list[Tensor]:
    """(H, W) each, in [0, 1], as many as there are pictures."""
    parts = [masks] if isinstance(masks, Tensor) else masks
    drawn = [mask.float() for part in parts for mask in part.reshape(-1, *part.shape[-2:])]
    if len(drawn) not in (1, count):
        raise PictureError(f"{len(drawn)} masks for {count} pictures: give one for each, or one for all")
    of = f" of {measured}" * bool(measured)
    for number, mask in enumerate(drawn, start=1):
        if not torch.isfinite(mask).all():
            raise PictureError("a mask has values that are not numbers: the node that made it overflowed")
        if not (mask > 0).any():
            raise PictureError(
                f"mask {number}{of} is all black{', so nothing of its picture would be learned' * (not of)}. Paint the "
                "object white in it, or connect no mask"
            )
        check_not_inverted(mask, f"mask {number}{of} is white all around and black inside", INVERT_MASK, not of)
    drawn = [mask.clamp(0, 1) for mask in drawn]
    return drawn if len(drawn) == count else drawn * count


def _fitting(mask: Tensor, one: Shown) -> Tensor:
    """A mask at the size of its picture."""
    (high, wide), (height, width) = mask.shape, one.weight.shape
    mask = mask.to(one.weight)
    if (high, wide) == (height, width):
        return mask
    same_proportions = abs(high * width - wide * height) <= 0.05 * max(high * width, wide * height)
    if high < height // 8 or wide < width // 8 or not same_proportions:
        raise PictureError(
            f"a mask of {wide}x{high} pixels does not fit pictures of {width}x{height}: give one of their size"
        )
    return _whitened(smoothly_resized(mask[None, None], (height, width))[0, 0])


def _whitened(mask: Tensor) -> Tensor:
    """White stays white: what rounding leaves would count as the concept's surroundings, and as all of them."""
    mask = mask.clamp(0, 1)
    return torch.where(mask > 1 - 1e-5, torch.ones_like(mask), mask)


def _common_size(sizes: Sequence[tuple[int, int]], multiple: int, native: int | None) -> tuple[int, int]:
    """The mean of their proportions, and an area: (height, width)."""
    area = min(height * width for height, width in sizes) if native is None else native**2
    ratio = math.exp(sum(math.log(width / height) for height, width in sizes) / len(sizes))
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    return tuple(max(multiple, round(side / multiple) * multiple) for side in (height, width))


class _Part(NamedTuple):
    """A part of a picture, the size (height, width) of all of it, and how much of its object the part keeps."""

    shown: Shown
    whole: tuple[int, int]
    kept: float = 1.0


def _trimmed(one: Shown, height: int, width: int) -> _Part:
    """The centre of a picture, unless that loses much of its object that another part would keep."""
    return _cropped(one, height, width, [side / 2 for side in _size(one)], 1 - KEPT)


def _brought(one: Shown, height: int, width: int) -> _Part:
    """A picture cropped to these proportions, around its object, and resized; one of this size as it is."""
    whole = _size(one)
    if whole == (height, width):
        return _Part(one, whole)
    part = _cropped(one, *largest_window(whole, (height, width)), _centre(one.weight))
    colours, weight = part.shown
    if _size(part.shown) == (height, width):
        return part
    smooth = smoothly_resized(weight[None, None], (height, width))[0, 0]
    return part._replace(shown=Shown(_resized(colours, height, width), _whitened(smooth)))


def largest_window(size: Sequence[int], proportions: Sequence[int]) -> tuple[int, int]:
    """The largest window of these proportions in something of this size; all are (height, width)."""
    scale = min(whole / side for whole, side in zip(size, proportions, strict=True))
    tall, broad = (max(1, min(whole, round(side * scale))) for whole, side in zip(size, proportions, strict=True))
    return tall, broad


def _cropped(one: Shown, tall: int, broad: int, centre: Sequence[float], as_much: float = AS_MUCH) -> _Part:
    """The window that holds most of the object: of several that hold as much, the one nearest to this centre.

    as_much: the share of the object by which they may differ.
    """
    along = zip(_along(one.weight), (tall, broad), centre, strict=True)
    top, left = (_start(sums, side, middle, as_much) for sums, side, middle in along)
    part = Shown(*(part[top : top + tall, left : left + broad] for part in one))
    masked = bool(one.weight.min() < 0.5)  # without a mask all of it is white, and nobody said what its object is
    return _Part(part, _size(one), float(part.weight.sum() / one.weight.sum()) if masked else 1.0)


def _start(sums: Tensor, side: int, centre: float, as_much: float) -> int:
    """Where a window of `side` begins on an axis, by the object's weight along it (length,)."""
    before = torch.cat([sums.new_zeros(1), sums.cumsum(0)])
    held = before[side:] - before[: len(before) - side]
    most = (held >= held.max() - as_much * before[-1]).nonzero()[:, 0]
    return int(most[(most - math.floor(centre - side / 2 + 1e-3)).abs().argmin()])


def _centre(weight: Tensor) -> list[float]:
    """The middle of an object's weight (H, W), down and across."""
    return [float((torch.arange(len(sums)).to(sums) + 0.5) @ sums / sums.sum()) for sums in _along(weight)]


def _along(weight: Tensor) -> list[Tensor]:
    """The sums of a weight (H, W) in its rows and in its columns, in float64, which not every device has."""
    return [weight.sum(dim=1 - axis).cpu().double() for axis in (0, 1)]


def _resized(colours: Tensor, height: int, width: int) -> Tensor:
    """(H, W, 3) -> (height, width, 3), by Lanczos in 8 bits: what PromptNet's authors do to their pictures."""
    image = Image.fromarray((colours * 255).round().byte().cpu().numpy())
    resized = np.array(image.resize((width, height), Image.Resampling.LANCZOS))
    return torch.from_numpy(resized).to(colours).div_(255)


def _stacked(parts: Sequence[_Part], how: str, names: Sequence[str] = ()) -> Fitted:
    """Pictures that are of one size by now, and what was done to them."""
    pictures, masks = zip(*(part.shown for part in parts), strict=True)
    size, sizes = _size(parts[0].shown), [part.whole for part in parts]
    done = "" if set(sizes) == {size} else f", {how} from {_listed(sizes)}"
    note = f"{len(parts)} picture{'s' * (len(parts) > 1)} of {_written(size)}{done}{_lost(parts, names)}"
    return Fitted(torch.stack(pictures), torch.stack(masks), note)


def _lost(parts: Sequence[_Part], names: Sequence[str]) -> str:
    """Which pictures lost much of their object, as sentences after another one."""
    lost = [(number, part.kept) for number, part in enumerate(parts) if part.kept < KEPT]
    each = [f"{names[at] if names else f'picture {at + 1}'} keeps {kept:.0%}" for at, kept in lost[:MOST_LISTED]]
    more = f", and {len(lost) - MOST_LISTED} more lose as much" * (len(lost) > MOST_LISTED)
    return f". Of its object {', '.join(each)}{more}: crop it yourself to show more" if lost else ""


def _check_size(size: tuple[int, int], smallest: int) -> None:
    """Raise PictureError for a picture (height, width) that shows nothing at all."""
    if min(size) < smallest:
        raise PictureError(
            f"pictures of {size[1]}x{size[0]} pixels are too small to encode; give at least {smallest}x{smallest}"
        )


def _size(one: Shown) -> tuple[int, int]:
    return one.weight.shape[0], one.weight.shape[1]


def _written(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]} pixels"


def _listed(sizes: Sequence[tuple[int, int]]) -> str:
    """Sizes in words, each once."""
    distinct = list(dict.fromkeys(sizes))
    more = f" and {len(distinct) - MOST_LISTED} other sizes" * (len(distinct) > MOST_LISTED)
    return ", ".join(f"{wide}x{high}" for high, wide in distinct[:MOST_LISTED]) + more
