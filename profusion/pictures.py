"""Pictures as tensors in the host's layouts, IMAGE (B, H, W, 3) and MASK (B, H, W) in [0, 1]: reading, grids, plots."""

from __future__ import annotations

import bisect
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from .decoding import OTHER_SUFFIXES, RAW_SUFFIXES, SUFFIXES, PictureError, decode, is_picture, unreadable
from .devices import area_means, smoothly_resized
from .references import INVERT_ALPHA, Fitted, Shown, check_not_inverted, framed, over_grey

MOST_NAMES = 20  # of files, in a message
MOST_LINES, LONGEST_LINE = 200, 256  # of a caption; a path has at most 4096 letters
INK, PAPER, ACCENT, FAINT = (40, 40, 48), (250, 249, 246), (214, 86, 48), (214, 212, 206)


def have_frames(latent_format: Any) -> bool:
    """Whether latents of a host's format are (B, C, frames, H, W), as those of video models are."""
    return getattr(latent_format, "latent_dimensions", 2) == 3


def latent_masks(masks: Tensor, cells: Sequence[int], patch: int = 1) -> Tensor:
    """Object masks (B, H, W) as weights of latent cells (B, h, w): the covered share of each cell, or of each patch of
    so many cells a side, where a network takes those as one."""
    if patch == 1:
        return area_means(masks[:, None].float(), cells)[:, 0]
    patches = area_means(masks[:, None].float(), [math.ceil(side / patch) for side in cells])[:, 0]
    whole = patches.repeat_interleave(patch, dim=-2).repeat_interleave(patch, dim=-1)
    return whole[..., : cells[0], : cells[1]]


def read_pictures(folder: Path, size: int) -> Fitted:
    """Every picture of a folder, by name, as squares of `size` pixels: see `references.framed`.

    An alpha channel is the object's mask; without one the whole picture counts. Raises PictureError where there are
    none, or one cannot be read.
    """
    paths = picture_paths(folder)
    return framed((Shown(*one) for one in read_each(paths)), size, [path.name for path in paths])


def read_each(paths: Sequence[Path]) -> Iterator[tuple[Tensor, Tensor]]:
    """`read_picture` of one after the other. Raises PictureError, which names all that cannot be read."""
    problems: list[str] = []
    for path in paths:
        try:
            picture = read_picture(path)
        except PictureError as problem:
            problems.append(str(problem))
        else:
            if not problems:
                yield picture
    if problems:
        more = [f"and {len(problems) - MOST_NAMES} more"] * (len(problems) > MOST_NAMES)
        raise PictureError("\n".join([*problems[:MOST_NAMES], *more]))


def picture_paths(folder: Path) -> list[Path]:
    """The pictures of a folder, by name: what is one by its bytes, whatever it is called. Hidden files are none, such
    as those that macOS leaves beside pictures.

    Raises PictureError where there are none, and for those that nothing here reads, by their names: to leave them out
    would be to learn from fewer pictures than there seem to be.
    """
    if not folder.is_dir():
        raise PictureError(f"{folder} is not a folder; give one that holds pictures of the concept")
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    raw = {path for path in visible if path.suffix.lower() in RAW_SUFFIXES}
    named = [path for path in visible if path.suffix.lower() in SUFFIXES]
    strange = unreadable(named)
    readable = set(named) - set(strange)
    paths = [path for path in visible if path in readable or (path not in raw and is_picture(path))]
    other = strange + [path for path in visible if path in raw or path.suffix.lower() in OTHER_SUFFIXES]
    other = [path for path in other if path not in paths]
    if other:
        more = f" and {len(other) - MOST_NAMES} more" * (len(other) > MOST_NAMES)
        raise PictureError(
            f"{folder} has pictures that cannot be read: {', '.join(path.name for path in other[:MOST_NAMES])}{more}. "
            "Save them as PNG or JPEG, or take them out of the folder. For HEIC there is also `pip install pillow-heif`"
        )
    if not paths:
        raise PictureError(
            f"no pictures in {folder}: it holds no {', '.join(SUFFIXES)} file, nor another that is one inside"
        )
    return paths


def picture_files(folder: Path) -> list[Path]:
    """What may be pictures in a folder and the folders in it, by name: for sets in which some may be broken.

    By their names, or by their bytes where they have no picture's name. Hidden files are none. A folder that cannot be
    looked into is among them: whoever reads it finds out why. Raises OSError for the first one.
    """
    os.scandir(folder).close()
    found: list[Path] = []
    walk = os.walk(folder, onerror=lambda problem: found.append(Path(problem.filename)))
    for path in (Path(root, name) for root, _, names in walk for name in names):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        suffix = path.suffix.lower()
        if not hidden and (suffix in (*SUFFIXES, *OTHER_SUFFIXES, *RAW_SUFFIXES) or is_picture(path)):
            found.append(path)
    return sorted(found)


def read_picture(path: Path) -> tuple[Tensor, Tensor]:
    """(H, W, 3) and its mask (H, W), of its own size; one of more than two megapixels is reduced to them.

    Raises PictureError, also where it is too large to be decoded at all.
    """
    values = torch.from_numpy(np.array(decode(path))).float().div_(255)
    mask = values[..., 3]
    if not mask.any():
        raise PictureError(f"{path} is wholly transparent, so there is no object to learn")
    check_not_inverted(mask, f"{path} is opaque all around and transparent inside", INVERT_ALPHA)
    return over_grey(values[..., :3], mask), mask


def masked(pictures: Tensor, weights: Tensor) -> Tensor:
    """Pictures (M, H, W, 3) that are pale where the weights (M, h, w) of their cells are 0."""
    shares = smoothly_resized(weights[:, None].float(), pictures.shape[1:3])[:, 0].clamp(0, 1)
    return torch.lerp(torch.ones_like(pictures), pictures, 0.15 + 0.85 * shares[..., None].to(pictures))


def to_image(picture: Tensor) -> Image.Image:
    """(H, W, 3) in [0, 1] -> PIL."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())


def from_image(image: Image.Image) -> Tensor:
    """PIL -> (H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).float() / 255


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def grid(rows: Sequence[tuple[str, Sequence[Tensor]]], captions: Sequence[str] = (), scale: int = 2) -> Image.Image:
    """Labelled rows of pictures, (H, W, 3) each; `captions` stand above the columns."""
    height, width = rows[0][1][0].shape[:2]
    cell, gap, margin, top = (width * scale, height * scale), 8, 132, 54 if captions else 12
    columns = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (margin + columns * (cell[0] + gap) + gap, top + len(rows) * (cell[1] + gap) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        centre = margin + column * (cell[0] + gap) + cell[0] / 2
        text = _wrapped(draw, caption, cell[0])
        draw.multiline_text((centre, top / 2), text, INK, font(14), anchor="mm", align="center")
    for index, (label, pictures) in enumerate(rows):
        y = top + index * (cell[1] + gap)
        draw.multiline_text((12, y + cell[1] / 2), _wrapped(draw, label, margin - 20), INK, font(15), anchor="lm")
        for column, picture in enumerate(pictures):
            sheet.paste(
                to_image(picture).resize(cell, Image.Resampling.LANCZOS), (margin + column * (cell[0] + gap), y)
            )
    return sheet


def _wrapped(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font(14)) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures one under the other, all as wide as the last."""
    width = images[-1].width
    images = [image.resize((width, max(1, round(image.height * width / image.width)))) for image in images]
    sheet = Image.new("RGB", (width, sum(image.height for image in images)), PAPER)
    for index, image in enumerate(images):
        sheet.paste(image, (0, sum(above.height for above in images[:index])))
    return sheet


def tiled(pictures: Sequence[Tensor], columns: int = 3, width: int = 512) -> Image.Image:
    """Pictures (H, W, 3) in rows, `width` pixels wide."""
    columns = min(columns, len(pictures))
    rows = [torch.cat(tuple(pictures[at : at + columns]), dim=1) for at in range(0, len(pictures), columns)]
    rows[-1] = F.pad(rows[-1], (0, 0, 0, rows[0].shape[1] - rows[-1].shape[1]), value=1.0)
    sheet = to_image(torch.cat(rows, dim=0))
    return sheet.resize((width, round(sheet.height * width / sheet.width)), Image.Resampling.LANCZOS)


def caption(text: str, width: int = 640) -> Image.Image:
    """Text as a picture, `width` pixels wide and as high as it takes: lines that are longer go on below."""
    size, margin = width // 22, width // 32
    face, measure = font(size), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    every = (part for line in text.splitlines() for part in _fitted(measure, line, width - 2 * margin, face))
    lines = list(itertools.islice(every, MOST_LINES))
    if next(every, None) is not None:
        lines.append("...")
    image = Image.new("RGB", (width, round(1.4 * size * len(lines)) + 2 * margin), PAPER)
    for index, line in enumerate(lines):
        ImageDraw.Draw(image).text((margin, margin + 1.4 * size * (index + 0.5)), line, INK, face, anchor="lm")
    return image


def captioned(image: Image.Image, text: str) -> Image.Image:
    """A picture with text under it; without text the picture."""
    return stacked([image, caption(text, image.width)]) if text else image


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: int, face: ImageFont.ImageFont) -> Iterator[str]:
    """A line of text as lines that are no wider: broken after a space or one of a path's
    separators, where there is one."""
    while len(text) > LONGEST_LINE or (len(text) > 1 and draw.textlength(text, face) > width):
        counts = range(1, min(len(text), LONGEST_LINE))
        fits = max(1, bisect.bisect_right(counts, width, key=lambda count: draw.textlength(text[:count], face)))  # noqa: B023
        separators = [index for index in range(1, fits + 1) if text[index - 1] in " /\\_-"]
        end = separators[-1] if separators else fits
        yield text[:end]
        text = text[end:]
    yield text


def loss_plot(
    losses: Sequence[float],
    steps: int | None = None,
    size: tuple[int, int] = (512, 288),
    start: int = 0,
    title: str = "loss (eps error inside the mask)",
) -> Image.Image:
    """The loss of each step after `start`, and its running mean, from 0 to `steps` (default: as many as there are)."""
    image = Image.new("RGB", size, PAPER)
    draw, (width, height) = ImageDraw.Draw(image), size
    left, right, top, bottom = 56, width - 14, 34, height - 34
    draw.text((left, 10), title, INK, font(14))
    draw.line([(left, top), (left, bottom), (right, bottom)], INK)
    last = max(steps or start + len(losses), 1)
    draw.text((right, height - 12), f"step {last}", INK, font(12), anchor="rm")
    if not losses:
        return image
    values = np.asarray(losses, dtype=np.float64)
    high = float(np.quantile(values, 0.99)) * 1.05 or 1.0
    window = max(1, len(values) // 12)
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * (bottom - top)
        draw.text((left - 6, y), f"{share * high:.3f}", INK, font(12), anchor="rm")
        draw.line([(left + 1, y), (right, y)], FAINT)

    def points(series: np.ndarray, first: int) -> list[tuple[float, float]]:
        x = left + (right - left) * (np.arange(len(series)) + start + first) / last
        y = bottom - (bottom - top) * np.clip(series / high, 0, 1)
        return list(zip(x.tolist(), y.tolist(), strict=True))

    if len(values) > 1:
        draw.line(points(values, 1), FAINT, 1)
    if len(mean) > 1:
        draw.line(points(mean, window), ACCENT, 2)
    draw.text((right, 10), f"{len(values)} steps, last {window}: {mean[-1]:.4f}", ACCENT, font(14), anchor="ra")
    return image
