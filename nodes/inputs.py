"""The inputs that several nodes have, each written once."""

from __future__ import annotations

from comfy_api.latest import io

from .host.budget import CHECKPOINTING
from .host.drawing import SAMPLERS, SCHEDULERS

LARGEST_SEED = 0xFFFFFFFFFFFFFFFF


def advanced(one: io.Input) -> io.Input:
    """The input, folded away until somebody asks for it, where the frontend can do that."""
    one.extra_dict["advanced"] = True  # older hosts' schemas have no argument for it
    return one


def found_by(schema: io.Schema, *aliases: str) -> io.Schema:
    """The schema, which the node search also finds by these words, where the frontend can do that."""
    schema.search_aliases = list(aliases)  # older hosts' schemas have no argument for it
    return schema


def clip() -> io.Clip.Input:
    return io.Clip.Input("clip", tooltip="The text encoder that belongs to the model.")


def clip_vision() -> io.ClipVision.Input:
    return io.ClipVision.Input("clip_vision", tooltip="The image encoder that the PromptNet was trained with.")


def vae(tooltip: str = "The VAE that belongs to the model.", optional: bool = False) -> io.Vae.Input:
    return io.Vae.Input("vae", optional=optional, tooltip=tooltip)


def promptnet() -> io.Input:
    return io.Custom("PROMPTNET").Input("promptnet", tooltip="From PromptNet Loader.")


def masks(tooltip: str) -> io.Mask.Input:
    """White where the object is, one mask for each picture or one for all. tooltip: what is done with it."""
    return io.Mask.Input(
        "masks", optional=True, tooltip=f"White where the object is, one for each picture or one for all. {tooltip}"
    )


def seed(tooltip: str, changes_after_run: bool = False) -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=LARGEST_SEED,
        control_after_generate=changes_after_run,
        tooltip=tooltip,
    )


def steps(default: int, tooltip: str, name: str = "steps", largest: int = 100_000) -> io.Int.Input:
    return io.Int.Input(name, default=default, min=1, max=largest, tooltip=tooltip)


def learning_rate(default: float, tooltip: str, name: str = "learning_rate") -> io.Float.Input:
    """Of a network's weights; a residual's is larger."""
    return io.Float.Input(name, default=default, min=1e-7, max=1.0, step=1e-6, round=False, tooltip=tooltip)


def cfg(tooltip: str, name: str = "cfg", default: float = 6.0, rounding: float | None = 0.01) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=100.0, step=0.1, round=rounding, tooltip=tooltip)


def batch_size() -> io.Int.Input:
    return io.Int.Input(
        "batch_size", default=4, min=1, max=64, tooltip="Noisy pictures per step. Lower it if you run out of memory."
    )


def gradient_checkpointing() -> io.Combo.Input:
    return io.Combo.Input(
        "gradient_checkpointing",
        options=list(CHECKPOINTING),
        default="auto",
        optional=True,
        tooltip="Compute parts of the model twice to save memory: a step takes 40 to 60 % longer. auto: only where "
        "memory is short.",
    )


def sampler_name(tooltip: str = "As in KSampler.") -> io.Combo.Input:
    return io.Combo.Input("sampler_name", options=SAMPLERS, default="euler", tooltip=tooltip)


def scheduler(tooltip: str = "As in KSampler.") -> io.Combo.Input:
    return io.Combo.Input("scheduler", options=SCHEDULERS, default="simple", tooltip=tooltip)


def strength(suffix: str, tooltip: str, optional: bool = False) -> io.Float.Input:
    return io.Float.Input(
        f"strength{suffix}", default=1.0, min=-4.0, max=4.0, step=0.05, optional=optional, tooltip=tooltip
    )


def share(name: str, default: float, tooltip: str) -> io.Float.Input:
    """A share of sampling, 0 to 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def weight(name: str, tooltip: str, default: float = 1.0, optional: bool = False) -> io.Float.Input:
    """Of a conditioning beside others."""
    return io.Float.Input(name, default=default, min=-10.0, max=10.0, step=0.05, optional=optional, tooltip=tooltip)


def negative() -> io.Conditioning.Input:
    return io.Conditioning.Input("negative", tooltip="The unconditional: an empty prompt, or what you do not want.")
