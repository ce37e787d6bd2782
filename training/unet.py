"""The UNet: eps-prediction on the autoencoder's latents, under the finished text tower."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profusion.diffusion import alphas_cumprod, noised
from profusion.models.clip import TextModel
from profusion.models.tokenizer import tokenize
from profusion.models.unet import UNet
from profusion.toybox import world
from profusion.toybox.configs import TOYBOX

from .data import Captions, DataSet, pooled
from .norm import with_quick_norms
from .session import Session
from .stages import TrainingStage
from .text import compact, encode_text


@torch.no_grad()
def context_of(text: TextModel, captions: Captions, keep_padding: bool) -> Tensor:
    """The context (B, 77, D). Unless `keep_padding`, end and padding rows are the empty prompt's, so that *words* carry
    the condition: where they may, end and padding take most of the attention and a residual on the noun can do
    nothing."""
    if keep_padding:
        return text(compact(captions.tokens))
    length = int(captions.lengths.max()) + 1
    hidden = encode_text(text, captions.tokens, length)
    empty = text(compact(tokenize("").to(hidden.device)))  # (1, 77, D)
    rows = torch.arange(empty.shape[1], device=hidden.device)[None, :, None]
    hidden = torch.cat([hidden, empty[:, length:].expand(len(hidden), -1, -1)], dim=1)
    return torch.where(rows >= captions.lengths[:, None, None], empty, hidden)


def told_captions(session: Session, data: DataSet, indices: Tensor, step: int, generator: torch.Generator):
    """Captions for scenes, one in ten of them silent, for guidance: the batch, and which were told (B,).

    Appearances without a name leave nouns bare often enough, so that few captions need to keep quiet on purpose.
    """
    rng = np.random.default_rng((2, step))
    told = torch.rand(len(indices), generator=generator) >= 0.1
    captions = [world.caption(data.scenes[i], rng, bare=0.15) for i in indices.tolist()]
    silent = world.Caption("", (), (), ())
    batch = Captions.of([words if keep else silent for words, keep in zip(captions, told, strict=True)], session)
    return batch, session.put(told.float())


def object_error(error: Tensor, masks: Tensor) -> Tensor:
    """Mean of squared errors (B, C, h, w), objects counting three times; masks (B, 2, h, w) -> (B,)."""
    cells = 1 + 2 * masks.amax(dim=1, keepdim=True)
    return (error * cells).mean(dim=(1, 2, 3)) / cells.mean(dim=(1, 2, 3))


def localisation_loss(
    maps: list[Tensor],
    masks: Tensor,
    captions: Captions,
    told: Tensor,
    noun_share: float = 0.6,
    place_share: float = 0.4,
) -> tuple[Tensor, Tensor]:
    """Each noun's row should own its object's cells, the background's words the rest (as FastComposer, arXiv
    2305.10431).

    maps: per layer (B, T, 77 or more), averaged over heads; masks (B, 2, CELLS, CELLS); told (B,) marks captions that
    were not dropped. The shares are of a cell's attention, and more is not asked for. Returns the loss and the mean
    share that nouns have inside their objects.
    """
    total, shares = 0.0, []
    present = (captions.nouns >= 0).float() * told[:, None]  # (B, 2)
    has_place = (captions.background.sum(dim=1) > 0).float() * told
    index = captions.nouns.clamp(min=0)
    for attention in maps:
        inside = pooled(masks, attention.shape[1]) * present[..., None]  # (B, 2, T)
        rest = (1 - pooled(masks, attention.shape[1]).sum(dim=1)).clamp(min=0)  # (B, T)
        noun = attention.gather(2, index[:, None, :].expand(-1, attention.shape[1], -1)).transpose(1, 2)  # (B, 2, T)
        outside = (1 - pooled(masks, attention.shape[1])) * present[..., None]
        rows = captions.background.shape[1]
        place = (attention[..., :rows] * captions.background[:, None]).sum(dim=-1)  # (B, T)
        rest = rest * has_place[:, None]
        total = total + (inside * F.relu(noun_share - noun)).sum() / inside.sum().clamp(min=1)
        total = total + 2 * (outside * noun).sum() / outside.sum().clamp(min=1)
        total = total + (rest * F.relu(place_share - place)).sum() / rest.sum().clamp(min=1)
        shares.append((inside * noun).sum() / inside.sum().clamp(min=1))
    return total / len(maps), torch.stack(shares).mean()


def sample_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """80 % logit-normal around 0.65 of the range, where shapes and colours are decided; 20 % uniform."""
    t = torch.sigmoid(0.62 + 0.8 * torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    t = torch.where(torch.rand(count, generator=generator) < 0.2, uniform, t)
    return (1000 * t).long().clamp(0, 999)


def new_unet(session: Session) -> UNet:
    """An untrained UNet, the last convolution of each block zero, as SD's zero_module: it starts as the identity."""
    torch.manual_seed(session.recipe.seed + 2)
    unet = UNet(TOYBOX).to(session.device, memory_format=torch.channels_last)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".out_layers.3." in name or ".proj_out." in name or name.startswith("out.2."):
                parameter.zero_()
    return with_quick_norms(unet) if session.device.type == "cpu" else unet


def train_unet(
    session: Session, data: DataSet, latents: Tensor, text: TextModel, watch: Callable[[int, UNet], None] | None = None
) -> UNet:
    """eps-prediction, weighted to where the condition matters, under a text tower that no longer moves."""
    unet, recipe = new_unet(session), session.recipe
    text.requires_grad_(False)
    stage = TrainingStage(
        "unet",
        nn.ModuleDict({"unet": unet}),
        session,
        seed=2,
        watch=(lambda step: watch(step, unet)) if watch else None,
    )
    weights = (1 / alphas_cumprod()).clamp(max=25)
    weights = weights / weights.mean()

    def loss_of(step: int, generator: torch.Generator):
        indices = torch.randint(len(data), (recipe.batch,), generator=generator)
        captions, told = told_captions(session, data, indices, step, generator)
        context = context_of(text, captions, keep_padding=bool(torch.rand((), generator=generator) < 0.1))
        t = sample_timesteps(recipe.batch, generator)
        clean, masks = latents[indices], session.put(data.masks[indices])
        noise = torch.randn(clean.shape, generator=generator)
        noisy, noise = session.put(noised(clean, noise, t)), session.put(noise)
        maps: list[Tensor] = []
        probe = {"attention_probe": lambda layer, attention: maps.append(attention.float().mean(dim=1))}
        predicted = unet(noisy, session.put(t), context, transformer_options=probe).float()
        error = object_error((predicted - noise) ** 2, masks)
        place, share = localisation_loss(maps, masks, captions, told)
        denoising = (session.put(weights[t]) * error).mean()
        return denoising + 0.1 * place, {"eps": error.mean(), "place": place, "noun_share": share}

    stage.run(loss_of)
    return unet.eval()
