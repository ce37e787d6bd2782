"""Make README's picture and the workflows' thumbnails: `python -m tools.thumbnails`. A few minutes on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from profusion import demo
from profusion.pictures import INK, PAPER, to_image
from profusion.residual import Residual
from profusion.toybox.pipeline import Toybox, seeded
from profusion.training import TrainingOptions

ROOT = Path(__file__).parents[1]
CONCEPTS = ("slate and apricot mushroom", "gold and navy cup")
SIDE, GAP = 160, 8


def board(left: Sequence[Tensor], right: Sequence[Tensor], label: str) -> Image.Image:
    """Small pictures to learn from on the left, an arrow, what is drawn on the right."""
    half = (SIDE - GAP) // 2
    width = 2 * SIDE + 3 * GAP + 96
    image = Image.new("RGB", (width, SIDE + 2 * GAP + 26), PAPER)
    draw = ImageDraw.Draw(image)
    for index, picture in enumerate(left[:4]):
        at = GAP + index % 2 * (half + GAP), GAP + index // 2 * (half + GAP)
        image.paste(to_image(picture).resize((half, half), Image.Resampling.LANCZOS), at)
    y, x = GAP + SIDE // 2, SIDE + 2 * GAP + 14
    draw.line([(x, y), (x + 50, y)], INK, 5)
    draw.polygon([(x + 50, y - 12), (x + 68, y), (x + 50, y + 12)], INK)
    image.paste(to_image(right[0]).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (width - SIDE - GAP, GAP))
    draw.text((width / 2, SIDE + GAP + 16), label, INK, ImageFont.load_default(17), anchor="mm")
    return image


def main() -> None:
    toybox = Toybox.load()
    concepts = [demo.drawn_concept(name) for name in CONCEPTS]
    residuals: list[Residual] = [demo.train(toybox, concept, TrainingOptions(steps=400, learning_rate=0.01), print)[0] for concept in concepts]

    def drawn(prompt: str, chosen: Sequence[Residual], seed: int) -> list[Tensor]:
        _, customised = toybox.generate_customised(prompt, chosen, seeded(seed), guidance=demo.GUIDANCE)
        return list(toybox.vae.pictures(customised))

    single = drawn("a photo of a mushroom on snow", residuals[:1], 2)
    both = drawn("a photo of a mushroom and a cup on grass", residuals, 2)
    first, mixed = concepts[0].pictures, torch.cat([concepts[0].pictures[:2], concepts[1].pictures[:2]])
    folder = ROOT / "workflows"
    board(first, single, "learn it, draw it anywhere").save(folder / "infusion_train_and_generate.jpg", quality=90)
    board(mixed, both, "two concepts, one prompt").save(folder / "infusion_two_concepts.jpg", quality=90)
    board(first, single, "the same, on SD 1.5").save(folder / "infusion_sd15.jpg", quality=90)


if __name__ == "__main__":
    main()
