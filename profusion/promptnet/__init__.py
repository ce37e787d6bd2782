"""PromptNet: a pseudo-word S* from one picture (ProFusion, arXiv 2305.13579)."""

from .file import load_promptnet, save_promptnet
from .network import PromptNet, PromptNetConfig, PromptNetError, check_fits, merged

__all__ = ["PromptNet", "PromptNetConfig", "PromptNetError", "check_fits", "load_promptnet", "merged", "save_promptnet"]
