"""The loss of PromptNet on a base model, as one module: what learns is its only child, so that torch's DDP and FSDP
wrap exactly that.

    E || eps_theta(x_t, t, text("a photo of S*(z, c, t[, x_t])")) - eps ||^2   (arXiv 2305.13579, section 3.1)

The base's networks are frozen and belong to no module here: gradients pass through them, and nobody sends them about.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..checkpointing import checkpointed
from ..diffusion import noise_predictor, per_row
from ..losses import weighted_noise_error
from ..models.conditioning import size_vector
from ..pipeline import Pipeline
from ..promptnet.network import PromptNet
from ..promptnet.pseudo_word import ALONE, encode_in_towers, tower_tokens
from ..promptnet.training import noise_weight, words_of


class Objective(nn.Module):
    """The loss of rows of pictures. prompts: each with S* in it, by their index in a call. bfloat16: what products of
    PromptNet are computed in, whose weights stay float32; the base computes in whatever its own weights are."""

    def __init__(
        self,
        network: PromptNet,
        base: Pipeline,
        prompts: Sequence[str],
        weight_cap: float = 1.0,
        bfloat16: bool = False,
    ):
        super().__init__()
        self.network = network
        self.prompts, self.weight_cap, self.bfloat16 = tuple(prompts), weight_cap, bfloat16
        self._base = (base,)  # in a tuple, which torch does not look into
        self._tokens = {
            prompt: tower_tokens(base.towers, prompt, network.config.tokens) for prompt in {*self.prompts, ALONE}
        }

    @property
    def base(self) -> Pipeline:
        return self._base[0]

    def forward(
        self,
        latents: Tensor,
        image_tokens: Tensor,
        noise: Tensor,
        sigma: Tensor,
        prompt: int,
        word: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of rows: latents and noise (B, C, H, W), image tokens (B, L, width), sigma (B,).

        word (tokens, width) takes the place of every S*.
        """
        noisy = latents + per_row(sigma, latents) * noise
        if word is None:
            pseudo_word = self.words(latents, image_tokens, sigma, noisy)
        else:
            pseudo_word = word.to(latents).expand(len(latents), -1, -1)
        predicted = self.predict(noisy, sigma, *self.context(self.prompts[prompt], pseudo_word, latents))
        return weighted_noise_error(predicted, noise, noise_weight(sigma, self.weight_cap))

    def words(self, latents: Tensor, image_tokens: Tensor, sigma: Tensor, noisy: Tensor) -> Tensor:
        """S* of pictures while `noisy` (B, C, H, W) is drawn at sigma (B,): (B, tokens, text_width)."""
        with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            return words_of(self.network, latents, image_tokens, sigma, noisy).to(latents)

    def context(self, prompt: str, pseudo_word: Tensor, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """One of the prompts with S* (B, tokens, width), or `ALONE` -> context (B, 77, D), and SDXL's y (B, adm)
        for pictures of the size of these latents (B, C, H, W)."""
        context, pooled = encode_in_towers(
            self.base.towers,
            self._tokens[prompt],
            pseudo_word,
            holds_position=self.network.config.holds_position,
        )
        return context, None if pooled is None else size_vector(pooled, self.base.picture_size(latents))

    def predict(self, x: Tensor, sigma: Tensor, context: Tensor, y: Tensor | None) -> Tensor:
        """The base's eps of x = x0 + sigma * eps, both (B, C, H, W)."""
        network = noise_predictor(
            lambda x, t: self.base.predict(x, t, context, y, {}, [0]), prediction=self.base.prediction
        )
        return network(x, sigma)

    def checkpointed(self) -> AbstractContextManager:
        """While this lasts, blocks of all networks are evaluated twice, so that little waits for the way back."""
        unet, network = self.base.unet, self.network
        blocks = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
        blocks += [*network.input_blocks, network.middle_block]
        for tower in self.base.towers:
            blocks += tower.text_model.encoder.layers
        return checkpointed(blocks)
