"""What Infusion learns of a concept, and the small file that keeps it."""

from .concept import Residual, ResidualError, check_architecture
from .file import PRECISIONS, PREVIEW_SUFFIX, SUFFIX, SavedResidual, load_residual, save_residual
from .origin import Origin

__all__ = [
    "PRECISIONS",
    "PREVIEW_SUFFIX",
    "SUFFIX",
    "Origin",
    "Residual",
    "ResidualError",
    "SavedResidual",
    "check_architecture",
    "load_residual",
    "save_residual",
]
