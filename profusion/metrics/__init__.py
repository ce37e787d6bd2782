"""The metrics of both papers, by which a customised model is judged: does it show the concept, and did it overfit?"""

from .checks import MetricError
from .concept import Pictures, concept_scores, prompt_lines
from .fisher import Fisher, fisher_divergence, noisy_latents, predictions, unit_latents
from .scores import Score, Scores
from .wasserstein import Wasserstein, wasserstein_distance

__all__ = [
    "Fisher",
    "MetricError",
    "Pictures",
    "Score",
    "Scores",
    "Wasserstein",
    "concept_scores",
    "fisher_divergence",
    "noisy_latents",
    "predictions",
    "prompt_lines",
    "unit_latents",
    "wasserstein_distance",
]
