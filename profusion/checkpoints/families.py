"""Which family of Stable Diffusion a checkpoint is of, and where it has its networks; or what it is instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .. import kinds
from .contents import CheckpointError, Contents, refusal

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_SGM = "conditioner.embedders."


@dataclass(frozen=True)
class Tower:
    """A text tower: the prefixes it may have, its layout, and what the family takes of it (TextConfig's names)."""

    prefixes: tuple[str, ...]
    open_clip: bool
    taken: dict[str, object]


@dataclass(frozen=True)
class Family:
    """What all checkpoints of a family share, and their shapes do not say. size: the pictures' side, in pixels."""

    name: str
    heads: dict[str, int]
    scale_factor: float
    towers: tuple[Tower, ...]
    size: int


_OPEN_CLIP = {"activation": "gelu", "skip": 1, "pad": 0}
FAMILIES = {
    "SD 1.x": Family(
        "SD 1.x",
        {"num_heads": 8},
        0.18215,
        (Tower(("cond_stage_model.transformer.",), False, {}),),
        512,
    ),
    "SD 2.x": Family(
        "SD 2.x",
        {"head_channels": 64},
        0.18215,
        (Tower(("cond_stage_model.model.", f"{_SGM}0.model."), True, _OPEN_CLIP),),
        768,
    ),
    "SDXL": Family(
        "SDXL",
        {"head_channels": 64},
        0.13025,
        (
            Tower((f"{_SGM}0.transformer.",), False, {"skip": 1, "final_norm": False}),
            Tower((f"{_SGM}1.model.",), True, {**_OPEN_CLIP, "final_norm": False}),
        ),
        1024,
    ),
}

_IN_CHANNELS = {
    5: "it is a depth-to-image checkpoint, whose UNet also takes a depth map (5 channels)",
    7: "it is an upscaling checkpoint, whose UNet also takes a small picture (7 channels)",
    8: "it is an instruct-pix2pix checkpoint, whose UNet also takes the picture to edit (8 channels)",
    9: "it is an inpainting checkpoint, whose UNet also takes a mask and what is around it (9 channels)",
}
_PLAIN = ". Take the plain checkpoint that it was made from"

# Names after the UNet's prefix, or without it in a file of a diffusion model alone. More telling ones come first.
_FOREIGN = (
    ("joint_blocks.", "SD 3"),
    ("double_blocks.", "Flux, or of another one built as it is"),
    ("double_layers.", "AuraFlow"),
    ("single_transformer_blocks.", "Flux, in diffusers' names"),
    ("clip_txt_mapper.", "Stable Cascade"),
    ("clf.", "Stable Cascade"),
    ("mlp_t5.", "Hunyuan-DiT"),
    ("noise_refiner.", "Lumina"),
    ("caption_projection.", "PixArt or a transformer like it"),
    ("transformer_blocks.", "a transformer, and not of a UNet"),
    ("blocks.", "a transformer, and not of a UNet"),
)
_UNKNOWN_SCHEDULES = {
    "edm_mean": "it has EDM's noise levels, as Playground 2.5 has them",
    "edm_vpred.sigma_max": "it has EDM's noise levels, as CosXL has them",
    "ztsnr": "its noise schedule ends in pure noise (zero terminal SNR), which no sampler here can start from",
}


def family_of(contents: Contents) -> Family:
    """The family of a checkpoint that has all its networks.

    Raises CheckpointError, which says what the file is instead: of another kind, of another model, a variant that
    takes more than noise, or pruned of its text encoder or its VAE.
    """
    unet = contents.under(UNET)
    _check_foreign(contents, unet or contents.shapes, alone=not unet)
    if "input_blocks.0.0.weight" not in unet or "middle_block.1.proj_in.weight" not in unet:
        raise _of_another_kind(contents)
    family = FAMILIES[_name(contents, unet)]
    for key, reason in _UNKNOWN_SCHEDULES.items():
        if key in contents.shapes:
            raise refusal(contents.path, f"it is an {family.name} checkpoint, but {reason}")
    _check_whole(contents, family)
    return family


def prefix_of(contents: Contents, tower: Tower) -> str | None:
    """The prefix under which this file has a text tower, None where it has none."""
    layer = "transformer.resblocks.0." if tower.open_clip else ("text_model.encoder.layers.0.", "encoder.layers.0.")
    beginnings = (layer,) if isinstance(layer, str) else layer
    found = (prefix for prefix in tower.prefixes if contents.any_begins(*(prefix + start for start in beginnings)))
    return next(found, None)


def _name(contents: Contents, unet: dict) -> str:
    channels = unet["input_blocks.0.0.weight"][1]
    if channels != 4:
        what = _IN_CHANNELS.get(channels, f"it is a variant whose UNet takes {channels} channels and not 4")
        raise refusal(contents.path, what + _PLAIN)
    if any(".time_stack." in name or ".time_mix" in name for name in unet):
        raise refusal(contents.path, "it is a video model built on SD 2.x (Stable Video Diffusion)")
    linear = len(unet["middle_block.1.proj_in.weight"]) == 2
    adm = unet.get("label_emb.0.0.weight", (0, 0))[1]
    if not adm:
        return "SD 2.x" if linear else "SD 1.x"
    if contents.any_begins("embedder.model.visual.") or adm in (1536, 2048):
        raise refusal(contents.path, "it is an unCLIP checkpoint, whose UNet also takes an image's embedding" + _PLAIN)
    only_g = contents.any_begins(f"{_SGM}0.model.") and not contents.any_begins(f"{_SGM}1.")
    if only_g or adm == 2560:
        raise refusal(
            contents.path, "it is SDXL's refiner, which finishes what the base model drew. Take the base checkpoint"
        )
    return "SDXL"


def _check_whole(contents: Contents, family: Family) -> None:
    towers = [prefix_of(contents, tower) for tower in family.towers]
    if None in towers:
        count = "text encoder" if len(towers) == 1 else f"text encoders ({towers.count(None)} of {len(towers)})"
        raise refusal(
            contents.path,
            f"it is an {family.name} checkpoint pruned of its {count}. Take the whole checkpoint, or save one with "
            "the text encoder in it",
        )
    for part in ("encoder", "decoder"):
        if f"{VAE}{part}.conv_in.weight" not in contents.shapes:
            what = "VAE" if not contents.any_begins(VAE) else f"VAE's {part}"
            raise refusal(
                contents.path,
                f"it is an {family.name} checkpoint pruned of its {what}. Take the whole checkpoint, or save one with "
                "the VAE in it",
            )


def _check_foreign(contents: Contents, names: dict, alone: bool) -> None:
    starts: Callable[[str], bool] = lambda beginning: any(name.startswith(beginning) for name in names)  # noqa: E731
    for beginning, model in _FOREIGN:
        if starts(beginning) and not starts("input_blocks."):
            what = "a diffusion model" if alone else "a checkpoint"
            raise refusal(
                contents.path, f"it is {what} of {model}. SD 1.x, SD 2.x and SDXL can be loaded, and no others"
            )


def _of_another_kind(contents: Contents) -> CheckpointError:
    reason = kinds.another_kind(contents.path, kinds.CHECKPOINT)
    if reason is None:
        names = ", ".join(f"'{name:.60}'" for name in list(contents.shapes)[:2]) or "nothing"
        reason = f"it is no checkpoint of SD 1.x, SD 2.x or SDXL: it holds {names}"
    return refusal(contents.path, reason.rstrip("."))
