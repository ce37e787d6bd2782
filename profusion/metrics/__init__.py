"""The metrics of both papers, by which a customised model is judged: does it show the concept, and did it overfit?"""

from .checks import MetricError
from .fisher import Fisher, fisher_divergence, noisy_latents, predictions, unit_latents
from .wasserstein import Wasserstein, wasserstein_distance

__all__ = [
    "Fisher",
    "MetricError",
    "Wasserstein",
    "fisher_divergence",
    "noisy_latents",
    "predictions",
    "unit_latents",
    "wasserstein_distance",
]
