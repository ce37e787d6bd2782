"""PromptNet (ProFusion, arXiv 2305.13579, section 3.1): from one picture to a pseudo-word S*.

    S*(z, c, t[, x_t]) = start + spread * conv(concat_k norm(proj_k(h_k)))

h_0 is the UNet's first convolution of the reference latent z, plus an embedding of a second latent where there is one;
h_1.. are the outputs of the UNet encoder's levels, and the last that of its middle block, with the reference's CLIP
image tokens c where the UNet has its text. proj_k is a strided convolution that brings h_k to one small grid. S* lives
in the text encoder's *input* space, where its token embeddings are.

`start`, `spread` and `norm`, to mean 0 and variance 1 over a picture's part of the grid, are not in the paper, and a
PromptNet of its authors has 0, 1 and none. Without them S* starts, and is thrown by every early step of AdamW, tens of
standard deviations away from any word that the text encoder knows.

Sizes in shape comments: B rows, H x W latent cells, L image tokens, D the UNet's context width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..devices import area_means
from ..infusion import name_of_unet
from ..models.configs import MAX_WIDTH, SD15, SD21, SDXL, UNetConfig, check_bounds
from ..models.unet import UNetEncoder
from ..problems import Explained
from ..references import NATIVE, largest_window

SECOND_LATENTS = ("none", "noisy", "reference")
# The timesteps at which a run's S*, and the context with it, are made; see `interpolated`.
KNOTS = (0, 249, 499, 749, 999)
MAX_ENCODERS = 8
CELL = 8  # pixels a side of a latent cell
_BOUNDS = {
    "image_width": (1, MAX_WIDTH),
    "text_widths": (1, MAX_WIDTH),
    "tokens": (1, 256),
    "grid": (1, 64),
    "projection": (1, 4096),
}
ENCODER = ("time_embed.", "input_blocks.", "middle_block.")  # what PromptNet has from the UNet it serves


class PromptNetError(Explained, ValueError):
    """A PromptNet does not fit, or its file cannot be used. The message says why and what to do."""


@dataclass(frozen=True)
class PromptNetConfig:
    """The sizes of a PromptNet and the models it stands between.

    unet: of the model it serves. image_width: hidden width of the CLIP image tower. text_widths: width of the token
    embeddings of each text encoder, in the order of the UNet's context (SDXL has two; S* is cut between them).
    tokens: pseudo-words in S*. grid: side of the grid that everything is brought to. projection: channels of each
    part of it. second_latent: "none"; "noisy", the latent being denoised, so that S* must be made anew at every step;
    or "reference", the reference latent once more. holds_position: S* already contains its position (the authors add it
    after the position embeddings), so the text encoder must not add one: S* is the same word anywhere in a prompt.
    normalise: whether there is a `norm`.
    """

    unet: UNetConfig
    image_width: int
    text_widths: tuple[int, ...]
    tokens: int = 1
    grid: int = 8
    projection: int = 128
    second_latent: str = "none"
    holds_position: bool = False
    normalise: bool = True

    def __post_init__(self) -> None:
        if not 1 <= len(self.text_widths) <= MAX_ENCODERS:
            raise ValueError(f"text_widths={self.text_widths!r:.80}: give the width of each of 1 to 8 text encoders")
        check_bounds(self, _BOUNDS)
        for field in ("holds_position", "normalise"):
            if type(getattr(self, field)) is not bool:
                raise ValueError(f"{field}={getattr(self, field)!r:.80} must be true or false")
        if self.second_latent not in SECOND_LATENTS:
            raise ValueError(f"second_latent={self.second_latent!r}; choose one of {', '.join(SECOND_LATENTS)}")

    @property
    def text_width(self) -> int:
        """Numbers in one pseudo-word, all text encoders together."""
        return sum(self.text_widths)

    @property
    def with_noise(self) -> bool:
        """Whether S* depends on the latent being denoised."""
        return self.second_latent == "noisy"

    @property
    def architecture(self) -> str:
        """What people call the model it serves."""
        return name_of_unet(self.unet.cross_attentions, self.unet.context_dim)

    @property
    def frame(self) -> int:
        """Side in latent cells of the square that a reference is brought to, as in training: its model's own size.

        For a model that is not known it is the size at which every feature fits the grid as it is.
        """
        pixels = NATIVE.get(self.architecture)
        return pixels // CELL if pixels else self.grid * feature_blocks(self.unet)[1][0]


SD15_PROMPTNET = PromptNetConfig(SD15, 1024, (768,))  # CLIP ViT-L's image tower
SD21_PROMPTNET = PromptNetConfig(SD21, 1280, (1024,))  # OpenCLIP ViT-H's
SDXL_PROMPTNET = PromptNetConfig(SDXL, 1280, (768, 1280))


class PromptNet(UNetEncoder):
    """S*(image, t[, x_t]). The encoder's parameters have the UNet's names, so that it starts from the UNet it serves.

    SDXL's pooled vector y says size and crop of a picture to be *made*; a reference has none, so there is no label_emb.
    """

    def __init__(self, config: PromptNetConfig):
        super().__init__(config.unet, None)
        self.config = config
        width, channels = config.unet.model_channels, config.unet.in_channels
        if config.second_latent != "none":
            self.second_latent = nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
            )
        self.image_projection = nn.Linear(config.image_width, config.unet.context_dim)
        self.features, strides = feature_blocks(config.unet)
        inputs = [*(self.skip_channels[index] for index in self.features), self.skip_channels[-1]]
        self.projections = nn.ModuleList(
            nn.Conv2d(inside, config.projection, stride, stride) for inside, stride in zip(inputs, strides, strict=True)
        )
        self.output = nn.Conv2d(len(inputs) * config.projection, config.tokens * config.text_width, config.grid)
        self.register_buffer("start", torch.zeros(config.tokens, config.text_width))
        self.register_buffer("spread", torch.ones(config.text_width))

    @classmethod
    def from_unet(
        cls,
        unet: Mapping[str, Tensor],
        config: PromptNetConfig,
        generator: torch.Generator,
        start: Tensor | None = None,
        spread: Tensor | None = None,
    ) -> PromptNet:
        """A PromptNet, in float32 on the CPU, that is about to be trained.

        unet: the state dict of the UNet it serves; the encoder and the middle are copied. Everything else is drawn from
        `generator`, except the last convolution of the second latent's embedding and that of the output, which are
        zero: at first its features are exactly the UNet's, and S* is exactly `start`, (tokens, text_width) or
        (text_width,), whatever the picture. `spread` (text_width,) is how far words lie apart: it becomes the unit in
        which the network moves S*, so that one step of AdamW moves it by about learning_rate * sqrt(inputs of the last
        convolution) of it. See `typical_embedding`. Raises PromptNetError where the UNet is another one.
        """
        with torch.inference_mode(False), torch.no_grad():  # a host may call in inference mode
            with torch.device("meta"):
                network = cls(config)
            network = network.to_empty(device="cpu")
            network._copy_encoder(unet)
            for name, module in network.named_modules():
                if not f"{name}.".startswith(ENCODER) and isinstance(module, nn.Conv2d | nn.Linear):
                    _draw(module, generator)
            network.output.weight.zero_()
            if config.second_latent != "none":
                network.second_latent[2].weight.zero_()
            network.start.copy_(torch.zeros(()) if start is None else start)
            network.spread.copy_(torch.ones(()) if spread is None else spread)
            network.spread.div_(math.sqrt(network.output.weight[0].numel()))
        return network

    def _copy_encoder(self, unet: Mapping[str, Tensor]) -> None:
        for name, parameter in self.state_dict().items():
            if not name.startswith(ENCODER):
                continue
            found = unet.get(name)
            if found is None or found.shape != parameter.shape:
                what = "nothing" if found is None else f"one of {tuple(found.shape)}"
                raise PromptNetError(
                    f"the UNet is no {self.config.architecture}: where that has a tensor {name} of "
                    f"{tuple(parameter.shape)}, it has {what}. Take the configuration of the UNet's own architecture"
                )
            parameter.copy_(found)

    def forward(self, latent: Tensor, timesteps: Tensor, image_tokens: Tensor, noisy: Tensor | None = None) -> Tensor:
        """S* of each row: (B, tokens, text_width).

        latent (B, C, H, W) of the reference, scaled as the UNet takes it; timesteps (B,); image_tokens
        (B, L, image_width), the CLIP image tower's last hidden state. noisy: the latent being denoised, (B, C, h, w)
        of any size and scaled as the UNet takes it, where the configuration has `with_noise`; see `in_cells`.
        """
        self._check(latent, image_tokens)
        features = self.encoder_features(latent, timesteps, self.image_projection(image_tokens), noisy)
        grid = [self.to_grid(h, projection) for h, projection in zip(features, self.projections, strict=True)]
        joined = torch.cat(grid, dim=1)
        joined = F.group_norm(joined, len(grid)) if self.config.normalise else joined
        word = rearrange(self.output(joined), "b (tokens d) 1 1 -> b tokens d", tokens=self.config.tokens)
        return self.start + self.spread * word

    def encoder_features(
        self, latent: Tensor, timesteps: Tensor, context: Tensor, noisy: Tensor | None = None
    ) -> list[Tensor]:
        """The features S* is made from: after the first convolution, after each level, after the middle.

        context (B, L, D); the rest as in `forward`.
        """
        added = self._embedded_second(latent, noisy)
        outputs, middle = self.encode(latent, self.embed_timesteps(timesteps, latent.dtype), context, {}, added)
        return [*(outputs[index] for index in self.features), middle]

    def embed_all(
        self, reference_latent: Tensor, image_tokens: Tensor, timesteps: Tensor, noisy: Tensor | None = None
    ) -> Tensor:
        """S* of one picture at several timesteps at once: (T, tokens, text_width).

        reference_latent (1, C, H, W), image_tokens (1, L, image_width), timesteps (T,) in any order, noisy
        (T, C, H, W) as in `forward`.
        """
        count = len(timesteps)
        latents, tokens = reference_latent.expand(count, -1, -1, -1), image_tokens.expand(count, -1, -1)
        return self(latents, timesteps, tokens, noisy)

    def _check(self, latent: Tensor, image_tokens: Tensor) -> None:
        channels, width = self.config.unet.in_channels, self.config.image_width
        if latent.ndim != 4 or latent.shape[1] != channels or not latent.numel():
            raise PromptNetError(
                f"a reference latent of shape {tuple(latent.shape)}: this PromptNet takes (pictures, {channels}, "
                "height, width) of at least one cell"
            )
        if image_tokens.ndim != 3 or image_tokens.shape[-1] != width:
            raise PromptNetError(
                f"image tokens of shape {tuple(image_tokens.shape)}: this PromptNet was trained with a CLIP image "
                f"tower of width {width}. Load the CLIP vision model that goes with it"
            )

    def _embedded_second(self, latent: Tensor, noisy: Tensor | None) -> Tensor | None:
        if self.config.with_noise and noisy is None:
            raise PromptNetError(
                "this PromptNet looks at the latent being denoised, and none was given: its S* cannot be made before "
                "sampling. Evaluate it at every step, or use one that was trained without the noisy latent"
            )
        if not self.config.with_noise and noisy is not None:
            raise PromptNetError("this PromptNet was trained without the latent being denoised: give it none")
        if self.config.second_latent == "none":
            return None
        return self.second_latent(in_cells(noisy, latent.shape[-2:]) if self.config.with_noise else latent)

    def to_grid(self, h: Tensor, projection: nn.Conv2d) -> Tensor:
        """One feature on the grid, (B, projection, grid, grid), whatever the size and proportions of the latent.

        The authors' code convolves as is, so that a larger picture has more pseudo-words or loses its edges. Here the
        feature is first brought to the size that it has for the native picture, where this changes nothing.
        """
        side = self.config.grid * projection.stride[0]
        if h.shape[-2:] != (side, side):
            h = area_means(h, (side, side))
        return projection(h)


def in_cells(noisy: Tensor, cells: Sequence[int]) -> Tensor:
    """A noisy latent (B, C, H, W) of a picture of any size as one of the reference's: (B, C, h, w).

    In training both have one size. Others are cropped to the reference's proportions, as references are, and of what is
    left each cell becomes the nearest one's: the mean of several would have less noise than the timestep says.
    """
    (high, wide), (height, width) = noisy.shape[-2:], cells
    if (high, wide) == (height, width):
        return noisy
    tall, broad = largest_window((high, wide), (height, width))
    cropped = noisy.narrow(-2, (high - tall) // 2, tall).narrow(-1, (wide - broad) // 2, broad)
    return F.interpolate(cropped, size=(height, width), mode="nearest-exact")


def feature_blocks(unet: UNetConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which input blocks' outputs are features (the first, and the last of each level), and how many cells of each
    feature, a side, make one of the grid; the middle's come last in the second tuple."""
    levels, step = len(unet.channel_mult), unet.num_res_blocks + 1
    blocks = tuple(step * (level + 1) for level in range(levels - 1)) + (step * levels - 1,)
    strides = [2 ** (levels - 1 - level) for level in range(levels)]
    return (0, *blocks), (*strides, 1, 1)


def _draw(module: nn.Conv2d | nn.Linear, generator: torch.Generator) -> None:
    """torch's own initial weights, from a generator; no bias."""
    bound = 1 / math.sqrt(module.weight[0].numel())
    module.weight.uniform_(-bound, bound, generator=generator)
    module.bias.zero_()


def typical_embedding(table: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a text encoder's token embeddings, (V, D) -> (D,), (D,).

    Rows of zeros, which are words that the model was never taught, do not count.
    """
    known = table.float()[table.any(dim=1)]
    if len(known) < 2:
        raise ValueError(
            f"a table of {tuple(table.shape)} with {len(known)} rows that are not zero: at least 2 are needed"
        )
    return known.mean(dim=0), known.std(dim=0)


def merged(words: Sequence[Tensor] | Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """One S* from those of several pictures of the same thing: their mean, P times (..., tokens, D) ->
    (..., tokens, D).

    weights: of each picture, not negative; only their proportions count. Raises PromptNetError for no pictures, S* of
    different shapes, or weights that sum to nothing.
    """
    words = list(words)
    shapes = {tuple(word.shape) for word in words}
    if len(shapes) != 1:
        raise PromptNetError(f"S* of different pictures must be of one shape; found {sorted(shapes) or 'no pictures'}")
    weights = [1.0] * len(words) if weights is None else list(weights)
    if len(weights) != len(words) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise PromptNetError(
            f"weights {weights} for {len(words)} pictures: give each one that is not negative, and one above zero"
        )
    share = words[0].new_tensor(weights) / sum(weights)
    return torch.einsum("p,p...->...", share, torch.stack(words))


def interpolated(words: Tensor, knots: Tensor, timesteps: Tensor) -> Tensor:
    """S*, or a context made of it, at rising timesteps `knots` (K,), linearly between them: (K, ...) -> (T, ...).

    Outside the knots the nearest one's. S* changes slowly with the timestep, so that a few `KNOTS` serve a whole run.
    """
    knots, timesteps = knots.float(), timesteps.float()
    right = torch.searchsorted(knots, timesteps.contiguous()).clamp(1, len(knots) - 1)
    gap = (knots[right] - knots[right - 1]).clamp_min(1e-6)
    share = ((timesteps - knots[right - 1]) / gap).clamp(0, 1).view(-1, *[1] * (words.ndim - 1)).to(words.dtype)
    return torch.lerp(words[right - 1], words[right], share)


def parts(pseudo_word: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """S* cut between the text encoders: (..., sum(widths)) -> one (..., width) for each."""
    return pseudo_word.split(list(widths), dim=-1)


def check_fits(
    config: PromptNetConfig,
    architecture: str | None = None,
    text_widths: Sequence[int] | None = None,
    image_width: int | None = None,
) -> None:
    """Raise PromptNetError, which names both sides, unless a PromptNet fits these models; None is not looked at."""
    if text_widths is not None and tuple(text_widths) != config.text_widths:
        raise PromptNetError(
            f"the PromptNet makes pseudo-words of width {_listed(config.text_widths)} ({config.architecture}), but the "
            f"CLIP's word embeddings are of width {_listed(text_widths)}. Load the CLIP of the model it was trained on"
        )
    if image_width is not None and image_width != config.image_width:
        raise PromptNetError(
            f"the PromptNet takes image tokens of width {config.image_width}, but the CLIP vision model makes them of "
            f"width {image_width}. Load the CLIP vision model that it was trained with"
        )
    if architecture is not None and architecture != config.architecture:
        raise PromptNetError(
            f"the PromptNet was trained for {config.architecture}, but the model is {architecture}. Load a PromptNet "
            "of that architecture, or a model of the kind it was trained for"
        )


def _listed(widths: Sequence[int]) -> str:
    return " + ".join(str(width) for width in widths)
