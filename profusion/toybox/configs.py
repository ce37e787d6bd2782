"""Sizes of Toybox's networks, and of its PromptNet."""

from ..models.configs import MMDiTConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from ..promptnet.network import PromptNetConfig
from .drawing import SIZE

TOYBOX = UNetConfig(64, (1, 2, 2), 1, (1, 1, 1), 1, 128, num_heads=4)
TOYBOX_MMDIT = MMDiTConfig(heads=3, blocks=4, context_dim=128, mlp_ratio=3.0)
TOYBOX_VAE = VAEConfig(64, (1, 1, 2, 2), 1)  # 32 channels would make its 32 groups instance norms, which lose colour
TOYBOX_TEXT = TextConfig(128, 4, 4, 512)
TOYBOX_VISION = VisionConfig(128, 4, 4, 512, image_size=SIZE, patch_size=SIZE // 8, projection=128)
TOYBOX_PROMPTNET = PromptNetConfig(TOYBOX, 128, (128,), tokens=4, grid=SIZE // 32, projection=32, holds_position=True)
