"""CLIP's two towers, with the parameter names of the host (and of transformers)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import attention
from .configs import TextConfig, VisionConfig
from .tokenizer import END


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask))


class MLP(nn.Module):
    def __init__(self, width: int, intermediate: int):
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate)
        self.fc2 = nn.Linear(intermediate, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))  # quick GELU, as OpenAI's CLIP


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, intermediate: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = SelfAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, intermediate)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, intermediate: int):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, heads, intermediate) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.position_embedding.weight


class TextTower(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.layers, config.width, config.heads, config.intermediate)
        self.final_layer_norm = nn.LayerNorm(config.width)


class TextModel(nn.Module):
    """The causal text tower: token ids in, a context for the UNet out."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.text_model = TextTower(config)
        self.text_projection = nn.Linear(config.width, config.width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 77) ids -> last hidden state after the final norm, (B, 77, width)."""
        return self.encode_embeddings(self.text_model.embeddings(tokens))

    def encode_embeddings(self, x: Tensor) -> Tensor:
        """Token embeddings with positions added, (B, 77, width) -> (B, 77, width)."""
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
        return self.text_model.final_layer_norm(self.text_model.encoder(x, mask))

    def pool(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The row of each prompt's first end token: (B, 77, width), (B, 77) -> (B, width)."""
        end = (tokens == END).int().argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), end]

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, 77) ids -> L2-normalised text embeddings, (B, width)."""
        return F.normalize(self.text_projection(self.pool(self(tokens), tokens)), dim=-1)


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(patches + 1, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, patches, width)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)  # sic: the name in every CLIP file
        self.encoder = Encoder(config.layers, config.width, config.heads, config.intermediate)
        self.post_layernorm = nn.LayerNorm(config.width)


class VisionModel(nn.Module):
    """The image tower. Pixels are normalised with CLIP's mean and standard deviation (`preprocess`)."""

    MEAN = (0.48145466, 0.4578275, 0.40821073)
    STD = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config)
        self.visual_projection = nn.Linear(config.width, config.projection, bias=False)

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
        tower = self.vision_model
        return tower.encoder(tower.pre_layrnorm(tower.embeddings(pixels)))

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, size, size) -> L2-normalised image embeddings, (B, projection)."""
        pooled = self.vision_model.post_layernorm(self(pixels)[:, 0])
        return F.normalize(self.visual_projection(pooled), dim=-1)
