"""The autoencoder: both halves together, latents of unit variance, then the decoder alone on whole pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profusion.models.vae import VAE
from profusion.toybox.configs import TOYBOX_VAE
from profusion.toybox.drawing import SIZE

from .data import DataSet
from .norm import with_quick_norms
from .session import Session, Stopped
from .stages import TrainingStage

CROP = 64  # pixels; the first three quarters of the training see crops, at a quarter of the cost
WHOLE_SHARE = 0.25
SPILL = 12  # pixels around exchanged cells that may change with them


def new_vae(session: Session) -> VAE:
    """An untrained autoencoder."""
    torch.manual_seed(session.recipe.seed)
    vae = VAE(TOYBOX_VAE).to(session.device, memory_format=torch.channels_last)
    return with_quick_norms(vae) if session.device.type == "cpu" else vae


def train_vae(session: Session, data: DataSet) -> VAE:
    """Squared and absolute error (flat colours have sharp edges), a light KL. Small crops first: a quarter of the
    cost."""
    vae = new_vae(session)
    stage = TrainingStage("vae", nn.ModuleDict({"vae": vae}), session, ema_decay=0.998)

    def loss_of(step: int, generator: torch.Generator):
        batch, crop = (8, CROP) if step < (1 - WHOLE_SHARE) * stage.steps else (3, SIZE)
        pixels = data.pixels(torch.randint(len(data), (batch,), generator=generator))
        top, left = (8 * torch.randint(0, (SIZE - crop) // 8 + 1, (2,), generator=generator)).tolist()
        pixels = session.put(pixels[:, :, top : top + crop, left : left + crop])
        mean, log_variance = (part.float() for part in vae.posterior(pixels))
        noise = session.put(torch.randn(mean.shape, generator=generator))
        region = session.put(rectangles(mean.shape, generator))
        latents, pixels = (spliced(x, region) for x in (mean + (0.5 * log_variance).exp() * noise, pixels))
        decoded = vae.decode(latents).float()
        squared, absolute = F.mse_loss(decoded, pixels), F.l1_loss(decoded, pixels)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return squared + absolute + 1e-4 * kl, {"psnr": psnr(squared), "kl": kl}

    stage.run(loss_of, finish=lambda: standardise(session, vae, data))
    return vae.eval()


def psnr(squared: Tensor) -> Tensor:
    """Decibels, of a mean squared error between pictures in [-1, 1]."""
    return -10 * torch.log10(squared.detach() / 4)


def rectangles(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A random rectangle of cells in every second of B latents, B > 1: (B, 1, h, w), 1 inside."""
    batch, _, height, width = shape
    region = torch.zeros(batch, 1, height, width)
    for row in range(0, batch, 2):
        tall, wide = (int(torch.randint(1, side, (), generator=generator)) for side in (height, width))
        top = int(torch.randint(0, height - tall + 1, (), generator=generator))
        left = int(torch.randint(0, width - wide + 1, (), generator=generator))
        region[row, :, top : top + tall, left : left + wide] = 1
    return region


def spliced(x: Tensor, region: Tensor) -> Tensor:
    """Latents or pictures (B, C, H, W), where region (B, 1, h, w) is 1 those of the picture before in the batch.

    The autoencoder's norms and its attention see whole pictures, so a cell can mean something else beside other cells.
    At this size that is a lot: exchange an object's latents, and the decoded background changes to the far corner. A
    decoder that must draw splices has to read each cell for itself.
    """
    where = F.interpolate(region, size=x.shape[-2:]) > 0
    return torch.where(where, x.roll(1, 0), x).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def standardise(session: Session, vae: VAE, data: DataSet, count: int = 512) -> None:
    """Fold the latents' mean and deviation, channel by channel, into the 1 x 1 convolutions, so that SD's own 0.18215
    gives unit latents."""
    count = min(count, len(data))
    latents = torch.cat(
        [vae.encode(session.put(data.pixels(torch.arange(i, min(i + 32, count))))) for i in range(0, count, 32)]
    )
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)) * vae.config.scale_factor
    channels = vae.config.latent_channels
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std.view(1, -1, 1, 1)
    vae.quant_conv.weight[:channels] /= std.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
    vae.quant_conv.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def encode_all(session: Session, vae: VAE, data: DataSet) -> Tensor:
    """Scaled latents of every picture, (n, 4, SIZE / 8, SIZE / 8), kept on disk."""
    path, partial = session.work / "latents.pt", session.work / "latents.partial"
    if path.exists():
        return torch.load(path, weights_only=True)
    parts = torch.load(partial, weights_only=True) if partial.exists() else []
    for first in range(sum(map(len, parts)), len(data), 500):
        if session.over:
            torch.save(parts, partial)
            raise Stopped(f"encoding stopped at picture {first} of {len(data)}")
        last, rows = min(first + 500, len(data)), []
        for i in range(first, last, 50):
            with session.autocast():
                latents = vae.encode(session.put(data.pixels(torch.arange(i, min(i + 50, last)))))
            rows.append(latents.float().cpu() * vae.config.scale_factor)
        parts.append(torch.cat(rows).contiguous())
        print(f"encoded {last} of {len(data)} pictures", flush=True)
    latents = torch.cat(parts)
    torch.save(latents, partial)
    partial.replace(path)
    return latents


def train_decoder(session: Session, data: DataSet, vae: VAE) -> VAE:
    """The decoder alone, on whole pictures: sharper, and the latents that the UNet will know stay what they are.

    Each picture is decoded as it is and with a rectangle of another's cells: beyond SPILL pixels around the rectangle
    both must be the same. A little noise on the latents, since the UNet's are not exact either.
    """
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    stage = TrainingStage("decoder", decoder, session, matrix_rate=0.01, learning_rate=1e-3, ema_decay=0.998, seed=4)
    kernel = 2 * SPILL + 1

    def loss_of(step: int, generator: torch.Generator):
        pixels = session.put(data.pixels(torch.randint(len(data), (2,), generator=generator)))
        with torch.no_grad():
            clean = vae.encode(pixels).float()
        noise = session.put(0.05 * torch.randn(clean.shape, generator=generator))
        region = session.put(rectangles(clean.shape, generator))[:1]
        latents = clean + noise / vae.config.scale_factor
        first = spliced(latents, torch.cat([region, torch.zeros_like(region)]))[:1]
        target = spliced(pixels, torch.cat([region, torch.zeros_like(region)]))[:1]
        decoded = vae.decode(torch.cat([latents, first])).float()
        wanted = torch.cat([pixels, target])
        squared, absolute = F.mse_loss(decoded, wanted), F.l1_loss(decoded, wanted)
        near = F.max_pool2d(F.interpolate(region, size=(SIZE, SIZE)), kernel, stride=1, padding=SPILL)
        leak = ((decoded[2] - decoded[0]).abs() * (1 - near[0])).sum() / (3 * (1 - near).sum()).clamp(min=1)
        return squared + absolute + leak, {"psnr": psnr(squared), "leak": leak / 2}

    stage.run(loss_of)
    return vae.eval()
