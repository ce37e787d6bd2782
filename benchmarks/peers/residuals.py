"""Infusion in both of its stream modes, and without its lock."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.base import Peer, moved_values
from profusion.details import Details
from profusion.infusion import (
    Patches,
    Placement,
    architecture_name,
    cross_attention_layers,
    customised_patches,
    foundation_patches,
    on_conditional,
)
from profusion.learning import Concept
from profusion.prompt import NounError
from profusion.residual import Residual, save_residual
from profusion.residual.training import TrainingOptions
from profusion.toybox.pipeline import noun_rows, seeded


class WithoutLock(Peer):
    """A residual at the noun's values under the customised stream's own queries."""

    name = "residual without the lock"
    rates = (0.003, 0.01, 0.03)
    note = (
        "the customised stream's own queries, the loss inside the mask alone: those of Infusion's released code, "
        "which is more, see below"
    )

    def __init__(self, toybox, noun):
        super().__init__(toybox, noun)
        self.layers = cross_attention_layers(dict(toybox.unet.named_parameters()))
        self.delta = torch.zeros(len(self.layers), 1, self.layers[0].context_dim, requires_grad=True)
        self.details: Details | None = None

    def trained(self) -> dict[str, Tensor]:
        if self.details is None:
            return {"delta": self.delta}
        return {"delta": self.delta, "details": self.details.values, "gates": self.details.gates}

    def residual(self) -> Residual:
        names = tuple(layer.name for layer in self.layers)
        return Residual(self.delta.detach(), self.noun, names, architecture_name(self.layers), details=self.details)

    def size(self) -> int:
        """Of the file that the pack itself writes: six bits a number."""
        with tempfile.TemporaryDirectory() as folder:
            return save_residual(self.residual(), Path(folder) / "residual.safetensors").size

    def placements(self, prompt: str) -> list[Placement]:
        """The residual at the noun; nothing in a prompt that does not have it."""
        try:
            rows = noun_rows(prompt, self.noun)
        except NounError:
            return []
        return [Placement(self.delta, tuple(layer.name for layer in self.layers), rows, details=self.details)]

    def patches(self, prompt: str) -> Patches:
        return next((moved_values(placement) for placement in self.placements(prompt)), {})


class Infusion(WithoutLock):
    """Two streams: the plain model's queries in every cross-attention layer, the residual on the noun's values."""

    name = "Infusion, own trajectory"
    note = "the plain model's queries, from its own trajectory; held to the plain model outside the mask"
    preserve, shared_latent = 1.0, False

    def steps(self, concept: Concept, recipe: TrainingOptions) -> Iterator[float]:
        recipe = replace(recipe, preserve=self.preserve)
        training = self.toybox.training(concept.pictures, concept.masks, self.noun, recipe)
        self.delta, self.details = training.delta, training.details
        return training.steps()

    def predict_noise(self, x: Tensor, sigma: Tensor, prompt: str) -> Tensor:
        queries, predict = {}, self.toybox.noise_predictor([prompt])
        predict(x, sigma, 0, foundation_patches(queries))
        return predict(x, sigma, 0, customised_patches(queries, on_conditional(self.placements(prompt))))

    def generate(self, prompt: str, seeds: list[int], steps: int, guidance: float) -> Tensor:
        return self.toybox.generate_customised(
            prompt, [self.residual()], seeded(*seeds), steps, guidance, shared_latent=self.shared_latent
        )[1]


class InfusionSharedLatent(Infusion):
    name = "Infusion, shared latent"
    note = "the plain model's queries, on the customised stream's latent; held to the plain model outside the mask"
    shared_latent = True


class InfusionPaperLoss(Infusion):
    name = "Infusion, the paper's loss"
    note = "own trajectory, the loss inside the mask alone"
    preserve = 0.0
