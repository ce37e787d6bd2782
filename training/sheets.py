"""Picture sheets, so that a person can look: the same scenes as drawn, through the autoencoder, and from their
captions."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from profusion.models.vae import VAE
from profusion.toybox import world
from profusion.toybox.joint import JointToybox
from profusion.toybox.pipeline import Toybox, seeded

from .session import Session

COLUMNS = 8


@cache
def shown_scenes(count: int) -> tuple[world.Scene, ...]:
    """Scenes that training has not seen, the same on every sheet."""
    rng = np.random.default_rng((99, 0))
    return tuple(world.sample_scene(rng, hold_out=False) for _ in range(count))


def drawn_pictures(scenes: tuple[world.Scene, ...]) -> Tensor:
    """Scenes as drawn, (B, SIZE, SIZE, 3) in [0, 1]."""
    return torch.from_numpy(np.stack([world.render(scene).image for scene in scenes])).float() / 255


@torch.no_grad()
def through(vae: VAE, pictures: Tensor) -> Tensor:
    """Pictures (B, SIZE, SIZE, 3) in [0, 1], encoded and decoded."""
    device = next(vae.parameters()).device
    return torch.cat([vae.pictures(vae.latents(some.to(device))).cpu() for some in pictures.split(16)])


def generated(toybox: Toybox | JointToybox, scenes: tuple[world.Scene, ...], steps: int) -> Tensor:
    """A picture from each scene's full caption, (B, SIZE, SIZE, 3)."""
    prompts = [world.full_caption(scene).text for scene in scenes]
    return toybox.vae.pictures(toybox.generate(prompts, seeded(*range(len(prompts))), steps)).cpu()


def write_sheet(session: Session, name: str, vae: VAE | None = None, draw=None) -> None:
    """Write DIR/sheets/NAME.png if it is not there; `draw(scenes)` makes the generated row, if there is one yet."""
    path = session.work / "sheets" / f"{name}.png"
    if path.exists():
        return
    scenes = shown_scenes(session.sheet_scenes)
    rows = [drawn_pictures(scenes)]
    if vae is not None:
        rows.append(through(vae, rows[0]))
    if draw is not None:
        rows.append(draw(scenes))
    path.parent.mkdir(exist_ok=True)
    bands = [row[first : first + COLUMNS] for first in range(0, len(scenes), COLUMNS) for row in rows]
    pixels = torch.cat([torch.cat(list(band), dim=1) for band in bands])
    Image.fromarray((255 * pixels).round().byte().numpy()).save(path)
    print(f"{time.strftime('%H:%M:%S')} sheet: {path}", flush=True)
