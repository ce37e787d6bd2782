"""A residual of 6 bits a number draws the concept as well as one of 32: measured on Toybox,
by likeness to the concept."""

import pytest
import torch

from profusion.learning import train
from profusion.residual import load_residual, save_residual
from profusion.residual.training import TrainingOptions
from profusion.toybox.concepts import drawn_concept
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import NETWORKS, WEIGHTS, Toybox, seeded
from profusion.toybox.similarity import concept_similarity

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((WEIGHTS / f"toybox_{name}.safetensors").is_file() for name in (*NETWORKS, "judge")),
        reason="Toybox's weights are not there: train them with `python -m training.toybox`",
    ),
]


def test_six_bits_cost_no_likeness(tmp_path):
    toybox, judge, concept = Toybox.load(), Judge.load(), drawn_concept()
    options = TrainingOptions(steps=80, learning_rate=0.02)
    residual = train(toybox, concept, options, lambda _: None).residual
    likeness = {}
    for precision in ("float32", "int6"):
        saved = save_residual(residual, tmp_path / f"{precision}.safetensors", precision)
        loaded = load_residual(saved.path)
        drawn = [
            toybox.vae.pictures(
                toybox.generate_customised(place.format(concept.noun), [loaded], seeded(1, 2), 15, 2.0)[1]
            )
            for place in ("a photo of a {} on grass", "a photo of a {} at night")
        ]
        pictures = torch.cat(drawn)
        masks = judge.object_mask(pictures)
        likeness[precision] = concept_similarity(pictures, masks, concept.pictures, concept.masks).mean().item()
    assert likeness["float32"] > 0.4  # something has been learned, or the comparison means nothing
    assert abs(likeness["int6"] - likeness["float32"]) < 0.01, likeness
