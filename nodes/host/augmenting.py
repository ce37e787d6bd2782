"""Variants of one picture: what is around its object drawn anew by the host's sampler under a denoise mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...profusion.augment import composite, moved, redrawn_cells, soft_edge
from ...profusion.pictures import to_image
from ...profusion.references import grey_around
from .display import Progress
from .drawing import SEEDS, Sampling, draw
from .encoding import encode_references

STAY, TURN, MIRROR = "stay", "move and turn", "move, turn and mirror"
PLACES = (STAY, TURN, MIRROR)
"""Where an object is in its variants."""


class _Inpainting:
    """Draws what is around one object anew, with the host's own sampler under a denoise mask."""

    def __init__(self, model: ModelPatcher, clip: CLIP, vae: VAE, picture: Tensor, mask: Tensor):
        """picture (H, W, 3), mask (H, W)."""
        self._model, self._clip, self._vae = model, clip, vae
        (reference,) = encode_references(model, vae, picture[None], mask[None])
        latent = reference.latent[None].cpu()
        self._redrawn = redrawn_cells(mask, tuple(latent.shape[-2:])).to(latent)[None, None]
        # Zero where it is drawn anew: the highest noise level still holds some of the latent under it.
        self._latent = model.model.process_latent_out(latent * (1 - self._redrawn))
        self._extras = {}
        if getattr(model.model, "concat_keys", ()):  # an inpainting model, which is shown what to keep
            masked = vae.encode(grey_around(picture[None], mask[None]))
            self._extras = {"concat_latent_image": masked, "concat_mask": self._redrawn}
        self._negative = self._encode("")

    def _encode(self, text: str) -> list:
        encoded = self._clip.encode_from_tokens_scheduled(self._clip.tokenize(text))
        return [[context, {**extras, **self._extras}] for context, extras in encoded]

    def draw(self, prompt: str, seed: int, sampling: Sampling, callback: Callable) -> Tensor:
        """One picture (H, W, 3), the object's place included."""
        drawn = draw(
            self._model,
            self._encode(prompt),
            self._negative,
            self._latent,
            seed,
            sampling,
            callback,
            noise_mask=self._redrawn,
        )
        return self._vae.decode(drawn).float().cpu()[0, ..., :3]


def variants(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    pictures: Sequence[Tensor],
    masks: Sequence[Tensor],
    prompts: Sequence[str],
    count: int,
    seed: int,
    sampling: Sampling,
    feather: int,
    move: str = STAY,
) -> tuple[list[Tensor], list[Tensor]]:
    """`count` pictures (H, W, 3), and their masks (H, W), with the objects of `pictures` (H, W, 3) inside `masks`;
    pictures and prompts are used in turn.

    feather: pixels outside the mask over which the picture fades into the new background. move: one of PLACES.
    """
    if move not in PLACES:
        raise ValueError(f"object_place is {move!r}: choose {', '.join(PLACES[:-1])} or {PLACES[-1]}")
    progress, made, moved_masks = Progress(count * sampling.steps), [], []
    kept: dict[int, _Inpainting] = {}
    for index in range(count):
        which = index % len(pictures)
        picture, mask = pictures[which], masks[which]
        if move != STAY:
            generator = torch.Generator().manual_seed((seed + index) % 2**63)
            picture, mask = moved(picture, mask, generator, mirror=move == MIRROR)
            inpainting = _Inpainting(model, clip, vae, picture, mask)
        else:
            inpainting = kept[which] = kept.get(which) or _Inpainting(model, clip, vae, picture, mask)

        def report(step: int, *_: Any, index: int = index) -> None:
            newest = to_image(made[-1]) if step == 0 and made else None
            progress.report(index * sampling.steps + step + 1, newest)

        drawn = inpainting.draw(prompts[index % len(prompts)], (seed + index) % SEEDS, sampling, report)
        made.append(composite(drawn, picture, soft_edge(mask, feather)))
        moved_masks.append(mask)
    return made, moved_masks
