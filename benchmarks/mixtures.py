"""Both kinds of overfitting in the plane, after Figures 4 and 5 of Infusion (arXiv 2404.14007):
`python -m benchmarks.mixtures`.

A small diffusion model draws points. What a word means is an embedding, and where points lie is a mixture of Gaussians:

- four words of one peak each. One of them is taught a new peak: do the other three stay (concept-agnostic overfitting)?
- words of 25 peaks each, the same grid moved by an offset that is the word's own. One more offset is to be learned from
  5 of its 25 peaks: are the other 20 still drawn, at the new offset (concept-specific overfitting)?

Each is taught twice: by tuning every weight, as DreamBooth does, and by tuning the word's own vector alone, as Infusion
does. The paper gives no recipe, so this is written from what its figures show.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from benchmarks.results import table, write
from profusion.diffusion import (
    eps_denoiser,
    noise_predictor,
    sample_euler,
    sampling_sigmas,
    training_sigmas,
    variance_preserving,
)
from profusion.metrics import fisher_divergence, noisy_latents, predictions
from profusion.pictures import ACCENT, INK, PAPER, font

SPREAD = 0.08  # standard deviation of every peak
CORNERS = torch.tensor([[-1.5, -1.5], [-1.5, 1.5], [1.5, -1.5], [1.5, 1.5]])
GRID = torch.cartesian_prod(torch.linspace(-2, 2, 5), torch.linspace(-2, 2, 5))
SEEN = [0, 8, 12, 16, 19]  # the five of GRID that customisation sees
REACH = 2.8  # what the pictures show, to every side


def mixture(peaks: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points (count, 2) of equally likely peaks (k, 2)."""
    chosen = torch.randint(len(peaks), (count,), generator=generator)
    return peaks[chosen] + SPREAD * torch.randn(count, 2, generator=generator)


def exact_noise(x: Tensor, sigma: Tensor, peaks: Tensor) -> Tensor:
    """E[eps | x] of a mixture's points x = x_0 + sigma eps: (B, 2), (B,), (k, 2) -> (B, 2). What
    a perfect model predicts."""
    variance = (SPREAD**2 + sigma**2)[:, None]
    offsets = x[:, None] - peaks  # (B, k, 2)
    weights = (-offsets.square().sum(dim=2) / (2 * variance)).softmax(dim=1)
    return sigma[:, None] * (weights[..., None] * offsets).sum(dim=1) / variance


def peaks_drawn(points: Tensor, peaks: Tensor) -> int:
    """How many peaks get at least half of their fair share of points within three standard deviations."""
    near = torch.cdist(points, peaks) < 3 * SPREAD
    return int((near.sum(dim=0) >= 0.5 * len(points) / len(peaks)).sum())


class PointModel(nn.Module):
    """eps(x_t, t, word): a perceptron whose every layer sees the word's vector."""

    def __init__(self, words: int, width: int = 192, layers: int = 3):
        super().__init__()
        self.words = nn.Embedding(words, 8)
        self.frequencies = nn.Parameter(torch.tensor([1.0, 2.0, 4.0, 8.0]), requires_grad=False)
        sizes = [2 + 16 + 1, *[width] * layers]
        self.layers = nn.ModuleList(nn.Linear(size + 8, width) for size in sizes[:-1])
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, timesteps: Tensor, word: Tensor) -> Tensor:
        """(B, 2, 1, 1) in Stable Diffusion's scaling, timesteps and words (B,) -> noise (B, 2, 1, 1)."""
        points, vector = x.flatten(1), self.words(word)
        waves = (points[..., None] * self.frequencies).flatten(1)
        h = torch.cat([points, waves.sin(), waves.cos(), timesteps[:, None] / 500 - 1], dim=1)
        for layer in self.layers:
            h = nn.functional.silu(layer(torch.cat([h, vector], dim=1)))
        return self.out(h)[..., None, None]

    def predict(self, x: Tensor, sigma: Tensor, word: int) -> Tensor:
        """eps of x = x_0 + sigma eps, (B, 2, 1, 1), all of one word."""
        return noise_predictor(lambda x, t: self(x, t, torch.full((len(x),), word)))(x, sigma)

    @torch.no_grad()
    def draw(self, word: int, count: int, generator: torch.Generator, steps: int = 40) -> Tensor:
        """Points of a word, (count, 2)."""
        words = torch.full((count,), word)
        denoise = eps_denoiser(lambda x, t: self(x, t, words))
        return sample_euler(denoise, torch.randn(count, 2, 1, 1, generator=generator), sampling_sigmas(steps)).flatten(
            1
        )


Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def train(model: PointModel, parameters, draw: Draw, steps: int, rate: float, seed: int, batch: int = 512) -> float:
    """Noise prediction on `draw(count, generator) -> (points, words)`; the mean loss of the last tenth."""
    generator, sigmas = torch.Generator().manual_seed(seed), training_sigmas()
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        points, words = draw(batch, generator)
        t = torch.randint(len(sigmas), (batch,), generator=generator)
        noise, sigma = torch.randn(batch, 2, generator=generator), sigmas[t]
        noisy = variance_preserving(points + sigma[:, None] * noise, sigma)
        loss = (model(noisy[..., None, None], t, words).flatten(1) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


@dataclass(frozen=True)
class Figure:
    """words: the peaks of every word that the base model knows, (k, 2) each. concept: the peaks that word 0 is taught,
    of which customisation sees those at `seen`."""

    title: str
    words: tuple[Tensor, ...]
    concept: Tensor
    seen: tuple[int, ...]


def figures() -> tuple[Figure, Figure]:
    offsets = [
        (0.0, 0.0),
        (0.25, 0.0),
        (-0.25, 0.0),
        (0.0, 0.25),
        (0.0, -0.25),
        (0.25, -0.25),
        (-0.25, 0.25),
        (-0.25, -0.25),
    ]
    agnostic = Figure("four peaks", tuple(corner[None] for corner in CORNERS), torch.tensor([[-0.4, -1.2]]), (0,))
    words = tuple(GRID + torch.tensor(offset) for offset in offsets)
    return agnostic, Figure("25 peaks, 5 seen", words, GRID + torch.tensor([0.2, 0.2]), tuple(SEEN))


def pretrained(figure: Figure, steps: int) -> PointModel:
    """The base model of all words."""
    torch_seed = torch.Generator().manual_seed(0)
    model = PointModel(len(figure.words))
    for parameter in model.parameters():
        if parameter.requires_grad:
            bound = parameter.shape[-1] ** -0.5
            parameter.data.uniform_(-bound, bound, generator=torch_seed)
    peaks = torch.stack(figure.words)

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        words = torch.randint(len(peaks), (count,), generator=generator)
        chosen = torch.randint(peaks.shape[1], (count,), generator=generator)
        return peaks[words, chosen] + SPREAD * torch.randn(count, 2, generator=generator), words

    train(model, model.parameters(), draw, steps, 3e-3, seed=1)
    return model.requires_grad_(False)


def customised(base: PointModel, figure: Figure, steps: int, every_weight: bool) -> PointModel:
    """Word 0 taught the concept from the peaks that are seen."""
    model = copy.deepcopy(base)
    seen = figure.concept[list(figure.seen)]

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return mixture(seen, count, generator), torch.zeros(count, dtype=torch.long)

    frequencies = model.frequencies
    weights = (
        [parameter for parameter in model.parameters() if parameter is not frequencies]
        if every_weight
        else [model.words.weight]
    )
    for parameter in weights:
        parameter.requires_grad_(True)
    train(model, weights, draw, steps, 1e-3 if every_weight else 3e-2, seed=2)
    return model.requires_grad_(False)


def measure(figure: Figure, base: PointModel, model: PointModel, points: int) -> dict[str, float]:
    """fisher: on the other words, 0 if they stayed. concept_error: the same of the concept, against the exact noise of
    all its peaks. peaks: how many of the concept's are drawn; of the other words', the fewest of one word."""
    others, generator = range(1, len(figure.words)), torch.Generator().manual_seed(3)
    clean = [mixture(peaks, 256, generator)[..., None, None] for peaks in (figure.concept, *figure.words[1:])]
    concept, apart = noisy_latents(clean[:1], 512, generator), noisy_latents(clean[1:], 128, generator)
    exact = exact_noise(concept.x.flatten(1), concept.sigma, figure.concept)[..., None, None]
    learned = predictions(model.predict, concept, 128)
    before, after = (
        predictions(lambda x, s, i, one=one: one.predict(x, s, i + 1), apart, 128) for one in (base, model)
    )
    drawn = [model.draw(word, points, torch.Generator().manual_seed(4)) for word in range(len(figure.words))]
    return {
        "fisher": fisher_divergence(before, after).per_element,
        "concept_error": fisher_divergence(exact, learned).per_element,
        "concept_peaks": peaks_drawn(drawn[0], figure.concept),
        "other_peaks": min(peaks_drawn(drawn[word], figure.words[word]) for word in others),
        "peaks": len(figure.concept),
    }


def panel(title: str, groups: list[Tensor], marks: Tensor, side: int = 240) -> Image.Image:
    """Points, the first group in colour, and where the concept's peaks belong as circles."""
    image = Image.new("RGB", (side, side + 24), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((side / 2, 12), title, INK, font(13), anchor="mm")

    def place(point) -> tuple[float, float]:
        return side * (0.5 + float(point[0]) / (2 * REACH)), 24 + side * (0.5 - float(point[1]) / (2 * REACH))

    for index, group in reversed(list(enumerate(groups))):
        for point in group.tolist():
            x, y = place(point)
            draw.ellipse([x - 1, y - 1, x + 1, y + 1], ACCENT if index == 0 else (120, 140, 170))
    for mark in marks.tolist():
        x, y = place(mark)
        draw.ellipse([x - 7, y - 7, x + 7, y + 7], outline=(40, 110, 60))
    return image


def run(pretraining: int, steps: int, points: int) -> tuple[dict, Image.Image]:
    """Figures of both, and their picture: a row each."""
    found, rows = {}, []
    for figure in figures():
        base = pretrained(figure, pretraining)
        shown = 1 if len(figure.concept) > 1 else len(figure.words)  # the other words' grids would hide the concept's
        models = {"before": base}
        models |= {
            name: customised(base, figure, steps, every)
            for name, every in (("every weight", True), ("one vector", False))
        }
        found[figure.title] = {name: measure(figure, base, model, points) for name, model in models.items()}
        seen = mixture(figure.concept[list(figure.seen)], points // 4, torch.Generator().manual_seed(5))
        panels = [panel(f"{figure.title}: to learn", [seen], figure.concept)]
        for name, model in models.items():
            drawn = [model.draw(word, points // 4, torch.Generator().manual_seed(6)) for word in range(shown)]
            panels.append(panel(name, drawn, figure.concept))
        rows.append(panels)
    sheet = Image.new("RGB", (len(rows[0]) * rows[0][0].width, len(rows) * rows[0][0].height), PAPER)
    for y, panels in enumerate(rows):
        for x, one in enumerate(panels):
            sheet.paste(one, (x * one.width, y * one.height))
    return found, sheet


def markdown(found: dict[str, dict[str, dict]]) -> str:
    rows = [
        (
            figure,
            name,
            f"{one['concept_error']:.3f}",
            f"{one['concept_peaks']} of {one['peaks']}",
            one["other_peaks"],
            f"{one['fisher']:.4f}",
        )
        for figure, models in found.items()
        for name, one in models.items()
    ]
    heads = (
        "",
        "customised",
        "error at the concept",
        "its peaks drawn",
        "fewest peaks of another word",
        "moved at other words",
    )
    return table(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretraining", type=int, default=6000, help="steps of the base models")
    parser.add_argument("--steps", type=int, default=1500, help="steps of customisation")
    parser.add_argument("--points", type=int, default=2500)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here, and the picture beside them")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found, sheet = run(given.pretraining, given.steps, given.points)
    write(given.json, vars(given), found, markdown(found), sheet)


if __name__ == "__main__":
    main()
