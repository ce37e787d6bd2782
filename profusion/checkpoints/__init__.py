"""Stable Diffusion's checkpoints: what a file is, told from names and shapes, and the kernel's networks made of it."""

from .contents import CheckpointError
from .families import FAMILIES
from .loading import Checkpoint, Plan, load_checkpoint, plan

__all__ = ["FAMILIES", "Checkpoint", "CheckpointError", "Plan", "load_checkpoint", "plan"]
