"""The kernel's networks of a checkpoint: every tensor of the file is used, or known to be none of theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..diffusion import Prediction
from ..models.conditioning import TextTowers
from ..models.configs import TextConfig, UNetConfig, VAEConfig
from ..models.unet import UNet
from ..models.vae import VAE as Autoencoder
from . import openclip, sizes
from .contents import CheckpointError, Contents, read_contents, refusal
from .families import UNET, VAE, Family, Tower, family_of, prefix_of
from .filling import Part, fill
from .openclip import Source, Sources

# What checkpoints hold beside their networks' weights: averages, what training kept, schedules, positions, logits.
_IGNORED = re.compile(
    r"(.*\.)?(position_ids|attn_mask|logit_scale)"
    r"|(model_ema|loss|first_stage_model\.(loss|model_ema)|denoiser|sampler|optimizer|callbacks|lr_schedulers)\..*"
    r"|((sqrt|log|posterior)_.*|betas|alphas_cumprod(_prev)?|lvlb_weights|logvar|v_pred|scale_factor|global_step|epoch)"
    r"|conditioner\.embedders\.[2-9]\..*"
)
_V_STATISTIC, _V_FROM = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09


@dataclass(frozen=True)
class TowerPlan:
    """A text tower of a file: its configuration, and where each tensor of its state dict is, by whole names."""

    config: TextConfig
    sources: Sources


@dataclass(frozen=True)
class Plan:
    """All that a checkpoint's header says: which networks it has, of which sizes, and from where they are filled."""

    contents: Contents
    family: Family
    unet: UNetConfig
    vae: VAEConfig
    towers: tuple[TowerPlan, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's networks, in evaluation mode and frozen, and what its UNet predicts."""

    family: Family
    unet: UNet
    vae: Autoencoder
    text: TextTowers
    prediction: Prediction

    @property
    def size(self) -> int:
        """The side of the pictures that it was trained on."""
        return _native_size(self.family, self.prediction)


def plan(path: str | Path) -> Plan:
    """Read a checkpoint's header and plan its networks. Raises CheckpointError, which says what the file is instead."""
    contents = read_contents(path)
    try:
        family = family_of(contents)
        unet = sizes.unet_config(contents.under(UNET), **family.heads)
        vae = sizes.vae_config(contents.under(VAE), family.scale_factor)
        towers = tuple(_tower_plan(contents, tower) for tower in family.towers)
    except CheckpointError:
        raise
    except sizes.UnlikeSD as problem:
        raise refusal(contents.path, f"it is a checkpoint like SD's whose UNet {problem}") from problem
    except KeyError as problem:
        raise refusal(contents.path, f"it is a checkpoint that lacks '{problem.args[0]:.80}'") from problem
    except (ValueError, IndexError, ZeroDivisionError) as problem:
        raise refusal(contents.path, f"it is a checkpoint of sizes unknown here ({problem})") from problem
    made = Plan(contents, family, unet, vae, towers)
    _check_used(made)
    return made


def load_checkpoint(path: str | Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Load a checkpoint of SD 1.x, SD 2.x or SDXL into the kernel's networks, with weights of this type; the VAE's are
    float32 where it is float16, whose numbers are too small for SDXL's.

    Raises CheckpointError, which says what the file is instead, or what it lacks.
    """
    from ..models.clip import TextModel  # with transformers, which the pack does not wait for

    made = plan(path)
    contents = made.contents
    autoencoders = torch.float32 if dtype == torch.float16 else dtype
    parts = [
        Part(UNet, made.unet, prefixed(contents, UNET), "UNet", dtype),
        Part(Autoencoder, made.vae, prefixed(contents, VAE), "VAE", autoencoders),
        *(Part(TextModel, tower.config, tower.sources, "text encoder", dtype) for tower in made.towers),
    ]
    unet, vae, *towers = fill(contents, parts)
    return Checkpoint(made.family, unet, vae, TextTowers(tuple(towers)), prediction(contents, made.family))


def prediction(contents: Contents, family: Family) -> Prediction:
    """What the UNet predicts, decided as the host decides it: SD 2.x by a statistic of one tensor, SDXL by a key."""
    if family.name == "SDXL":
        return "v" if "v_pred" in contents.shapes else "eps"
    name = UNET + _V_STATISTIC
    if family.name == "SD 2.x" and name in contents.shapes:
        (_, tensor), *_ = contents.tensors([name])
        return "v" if torch.std(tensor, unbiased=False) > _V_FROM else "eps"
    return "eps"


def native_size(made: Plan) -> int:
    """The side in pixels of the pictures that a planned checkpoint was trained on."""
    return _native_size(made.family, prediction(made.contents, made.family))


def _native_size(family: Family, predicts: Prediction) -> int:
    return 512 if (family.name, predicts) == ("SD 2.x", "eps") else family.size  # the base of SD 2.x, as SD 1.x


def prefixed(contents: Contents, prefix: str) -> Sources:
    """Sources of a network that the file has under a prefix and otherwise with its own names."""
    return {name: Source(prefix + name) for name in contents.under(prefix) if not _IGNORED.fullmatch(prefix + name)}


def _tower_plan(contents: Contents, tower: Tower) -> TowerPlan:
    prefix = prefix_of(contents, tower)
    shapes = {name: shape for name, shape in contents.under(prefix).items() if not _IGNORED.fullmatch(prefix + name)}
    if tower.open_clip:
        sources = openclip.text_sources(shapes)
    else:  # the oldest files leave `text_model.` out
        bare = "" if any(name.startswith("text_model.") for name in shapes) else "text_model."
        sources = {bare + name: Source(name) for name in shapes}
    named = {name: source.shape(shapes[source.name]) for name, source in sources.items()}
    config = sizes.text_config(named, **tower.taken)
    if config.skip and config.final_norm and (config.width, config.layers) == (1024, 23):
        # SD 2.x converted from diffusers' files, which leave the layer out that SD 2.x does not use
        config = sizes.text_config(named, **{**tower.taken, "skip": 0})
    whole = {name: Source(prefix + source.name, source.third, source.turned) for name, source in sources.items()}
    return TowerPlan(config, whole)


def _check_used(made: Plan) -> None:
    """Raise CheckpointError for a tensor that no network of the family has and that is not known to be ignored."""
    used = {source.name for tower in made.towers for source in tower.sources.values()}
    networks = (name for name in made.contents.shapes if name.startswith((UNET, VAE)) and not _IGNORED.fullmatch(name))
    made.contents.check_types((*networks, *used))
    unknown = [name for name in _unused(made.contents, used) if not _IGNORED.fullmatch(name)]
    if unknown:
        raise refusal(
            made.contents.path,
            f"it is an {made.family.name} checkpoint with {len(unknown)} tensors more, which are unknown here, such as "
            f"'{unknown[0]:.80}'. Leaving them out might make another model of it",
        )


def _unused(contents: Contents, used: Iterable[str]) -> list[str]:
    used = set(used)
    return [name for name in contents.shapes if name not in used and not name.startswith((UNET, VAE))]
