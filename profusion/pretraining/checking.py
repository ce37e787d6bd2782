"""Whether S* says something of pictures that the training has not seen: its loss, and what is drawn of it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..diffusion import per_row, sample_euler, sampling_sigmas, training_sigmas
from ..loop import generator_of
from ..pictures import grid
from ..promptnet.pseudo_word import ALONE
from ..promptnet.training import draw_noise
from .encoding import Encoders
from .engine import Engine

SHOWN, SHEET_STEPS, CFG = 8, 20, 4.0
NOISES = 4  # of each picture, at which the loss is taken
_SEED = 7_000_003


@dataclass(frozen=True)
class Checked:
    """What a validation found. loss and word_loss: with S*, and with the one word that every S* started as.
    similarity: mean cosine of CLIP's image embeddings, of a picture and what its S* alone draws; None without any."""

    loss: float
    word_loss: float
    similarity: float | None = None

    def __str__(self) -> str:
        text = f"on pictures kept apart the loss is {self.loss:.4f} with S* and {self.word_loss:.4f} with one word"
        return text if self.similarity is None else f"{text}; drawn from S* alone they are {self.similarity:.3f} alike"


class Validation:
    """Pictures kept apart, (V, H, W, 3), uint8, at least one, the same in every process, of which each does its share:
    what is found is the same for any number of processes, up to rounding."""

    def __init__(self, engine: Engine, encoders: Encoders, pictures: Tensor):
        ranks = engine.ranks
        self._engine, self._encoders, self._count = engine, encoders, len(pictures)
        # As many in each process, which FSDP needs: the last one again where they do not come out even.
        numbers = range(ranks.rank, -(-len(pictures) // ranks.world) * ranks.world, ranks.world)
        self._numbers = [min(number, len(pictures) - 1) for number in numbers]
        self._own = sum(number < len(pictures) for number in numbers)
        self._pictures = pictures[self._numbers]
        self.features = encoders.features(self._pictures)
        self._start = engine.network.start.detach().clone()
        self._word_loss: float | None = None

    @torch.no_grad()
    def loss(self) -> Checked:
        """The losses, always at the same noise, over all processes' pictures; the network's average, where it has
        one."""
        engine = self._engine
        with engine.averaged():
            if self._word_loss is None:  # it never changes
                self._word_loss = engine.ranks.sums([self._sum_of_losses(self._start)])[0] / self._count
            own = engine.ranks.sums([self._sum_of_losses(None)])[0] / self._count
        return Checked(own, self._word_loss)

    def _sum_of_losses(self, word: Tensor | None) -> float:
        engine, total = self._engine, 0.0
        latents, image_tokens = (part.to(engine.ranks.device) for part in self.features)
        sigmas = training_sigmas()
        for index in range(NOISES):
            generator = generator_of(_SEED + index)
            drawn = draw_noise(engine.options, sigmas, tuple(latents.shape[1:]), generator, self._count)
            noise, sigma = drawn.noise[self._numbers].to(latents), drawn.sigma[self._numbers].to(latents)
            losses = []
            for row in range(len(latents)):
                one = slice(row, row + 1)
                parts = (latents[one], image_tokens[one], noise[one], sigma[one])
                losses.append(engine.objective(*parts, drawn.prompt, word).item())
            total += sum(losses[: self._own])
        return total / NOISES

    @torch.no_grad()
    def drawn(self, most: int = SHOWN) -> tuple[Image.Image, float | None]:
        """A sheet of pictures with what their S* alone draws under each, and how alike they are."""
        engine, ranks = self._engine, self._engine.ranks
        each = min(len(self._pictures), max(1, most // ranks.world))
        latents, image_tokens = (part[:each].to(ranks.device) for part in self.features)
        with engine.averaged():
            found = drawn_alone(engine, latents, image_tokens, self._numbers)
        vae = self._encoders.vae
        pictures = [vae.pictures(one.to(vae.quant_conv.weight)).float().cpu() for one in found.split(1)]
        made, given = torch.cat(pictures), self._pictures[:each].float() / 255
        embeddings = [self._encoders.embeddings(some) for some in (made, given)]
        alike = None if embeddings[0] is None else (embeddings[0] * embeddings[1]).sum(dim=1).cpu().tolist()
        own = slice(min(each, self._own))
        parts = [self._numbers[own], (255 * given).byte()[own], (255 * made).byte()[own], alike and alike[own]]
        gathered = ranks.gathered(parts)
        order = torch.tensor([number for part in gathered for number in part[0]]).argsort()
        rows = [torch.cat([part[index] for part in gathered])[order].float() / 255 for index in (1, 2)]
        captions = [str(number) for number in range(1, len(rows[0]) + 1)]
        sheet = grid([("picture", list(rows[0])), ("S* alone", list(rows[1]))], captions, 1)
        every = None if alike is None else [value for part in gathered for value in part[3]]
        return sheet, None if every is None else sum(every) / len(every)


def drawn_alone(
    engine: Engine,
    latents: Tensor,
    image_tokens: Tensor,
    numbers: Sequence[int],
    steps: int = SHEET_STEPS,
    cfg: float = CFG,
) -> Tensor:
    """What S* of pictures draws by itself, made anew at every step: latents (B, C, H, W), image tokens (B, L, width)
    -> latents (B, C, H, W). Row by row, each from the noise of its number."""
    objective = engine.objective
    drawn = []
    nothing, nothing_y = objective.base.embedded("", objective.base.picture_size(latents))
    for row in range(len(latents)):
        one, tokens = latents[row : row + 1], image_tokens[row : row + 1]

        def denoise(x: Tensor, sigma: Tensor, one: Tensor = one, tokens: Tensor = tokens) -> Tensor:
            word = objective.words(one, tokens, sigma, x)
            context, y = objective.context(ALONE, word, one)
            both = torch.cat([context, nothing.to(context)])
            ys = None if y is None else torch.cat([y, nothing_y.to(y)])
            eps, empty = objective.predict(torch.cat([x, x]), torch.cat([sigma, sigma]), both, ys).chunk(2)
            return x - per_row(sigma, x) * (empty + cfg * (eps - empty))

        generator = generator_of(_SEED + numbers[row])
        noise = torch.randn(one.shape, generator=generator).to(one)
        drawn.append(sample_euler(denoise, noise, sampling_sigmas(steps).to(one)))
    return torch.cat(drawn)


def written(sheet: Image.Image, folder: Path, step: int) -> Path:
    """Where a sheet is put."""
    path = folder / "sheets" / f"{step:08}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
