"""Stable Diffusion's checkpoints: what a file is, told from names and shapes, and the kernel's networks made of it."""

from .contents import CheckpointError
from .families import FAMILIES
from .loading import Checkpoint, Plan, load_checkpoint, plan
from .vision import load_image_tower, vision_plan

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "CheckpointError",
    "Plan",
    "load_checkpoint",
    "load_image_tower",
    "plan",
    "vision_plan",
]
