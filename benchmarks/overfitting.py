"""How far a peer moved what it should have left alone, and how much of the class's variety it
lost (arXiv 2404.14007, 3)."""

from __future__ import annotations

import torch

from benchmarks.peers import PLAIN, Peer
from profusion.metrics import fisher_divergence, noisy_latents, predictions, wasserstein_distance
from profusion.toybox.pipeline import Toybox
from profusion.toybox.world import BACKGROUND_PHRASES, NOUNS


class Overfitting:
    """Fisher divergence on prompts without the concept, Wasserstein distance of the class; the
    base model's part is made once.

    noun: the concept's class. draws: noisy latents for each prompt. pictures: of the class, from the same seeds for
    every peer, by the guidance and steps that its pictures are drawn with.
    """

    def __init__(self, toybox: Toybox, noun: str, draws: int, pictures: int, steps: int, guidance: float):
        self._plain = PLAIN(toybox, noun)
        self._seeds = list(range(50_000, 50_000 + pictures))
        self._steps, self._guidance = steps, guidance
        places = list(BACKGROUND_PHRASES.values())
        others = [other for other in NOUNS if other != noun]
        self._prompts = [f"a photo of a {other} {places[index % len(places)]}" for index, other in enumerate(others)]
        seeds = [60_000, 60_001]
        latents = [self._plain.generate(prompt, seeds, steps, guidance) for prompt in self._prompts]
        self._noisy = noisy_latents(latents, draws, torch.Generator().manual_seed(0))
        self._predictions = self._predict(self._plain)
        self._class = self._latents(self._plain)

    def _predict(self, peer: Peer) -> torch.Tensor:
        return predictions(lambda x, sigma, prompt: peer.predict_noise(x, sigma, self._prompts[prompt]), self._noisy)

    def _latents(self, peer: Peer) -> torch.Tensor:
        prompt, size = f"a photo of a {peer.phrase}", 16
        parts = [self._seeds[first : first + size] for first in range(0, len(self._seeds), size)]
        return torch.cat([peer.generate(prompt, seeds, self._steps, self._guidance) for seeds in parts])

    def measure(self, peer: Peer) -> dict[str, float]:
        """fisher: a number per element of a latent (0: nothing moved). wasserstein: the distance
        W of the class's latents."""
        fisher = fisher_divergence(self._predictions, self._predict(peer))
        distance = wasserstein_distance(self._class, self._latents(peer)).distance
        return {"fisher": fisher.per_element, "wasserstein": distance}
