"""The file of a PromptNet: safetensors with our names, or the authors' released checkpoint in diffusers' names.

metadata    format, format_version, architecture, config (JSON), precision, checksum; notes.<name> for people
tensors     the network's state dict, float16 or float32
training.*  optimizer state, in the checkpoint of a training only
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import files
from ..kinds import PROMPTNET, another_kind
from ..models.configs import MAX_LEVELS, UNetConfig
from ..problems import why
from ..residual.concept import some
from .network import ENCODER, PromptNet, PromptNetConfig, PromptNetError, feature_blocks
from .released import ReleasedConfig, check_stored, config_beside, not_used, without_prefix
from .shapes import promptnet_shapes

PRECISIONS = {"float16": torch.float16, "float32": torch.float32}
SUFFIX = ".safetensors"
MAX_FILE_BYTES = 32 << 30  # SDXL's in float32 with its optimizer's state has 15
_READ = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_FORMAT = "profusion.promptnet"
_FORMAT_VERSION = "1"
_FIELDS = ("format", "format_version", "architecture", "config", "precision")
_NOTES = "notes."
_TRAINING = "training."
_OFFICIAL = "region_prompt_output.weight"  # a name that only the authors' PromptNet has
_UNUSED = ("residual_projections.", "residual_projections_2.", "mid_residual_projection.", "mid_residual_projection_2.")

# Whatever a damaged file makes of a library; a `poll` stops with an exception that is none of these.
_EXPECTED = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError)

Poll = Callable[[], None]
Warn = Callable[[str], None]

_LOG = logging.getLogger("ProFusion")


def _never() -> None:
    """Nobody wants to stop."""


def save_promptnet(
    network: PromptNet,
    path: str | Path,
    precision: str = "float16",
    notes: Mapping[str, str] | None = None,
    training: Mapping[str, Tensor] | None = None,
    overwrite: bool = True,
) -> int:
    """Write a PromptNet and return the file's bytes; missing folders are made.

    precision: "float16" or "float32", which is exact. notes: texts for people, such as what it was trained on.
    training: an optimizer's tensors, to go on later. A file already at `path` is replaced as a whole, or untouched
    where anything fails; without `overwrite` it stays, and files.NameTaken is raised. Raises PromptNetError, which
    says what to do.
    """
    return save_weights(network.state_dict(), network.config, path, precision, notes, training, overwrite)


def save_weights(
    weights: Mapping[str, Tensor],
    config: PromptNetConfig,
    path: str | Path,
    precision: str = "float16",
    notes: Mapping[str, str] | None = None,
    training: Mapping[str, Tensor] | None = None,
    overwrite: bool = True,
) -> int:
    """`save_promptnet` for a network's state dict and its configuration."""
    path = Path(path)
    if precision not in PRECISIONS:
        raise PromptNetError(f"There is no precision '{precision!s:.40}': choose one of {', '.join(PRECISIONS)}.")
    if path.suffix != SUFFIX:
        raise PromptNetError(f"The PromptNet cannot be saved as '{path}': give it a name that ends in {SUFFIX}.")
    tensors = {name: tensor.detach().to(PRECISIONS[precision]) for name, tensor in weights.items()}
    tensors |= {_TRAINING + name: tensor.detach() for name, tensor in (training or {}).items()}
    bad = _not_finite(tensors)
    if bad:
        raise PromptNetError(
            f"The PromptNet cannot be saved as {precision}: {bad} has values that are not finite in it."
        )
    metadata = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "architecture": config.architecture,
        "config": json.dumps(asdict(config)),
        "precision": precision,
    }
    pieces = files.tensor_pieces(tensors, metadata, {_NOTES + name: text for name, text in (notes or {}).items()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, pieces, overwrite)
    except (OSError, ValueError) as problem:
        raise PromptNetError(
            f"The PromptNet could not be saved as '{path}': {files.why_not_written(problem)}"
        ) from problem
    return path.stat().st_size


def load_promptnet(
    path: str | Path,
    dtype: torch.dtype | None = torch.float32,
    unet: UNetConfig | None = None,
    with_noise: bool = True,
    poll: Poll = _never,
    warn: Warn = _LOG.warning,
) -> PromptNet:
    """Read a PromptNet of either layout, in evaluation mode and frozen, on the CPU.

    dtype: of its parameters; None keeps the file's. The authors' layout does not say everything: `unet` is what it
    serves (default: told from the shapes, with the heads of Stable Diffusion 1 or 2), and `with_noise` whether its
    second latent is the one being denoised, as in their training, or the reference once more.
    Sizes are compared before any value is read, and nothing is built that the file does not fill. poll: called before
    each tensor; it stops by raising. warn: told of a config.json that was not used. Raises PromptNetError, which names
    the file, what is wrong and what to do.
    """
    path = Path(path)
    advice = "Choose a file that the PromptNet training wrote, copy it once more, or train it again."
    try:
        if path.exists() and not path.is_file():
            raise PromptNetError("it is a folder or a device, not a file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise PromptNetError(f"it is larger than {MAX_FILE_BYTES >> 30} GiB, so it must be another kind of model")
        tensors, metadata = files.read_tensors(path)
        if any(name.endswith(_OFFICIAL) for name in tensors):
            return official_promptnet(tensors, dtype, unet, with_noise, poll, config_beside(path, warn), warn)
        return _ours(tensors, metadata, dtype, poll)
    except OSError as problem:
        raise PromptNetError(f"The PromptNet file '{path}' cannot be read: {files.why_not_read(problem)}") from problem
    except _EXPECTED as problem:
        reason = another_kind(path, PROMPTNET) or f"{why(problem)}. {advice}"
        raise PromptNetError(f"The PromptNet file '{path}' cannot be loaded: {reason}") from problem


def load_training(path: str | Path) -> tuple[PromptNet, dict[str, Tensor], dict[str, str]]:
    """The PromptNet in a training's checkpoint, exact, the optimizer's tensors and the notes. Raises PromptNetError."""
    network = load_promptnet(path, dtype=None)
    tensors, metadata = files.read_tensors(Path(path))
    state = {name.removeprefix(_TRAINING): value for name, value in tensors.items() if name.startswith(_TRAINING)}
    bad = _not_finite(state)
    if not state or bad:
        why = f"has values in {bad} that are not finite" if bad else "keeps no training"
        raise PromptNetError(
            f"The PromptNet file '{path}' {why}, so its training cannot go on. Choose the checkpoint that the training "
            "wrote beside it."
        )
    notes = {name.removeprefix(_NOTES): text for name, text in metadata.items() if name.startswith(_NOTES)}
    return network, {name: value.clone() for name, value in state.items()}, notes


def _ours(tensors: dict[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None, poll: Poll) -> PromptNet:
    if metadata.get("format") != _FORMAT:
        raise PromptNetError(f"it holds something else than a PromptNet (its tensors: {some(tensors)})")
    version = metadata.get("format_version", "none")
    if version != _FORMAT_VERSION:
        raise PromptNetError(
            f"it has the format version {version:.20}, and this ProFusion reads {_FORMAT_VERSION}: either ProFusion "
            "needs an update, or the file is damaged"
        )
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith(_TRAINING)}
    config = _config(metadata.get("config", ""))
    _check_shapes(config, state)
    files.check_tensors(tensors, metadata, _FIELDS, poll)
    return _built(config, state, dtype, poll)


def _config(text: str) -> PromptNetConfig:
    try:
        found = json.loads(text)
        unet = found.pop("unet")
        known = {field.name for field in fields(PromptNetConfig)} | {field.name for field in fields(UNetConfig)}
        unknown = (set(found) | set(unet)) - known
        if unknown:
            raise PromptNetError(
                f"its configuration has {some(sorted(unknown))}, unknown here: ProFusion needs an update"
            )
        config = PromptNetConfig(UNetConfig(**_tuples(unet)), **_tuples(found))
    except PromptNetError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise PromptNetError(f"its configuration makes no sense ({problem!s:.200})") from problem
    return config


def _tuples(entries: Mapping[str, object]) -> dict[str, object]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()}


def _check_shapes(
    config: PromptNetConfig, state: Mapping[str, Tensor], theirs: Mapping[str, str] | None = None
) -> None:
    """Raise PromptNetError unless the tensors, in our names, are those of this configuration: nothing is built yet.
    theirs: how the file names them, where that is otherwise."""
    found = {name: tuple(value.shape) for name, value in state.items()}
    # One that asks for far more than there is need not be listed to its end.
    expected = dict(itertools.islice(promptnet_shapes(config), len(found) + 1000))
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        named = some([(theirs or {}).get(name, name) for name in wrong])
        raise PromptNetError(
            f"{len(wrong)} of its tensors do not fit a PromptNet of {config.architecture}: {named}; the first "
            f"should be {expected.get(wrong[0], 'absent')} and is {found.get(wrong[0], 'absent')}"
        )
    other = [name for name, value in state.items() if value.dtype not in _READ]
    if other:
        raise PromptNetError(f"{other[0]} is {state[other[0]].dtype}, and only {some(_READ)} can be read")


def _built(config: PromptNetConfig, state: Mapping[str, Tensor], dtype: torch.dtype | None, poll: Poll) -> PromptNet:
    """The network of a state dict in our names, which `_check_shapes` let pass.

    Its tensors are copied: a file may be replaced while it is in use.
    """
    bad = _not_finite(state, poll)
    if bad:
        raise PromptNetError(
            f"{bad} has values that are not finite (NaN or infinity): it is damaged, or training failed"
        )
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            network = PromptNet(config)
        network = network.to(dtype or next(iter(state.values())).dtype).to_empty(device="cpu")
        for name, value in network.state_dict().items():
            poll()
            value.copy_(state[name])
    return network.eval().requires_grad_(False)


def _not_finite(tensors: Mapping[str, Tensor], poll: Poll = _never) -> str | None:
    """The first tensor with a NaN or an infinity."""
    for name, value in tensors.items():
        poll()
        if not torch.isfinite(value).all():
            return name
    return None


# The authors' layout


def official_promptnet(
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = torch.float32,
    unet: UNetConfig | None = None,
    with_noise: bool = True,
    poll: Poll = _never,
    beside: ReleasedConfig | None = None,
    warn: Warn = _LOG.warning,
) -> PromptNet:
    """The PromptNet of the authors' state dict, whatever file it was in; see `load_promptnet`.

    beside: what config.json says of it, which counts for more than `with_noise`, unless it is of a network of other
    sizes: then `warn` is told. Raises PromptNetError.
    """
    tensors = without_prefix(tensors, _OFFICIAL)
    if _OFFICIAL not in tensors:
        raise PromptNetError(f"it holds something else than the authors' PromptNet (its tensors: {some(tensors)})")
    check_stored(tensors)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if beside is not None and beside.widths not in (None, widths := _level_widths(shapes)):
        warn(not_used(beside.path, f"is of a network of other sizes {beside.widths}, and this one has {widths}"))
        beside = None
    with_noise = with_noise if beside is None else beside.with_noise
    config = _told_from_shapes(shapes, unet, beside and beside.heads)
    config = replace(config, second_latent="noisy" if with_noise else "reference")
    listed = (name for name, _ in promptnet_shapes(config))
    names = {name: diffusers_name(name, config.unet) for name in itertools.islice(listed, len(tensors) + 1000)}
    state = {name: tensors[theirs] for name, theirs in names.items() if theirs in tensors}
    theirs = set(names.values())
    unknown = [name for name in tensors if name not in theirs and not name.startswith(_UNUSED)]
    if unknown:
        raise PromptNetError(f"it has the authors' layout, but also {some(unknown)}, which no PromptNet of theirs has")
    state["start"] = torch.zeros(config.tokens, config.text_width)
    state["spread"] = torch.ones(config.text_width)
    _check_shapes(config, state, names)
    return _built(config, state, dtype or tensors[_OFFICIAL].dtype, poll)


def _level_widths(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Channels of each level, as far as they are there."""
    named = (shapes.get(f"down_blocks.{level}.resnets.0.conv1.weight") for level in range(MAX_LEVELS))
    return tuple(shape[0] for shape in itertools.takewhile(bool, named))


def _heads(heads: tuple[int, ...] | None, widths: tuple[int, ...], linear: bool) -> dict[str, int | None]:
    """Heads of attention: those that are known, of each level, or else by the rule of Stable Diffusion 1, or of 2 and
    XL."""
    if heads is None or len(heads) != len(widths):
        return {"num_heads": None if linear else 8, "head_channels": 64 if linear else None}
    if len(set(heads)) == 1:
        return {"num_heads": heads[0], "head_channels": None}
    each = {width / count for width, count in zip(widths, heads, strict=True)}
    if len(each) != 1 or not all(size.is_integer() for size in each):
        raise PromptNetError(
            f"config.json beside it says attention_head_dim={list(heads)}, which is neither one number of heads nor "
            "one width of a head at every level"
        )
    return {"num_heads": None, "head_channels": int(each.pop())}


def _told_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], unet: UNetConfig | None = None, heads: tuple[int, ...] | None = None
) -> PromptNetConfig:
    """The configuration of a released checkpoint; what it lacks is found when the tensors are compared. heads: of each
    level, where that is known."""

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})

    def depth(attention: str) -> int:
        return count(f"{attention}.transformer_blocks.")

    try:
        width, channels = shapes["conv_in.weight"][:2]
        levels = range(min(count("down_blocks."), MAX_LEVELS + 1))
        linear = len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2
        context_dim, image_width = shapes["vision_embedding.weight"]
        text_width, _, grid, _ = shapes[_OFFICIAL]
        unet = unet or UNetConfig(
            model_channels=width,
            channel_mult=tuple(shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] // width for level in levels),
            num_res_blocks=count("down_blocks.0.resnets."),
            transformer_depth=tuple(depth(f"down_blocks.{level}.attentions.0") for level in levels),
            middle_depth=depth("mid_block.attentions.0"),
            context_dim=context_dim,
            **_heads(heads, _level_widths(shapes), linear),
            use_linear=linear,
            in_channels=channels,
        )
        projection = shapes["first_prompt_projection.weight"][0]
        return PromptNetConfig(
            unet, image_width, (text_width,), 1, grid, projection, "noisy", holds_position=True, normalise=False
        )
    except PromptNetError:
        raise
    except (KeyError, ValueError, TypeError, IndexError, ZeroDivisionError) as problem:
        raise PromptNetError(f"it has the authors' layout, but not all of it ({problem!s:.200})") from problem


_RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_SINGLE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "second_latent.0": "promptnet_cond_embedding.conv_in",
    "second_latent.2": "promptnet_cond_embedding.conv_out",
    "image_projection": "vision_embedding",
    "projections.0": "first_prompt_projection",
    "output": "region_prompt_output",
}


def diffusers_name(name: str, unet: UNetConfig) -> str:
    """The name of one of our parameters in the authors' checkpoint, which has diffusers'
    (its module is promptnet.py)."""
    module, _, kind = name.rpartition(".")
    if module in _SINGLE:
        return f"{_SINGLE[module]}.{kind}"
    part, _, rest = name.partition(".")
    if part == "projections":
        number, last = int(rest.split(".")[0]), len(feature_blocks(unet)[1]) - 1
        return f"mid_prompt_projection.{kind}" if number == last else f"down_prompt_projections.{number - 1}.{kind}"
    if part == "middle_block":
        number, _, inner = rest.partition(".")
        if number == "1":
            return f"mid_block.attentions.0.{inner}"
        return f"mid_block.resnets.{int(number) // 2}.{_in_res_block(inner)}"
    if name.startswith(ENCODER):
        number, layer, inner = rest.split(".", 2)
        level, index = divmod(int(number) - 1, unet.num_res_blocks + 1)
        if inner.startswith("op."):
            return f"down_blocks.{level}.downsamplers.0.conv.{kind}"
        if layer == "1":
            return f"down_blocks.{level}.attentions.{index}.{inner}"
        return f"down_blocks.{level}.resnets.{index}.{_in_res_block(inner)}"
    return name


def _in_res_block(inner: str) -> str:
    module, _, kind = inner.rpartition(".")
    return f"{_RES[module]}.{kind}"
