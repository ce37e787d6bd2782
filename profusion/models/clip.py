"""CLIP's two towers: transformers' own, with what a UNet, a metric and S* ask of them.

Parameters have transformers' names, which are the host's and those of Toybox's files. Importing this module imports
transformers, so it is imported where a tower is made, and never with the pack.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from .configs import TextConfig, VisionConfig
from .tokenizer import END, START


class TextModel(CLIPTextModelWithProjection):
    """The causal text tower: token ids in, a context for the UNet out."""

    def __init__(self, config: TextConfig):
        sizes = CLIPTextConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.intermediate,
            projection_dim=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.positions,
            bos_token_id=START,
            eos_token_id=END,
            pad_token_id=None,
            hidden_act=config.activation,
        )
        super().__init__(sizes)
        self.sizes = config
        if not config.projected:
            self.text_projection = None
        _drawn_as_torch_does(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) ids -> the context that the model takes of it, (B, L, width)."""
        return self.encode(tokens)[0]

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) ids -> the context, and the last hidden state after the final norm, (B, L, width) each."""
        skip = self.sizes.skip
        output = self.text_model(input_ids=tokens, output_hidden_states=bool(skip or not self.sizes.final_norm))
        last = output.last_hidden_state
        if not skip and self.sizes.final_norm:
            return last, last
        hidden = output.hidden_states[-1 - skip]
        return self.text_model.final_layer_norm(hidden) if self.sizes.final_norm else hidden, last

    def encode_embeddings(self, x: Tensor) -> Tensor:
        """The context of token embeddings with positions added, (B, L, width) each; autograd goes through."""
        return self.encode_with_last(x)[0]

    def encode_with_last(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `encode` makes of token embeddings with positions added, (B, L, width).

        A hook puts them in the place of what the tower embeds. (Not every transformers takes embeddings for ids.)
        """
        unread = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        hook = self.text_model.embeddings.register_forward_hook(lambda module, inputs, output: x)
        try:
            return self.encode(unread)
        finally:
            hook.remove()

    def pool(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The row of each prompt's first end token: (B, L, width), (B, L) -> (B, width)."""
        end = (tokens == END).int().argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), end]

    def project(self, last: Tensor, tokens: Tensor) -> Tensor:
        """The last hidden state (B, L, width) of these ids -> text embeddings, (B, width), of any length.

        Raises ValueError for a tower whose file has no projection, as those of SD 1.x have none.
        """
        if self.text_projection is None:
            raise ValueError("this text tower has no projection: its file has none, so it gives no text embeddings")
        return self.text_projection(self.pool(last, tokens))

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) ids -> L2-normalised text embeddings, (B, width)."""
        return F.normalize(self.project(self.encode(tokens)[1], tokens), dim=-1)


class VisionModel(CLIPVisionModelWithProjection):
    """The image tower. Pixels are normalised with CLIP's mean and standard deviation (`preprocess`)."""

    MEAN = (0.48145466, 0.4578275, 0.40821073)
    STD = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, config: VisionConfig):
        sizes = CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.intermediate,
            projection_dim=config.projection or config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=config.activation,
        )
        super().__init__(sizes)
        self.sizes = config
        if config.projection is None:
            self.visual_projection = None
        _drawn_as_torch_does(self)

    def preprocess(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> normalised (B, 3, size, size): shorter side to size, centre crop."""
        pixels, size = pictures.movedim(-1, 1), self.config.image_size
        if pixels.shape[-2:] != (size, size):
            scale = size / min(pixels.shape[-2:])
            target = tuple(round(scale * side) for side in pixels.shape[-2:])
            pixels = F.interpolate(pixels, size=target, mode="bicubic", antialias=True)
            top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
            pixels = pixels[..., top : top + size, left : left + size]
        pixels = (255 * pixels).clamp(0, 255).round() / 255
        mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (self.MEAN, self.STD))
        return (pixels - mean) / std

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, size, size) -> last hidden state, class token first, (B, 1 + patches, width)."""
        return self.vision_model(pixel_values=pixels).last_hidden_state

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, size, size) -> L2-normalised image embeddings, (B, projection). ValueError without a projection."""
        if self.visual_projection is None:
            raise ValueError("this image tower has no projection: its file has none, so it gives no image embeddings")
        pooled = self.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.visual_projection(pooled), dim=-1)


def _drawn_as_torch_does(tower: nn.Module) -> None:
    """torch's own initial weights for what is trained from nothing; transformers draws narrower ones."""
    for module in tower.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
