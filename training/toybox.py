"""Train Toybox: `python -m training.toybox --work DIR`. Resumes where it stopped; the same seed gives the same run.

Stages: draw the world; the VAE; the text tower alone; the UNet with the text tower; the image tower; the VAE's decoder
once more; export.
Why each departs from plain Stable Diffusion training is said where it does.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profusion.diffusion import alphas_cumprod, noised
from profusion.models.clip import TextModel, VisionModel
from profusion.models.tokenizer import END, tokenize
from profusion.models.unet import UNet
from profusion.models.vae import VAE
from profusion.toybox import world
from profusion.toybox.configs import TOYBOX, TOYBOX_TEXT, TOYBOX_VAE, TOYBOX_VISION
from profusion.toybox.pipeline import save_weights

from .data import Captions, DataSet, check_vocabulary, pooled, work_folder
from .stages import TrainingStage


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    pictures: int = 20_000
    vae_steps: int = 2500
    text_steps: int = 300
    unet_steps: int = 3000
    vision_steps: int = 500
    decoder_steps: int = 400
    batch: int = 32


# --- VAE ---------------------------------------------------------------------------------------------------------


def train_vae(recipe: Recipe, data: DataSet, work: Path) -> VAE:
    """Squared and absolute error (flat colours have sharp edges), a light KL. Small crops come first, and cost less."""
    torch.manual_seed(recipe.seed)
    vae = VAE(TOYBOX_VAE).to(memory_format=torch.channels_last)
    stage = TrainingStage("vae", nn.ModuleDict({"vae": vae}), recipe.vae_steps, work / "vae.pt", ema_decay=0.995)

    def loss_of(step: int, generator: torch.Generator):
        progress = step / recipe.vae_steps
        batch, crop = (8, 48) if progress < 0.6 else (4, 64) if progress < 0.8 else (3, 96)
        pixels = data.pixels(torch.randint(len(data), (batch,), generator=generator))
        top, left = (8 * torch.randint(0, (world.SIZE - crop) // 8 + 1, (2,), generator=generator)).tolist()
        pixels = pixels[:, :, top : top + crop, left : left + crop]
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        mean, log_variance = vae.posterior(pixels)
        noise = torch.randn(mean.shape, generator=generator)
        latents, pixels = spliced(mean + (0.5 * log_variance).exp() * noise, pixels, generator)
        decoded = vae.decode(latents)
        squared, absolute = F.mse_loss(decoded, pixels), F.l1_loss(decoded, pixels)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        psnr = -10 * torch.log10(squared.detach() / 4)
        return squared + absolute + 1e-4 * kl, {"psnr": psnr.item(), "kl": kl.item()}

    stage.run(loss_of)
    return vae.eval()


def spliced(latents: Tensor, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Put a rectangle of another picture's cells, and of its pixels, into every second picture of a batch.

    The autoencoder's norms and its attention see whole pictures, so a cell can mean something else beside other cells.
    At this size that is a lot: exchange an object's latents, and the decoded background changes to the far corner. A
    decoder that must draw splices has to read each cell for itself. latents (B, 4, h, w), pixels (B, 3, 8h, 8w), B > 1.
    """
    batch, _, height, width = latents.shape
    region = torch.zeros(batch, 1, height, width)
    for row in range(0, batch, 2):
        tall, wide = (int(torch.randint(1, side, (), generator=generator)) for side in (height, width))
        top = int(torch.randint(0, height - tall + 1, (), generator=generator))
        left = int(torch.randint(0, width - wide + 1, (), generator=generator))
        region[row, :, top : top + tall, left : left + wide] = 1
    latents = torch.where(region > 0, latents.roll(1, 0), latents)
    pixels = torch.where(F.interpolate(region, scale_factor=8.0) > 0, pixels.roll(1, 0), pixels)
    channels_last = torch.channels_last
    return latents.contiguous(memory_format=channels_last), pixels.contiguous(memory_format=channels_last)


@torch.no_grad()
def standardise(vae: VAE, data: DataSet, count: int = 256) -> None:
    """Fold a per-channel shift and scale into the 1x1 convolutions, so that SD's own 0.18215 gives unit latents."""
    latents = torch.cat([vae.encode(data.pixels(torch.arange(i, i + 32))) for i in range(0, count, 32)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)) * vae.config.scale_factor
    channels = vae.config.latent_channels
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std.view(1, -1, 1, 1)
    vae.quant_conv.weight[:channels] /= std.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
    vae.quant_conv.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def encode_all(vae: VAE, data: DataSet, work: Path) -> Tensor:
    """Scaled latents of every picture, (n, 4, 12, 12), kept on disk."""
    path = work / "latents.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    latents = []
    for i in range(0, len(data), 50):
        pixels = data.pixels(torch.arange(i, min(i + 50, len(data)))).contiguous(memory_format=torch.channels_last)
        latents.append(vae.encode(pixels) * vae.config.scale_factor)
        if i % 5000 == 0:
            print(f"encode {i}/{len(data)}", flush=True)
    latents = torch.cat(latents).contiguous()
    torch.save(latents, path)
    return latents


def train_decoder(recipe: Recipe, data: DataSet, vae: VAE, latents: Tensor, work: Path) -> None:
    """The decoder alone, on whole pictures: sharper, and the latents that the UNet knows stay what they are.

    A little noise on the latents, since the UNet's are not exact either.
    """
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    stage = TrainingStage(
        "decoder",
        decoder,
        recipe.decoder_steps,
        work / "decoder.pt",
        matrix_rate=0.01,
        learning_rate=1e-3,
        ema_decay=0.99,
        seed=4,
    )

    def loss_of(step: int, generator: torch.Generator):
        indices = torch.randint(len(data), (3,), generator=generator)
        clean, pixels = spliced(latents[indices], data.pixels(indices), generator)
        noisy = clean + 0.05 * torch.randn(clean.shape, generator=generator)
        decoded = vae.decode((noisy / vae.config.scale_factor).contiguous(memory_format=torch.channels_last))
        squared = F.mse_loss(decoded, pixels)
        psnr = -10 * torch.log10(squared.detach() / 4)
        return squared + F.l1_loss(decoded, pixels), {"psnr": psnr.item()}

    stage.run(loss_of)


# --- text tower --------------------------------------------------------------------------------------------------


def _attributes(scene: world.Scene, caption: world.Caption) -> list[list[int]]:
    """For each object: noun, first colour, second colour, pattern as the caption names them (0 = unnamed)."""
    words = caption.text.split()
    colors, patterns = list(world.PALETTE), list(world.PATTERNS)
    rows = []
    for item, mentioned in zip(scene.objects, caption.attribute_words, strict=True):
        names = [words[i] for i in mentioned]
        named = [colors.index(name) + 1 for name in names if name in colors] + [0, 0]
        pattern = [patterns.index(name) + 1 for name in names if name in patterns] + [0]
        rows.append([world.NOUNS.index(item.noun), named[0], named[1], pattern[0]])
    return rows


def train_text(recipe: Recipe, data: DataSet, work: Path) -> TextModel:
    """Text alone: a noun's row must say its noun and the attributes before it, so that it carries appearance."""
    torch.manual_seed(recipe.seed + 1)
    text = TextModel(TOYBOX_TEXT)
    nn.init.normal_(text.text_model.embeddings.token_embedding.weight, std=0.05)
    nn.init.normal_(text.text_model.embeddings.position_embedding.weight, std=0.02)
    sizes = (len(world.NOUNS), len(world.PALETTE) + 1, len(world.PALETTE) + 1, len(world.PATTERNS) + 1)
    heads = nn.ModuleList([nn.Linear(TOYBOX_TEXT.width, size) for size in sizes])
    place = nn.Linear(TOYBOX_TEXT.width, len(world.BACKGROUNDS))
    modules = nn.ModuleDict({"text": text, "heads": heads, "place": place})
    stage = TrainingStage("text", modules, recipe.text_steps, work / "text.pt", ema_decay=0.99, seed=1)

    def loss_of(step: int, generator: torch.Generator):
        rng = np.random.default_rng((1, step))
        indices = torch.randint(len(data), (64,), generator=generator).tolist()
        captions = [world.caption(data.scenes[i], rng) for i in indices]
        batch = Captions.of(captions)
        hidden = encode_text(text, batch.tokens, int(batch.lengths.max()) + 1)
        rows, targets, places, answers = [], [], [], []
        for b, (i, caption) in enumerate(zip(indices, captions, strict=True)):
            for k, labels in enumerate(_attributes(data.scenes[i], caption)):
                rows.append(hidden[b, batch.nouns[b, k]])
                targets.append(labels)
            if caption.background_words:
                places.append(hidden[b, caption.background_words[-1] + 1])
                answers.append(world.BACKGROUNDS.index(data.scenes[i].background))
        rows, targets = torch.stack(rows), torch.tensor(targets)
        loss = sum(F.cross_entropy(head(rows), targets[:, k]) for k, head in enumerate(heads))
        loss = loss + F.cross_entropy(place(torch.stack(places)), torch.tensor(answers))
        return loss, {}

    stage.run(loss_of)
    return text


def encode_text(text: TextModel, tokens: Tensor, length: int) -> Tensor:
    """The first `length` rows only: the tower is causal, so later rows (padding) cannot change them."""
    embeddings = text.text_model.embeddings
    x = embeddings.token_embedding(tokens[:, :length]) + embeddings.position_embedding.weight[:length]
    return text.encode_embeddings(x)


# --- UNet --------------------------------------------------------------------------------------------------------


def context_of(text: TextModel, captions: Captions, keep_padding: bool) -> Tensor:
    """The context (B, 77, D). Unless `keep_padding`, end and padding rows are the empty prompt's, so that *words* carry
    the condition: else end and padding take most of the attention, and a residual on the noun can do nothing."""
    if keep_padding:
        return text(captions.tokens)
    length = int(captions.lengths.max()) + 1
    hidden = encode_text(text, captions.tokens, length)
    empty = text(tokenize(""))  # (1, 77, D)
    rows = torch.arange(empty.shape[1])[None, :, None]
    hidden = torch.cat([hidden, empty[:, length:].expand(len(hidden), -1, -1)], dim=1)
    return torch.where(rows >= captions.lengths[:, None, None], empty, hidden)


def localisation_loss(maps: list[Tensor], masks: Tensor, captions: Captions, told: Tensor) -> tuple[Tensor, Tensor]:
    """A noun's row should own its object's cells, the background's words the rest (FastComposer, arXiv 2305.10431).

    maps: per layer (B, T, 77), averaged over heads; masks (B, 2, 12, 12); told (B,) marks captions that are kept.
    Returns the loss and the mean share of attention that nouns have inside their objects.
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
        place = (attention * captions.background[:, None]).sum(dim=-1)  # (B, T)
        rest = rest * has_place[:, None]
        total = total + (inside * F.relu(0.6 - noun)).sum() / inside.sum().clamp(min=1)
        total = total + 2 * (outside * noun).sum() / outside.sum().clamp(min=1)
        total = total + (rest * F.relu(0.4 - place)).sum() / rest.sum().clamp(min=1)
        shares.append((inside * noun).sum() / inside.sum().clamp(min=1))
    return total / len(maps), torch.stack(shares).mean()


def sample_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """80 % logit-normal around 0.65 of the range, where shapes and colours are decided; 20 % uniform."""
    t = torch.sigmoid(0.62 + 0.8 * torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    t = torch.where(torch.rand(count, generator=generator) < 0.2, uniform, t)
    return (1000 * t).long().clamp(0, 999)


def train_unet(recipe: Recipe, data: DataSet, latents: Tensor, text: TextModel, work: Path) -> UNet:
    """eps-prediction, weighted to where the condition matters; object cells count three times.

    Appearances without a name leave nouns bare often enough, so that few captions need to keep quiet on purpose.
    """
    torch.manual_seed(recipe.seed + 2)
    unet = UNet(TOYBOX).to(memory_format=torch.channels_last)
    with torch.no_grad():  # zero the last convolution of each block, as SD's zero_module: starts as the identity
        for name, parameter in unet.named_parameters():
            if ".out_layers.3." in name or ".proj_out." in name or name.startswith("out.2."):
                parameter.zero_()
    modules = nn.ModuleDict({"unet": unet, "text": text})
    stage = TrainingStage("unet", modules, recipe.unet_steps, work / "unet.pt", ema_decay=0.999, seed=2)
    weights = (1 / alphas_cumprod()).clamp(max=25)
    weights = weights / weights.mean()

    def loss_of(step: int, generator: torch.Generator):
        rng = np.random.default_rng((2, step))
        indices = torch.randint(len(data), (recipe.batch,), generator=generator)
        told = (torch.rand(recipe.batch, generator=generator) >= 0.1).float()
        captions = [world.caption(data.scenes[i], rng, bare=0.15) for i in indices.tolist()]
        silent = world.Caption("", (), (), ())
        batch = Captions.of(
            [caption if keep else silent for caption, keep in zip(captions, told.tolist(), strict=True)]
        )
        context = context_of(text, batch, keep_padding=bool(rng.random() < 0.1))
        clean, masks = latents[indices], data.masks[indices]
        t = sample_timesteps(recipe.batch, generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = noised(clean, noise, t).contiguous(memory_format=torch.channels_last)
        maps: list[Tensor] = []
        probe = {"attention_probe": lambda layer, attention: maps.append(attention.mean(dim=1))}
        predicted = unet(noisy, t, context, transformer_options=probe)
        cells = 1 + 2 * masks.amax(dim=1, keepdim=True)
        error = ((predicted - noise) ** 2 * cells).mean(dim=(1, 2, 3)) / cells.mean(dim=(1, 2, 3))
        place, share = localisation_loss(maps, masks, batch, told)
        denoising = (weights[t] * error).mean()
        return denoising + 0.1 * place, {"eps": error.mean().item(), "place": place.item(), "noun_share": share.item()}

    stage.run(loss_of)
    return unet.eval()


# --- image tower -------------------------------------------------------------------------------------------------


def train_vision(recipe: Recipe, data: DataSet, text: TextModel, work: Path) -> VisionModel:
    """CLIP's contrastive loss against the finished text tower, of which only the projection still moves."""
    torch.manual_seed(recipe.seed + 3)
    vision = VisionModel(TOYBOX_VISION)
    text.requires_grad_(False)
    text.text_projection.requires_grad_(True)
    scale = nn.ParameterDict({"log": nn.Parameter(torch.tensor(2.7))})
    modules = nn.ModuleDict({"vision": vision, "projection": text.text_projection, "scale": scale})
    stage = TrainingStage("vision", modules, recipe.vision_steps, work / "vision.pt", ema_decay=0.99, seed=3)

    def loss_of(step: int, generator: torch.Generator):
        rng = np.random.default_rng((3, step))
        indices = torch.randint(len(data), (64,), generator=generator)
        scenes = [data.scenes[i] for i in indices.tolist()]
        captions = [world.full_caption(s) if rng.random() < 0.7 else world.caption(s, rng) for s in scenes]
        tokens = tokenize([caption.text for caption in captions])
        length = max(len(caption.text.split()) for caption in captions) + 2
        with torch.no_grad():
            hidden = encode_text(text, tokens, length)
        pooled_rows = text.pool(hidden, tokens[:, :length])
        words = F.normalize(text.text_projection(pooled_rows), dim=-1)
        images = vision.embed(vision.preprocess((data.pixels(indices) + 1).movedim(1, -1) / 2))
        logits = images @ words.T * scale["log"].exp().clamp(max=100)
        same = (tokens[:, None] == tokens[None]).all(dim=-1).float()  # equal captions are no negatives of each other
        target, target_t = same / same.sum(dim=1, keepdim=True), same / same.sum(dim=0, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target_t.T)) / 2
        right = (target.gather(1, logits.argmax(dim=1, keepdim=True)) > 0).float().mean()
        return loss, {"top1": right.item()}

    stage.run(loss_of)
    return vision.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", default="toybox-work", help="folder for checkpoints; start again with the same to resume"
    )
    parser.add_argument("--out", default=None, help="folder for the finished weights (default: the package's own)")
    for name, default in vars(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    arguments = vars(parser.parse_args())
    work, out = work_folder(arguments.pop("work")), arguments.pop("out")
    recipe = Recipe(**arguments)
    check_vocabulary()
    print(f"drawing {recipe.pictures} pictures", flush=True)
    data = DataSet.draw(recipe.pictures, recipe.seed)
    vae = train_vae(recipe, data, work)
    standardise(vae, data)
    latents = encode_all(vae, data, work)
    text = train_text(recipe, data, work)
    unet = train_unet(recipe, data, latents, text, work)
    vision = train_vision(recipe, data, text, work)
    train_decoder(recipe, data, vae, latents, work)
    print(save_weights(out, unet=unet, vae=vae, text=text, vision=vision, tokens=used_tokens(data)))


def used_tokens(data: DataSet) -> Tensor:
    """Ids of every word the world can say; the file keeps the embedding rows of these alone."""
    rng = np.random.default_rng(0)
    texts = [world.caption(scene, rng).text for scene in data.scenes[:5000]]
    texts += [world.full_caption(scene).text for scene in data.scenes[:5000]]
    return torch.unique(torch.cat([tokenize(texts).flatten(), torch.tensor([END])]))


if __name__ == "__main__":
    main()
