"""What a Toybox is trained with, and how long each part of it takes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

STAGES = ("draw", "vae", "judge", "decoder", "text", "unet", "vision", "mmdit", "export")


class RecipeError(ValueError):
    """Counts that make no training, or not the one that a folder was begun with."""


@dataclass(frozen=True)
class Recipe:
    """Counts of drawn pictures and of optimiser steps. The same recipe, seed and device give the same weights."""

    seed: int = 0
    pictures: int = 24_000
    vae_steps: int = 6_000
    decoder_steps: int = 1_500
    judge_scenes: int = 500
    judge_steps: int = 1_000
    text_steps: int = 3_000
    unet_steps: int = 16_000
    vision_steps: int = 1_500
    mmdit_steps: int = 13_000
    batch: int = 32
    sheet_every: int = 2_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < (0 if name == "seed" else 1):
                raise RecipeError(f"{name} is {value}; give at least {0 if name == 'seed' else 1}")

    def steps(self, stage: str) -> int:
        """How many steps of its own kind a stage has: pictures, optimiser steps, or one."""
        return self.pictures if stage == "draw" else getattr(self, f"{stage}_steps", 1)

    def keep(self, work: Path) -> None:
        """Note the recipe in a work folder; RecipeError if the folder was begun with another one."""
        path = work / "recipe.json"
        if not path.exists():
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")
            return
        begun = json.loads(path.read_text())
        for name, value in asdict(self).items():
            if begun.get(name, value) != value:
                raise RecipeError(
                    f"{work} was begun with {name}={begun.get(name)}, not {value}: go on with that, or take another "
                    "folder"
                )


SECONDS_A_STEP = {
    "draw": 0.006,
    "vae": 0.23,
    "decoder": 0.5,
    "judge": 0.35,
    "text": 0.15,
    "unet": 0.4,
    "vision": 0.25,
    "mmdit": 0.25,
    "export": 5.0,
}
"""On two cores of a CPU with bfloat16 instructions and nothing else to do: what the time left is estimated from."""
