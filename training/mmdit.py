"""The joint-attention transformer: flow matching on the latents and under the text tower that the UNet has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from profusion.flow import TIMESTEPS, interpolated
from profusion.models.clip import TextModel
from profusion.models.mmdit import MMDiT
from profusion.toybox.configs import TOYBOX_MMDIT

from .data import DataSet
from .session import Session
from .stages import TrainingStage
from .unet import context_of, localisation_loss, object_error, told_captions

NOUN_SHARE, PLACE_SHARE = 0.4, 0.2  # of all attention, the picture's own tokens included: less than in a UNet


def new_mmdit(session: Session) -> MMDiT:
    """An untrained transformer; with its gates and its last layer zero it starts as the identity (arXiv 2212.09748)."""
    torch.manual_seed(session.recipe.seed + 6)
    network = MMDiT(TOYBOX_MMDIT).to(session.device)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                parameter.zero_()
    return network


def sample_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """80 % logit-normal around 0.6, where shapes and colours are decided (arXiv 2403.03206, section 3.1); 20 %
    uniform."""
    sigma = torch.sigmoid(0.4 + torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.2, uniform, sigma)


def train_mmdit(
    session: Session, data: DataSet, latents: Tensor, text: TextModel, watch: Callable[[int, MMDiT], None] | None = None
) -> MMDiT:
    """Squared error of the velocity; each noun's row is taught to own its object, as in the UNet."""
    network, recipe = new_mmdit(session), session.recipe
    text.requires_grad_(False)
    stage = TrainingStage(
        "mmdit",
        nn.ModuleDict({"mmdit": network}),
        session,
        seed=6,
        watch=(lambda step: watch(step, network)) if watch else None,
    )

    def loss_of(step: int, generator: torch.Generator):
        indices = torch.randint(len(data), (recipe.batch,), generator=generator)
        captions, told = told_captions(session, data, indices, step, generator)
        context = context_of(text, captions, keep_padding=bool(torch.rand((), generator=generator) < 0.25))
        sigma = sample_sigmas(recipe.batch, generator)
        clean, masks = latents[indices], session.put(data.masks[indices])
        noise = torch.randn(clean.shape, generator=generator)
        noisy, wanted = session.put(interpolated(clean, noise, sigma)), session.put(noise - clean)
        maps: list[Tensor] = []
        predicted = network(
            noisy, TIMESTEPS * session.put(sigma), context, lambda block, seen: maps.append(seen.float().mean(dim=1))
        )
        error = object_error((predicted.float() - wanted) ** 2, masks).mean()
        place, share = localisation_loss(maps, masks, captions, told, NOUN_SHARE, PLACE_SHARE)
        return error + 0.1 * place, {"velocity": error, "place": place, "noun_share": share}

    stage.run(loss_of)
    return network.eval()
