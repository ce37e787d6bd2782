"""The authors' release: an archive of torch's, which is looked through before anything is made of it.

torch's own reader runs no code of such a file, but believes its sizes: a record may be deflated to a thousandth, and
what is called while it reads may ask for any amount of memory. A checkpoint needs neither.

What its tensors do not say, `config.json` beside it does, as diffusers writes it. Other programs put something before
the names of its tensors.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .. import files, programs
from ..problems import why

MAX_RECORDS = 20_000

_NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
_NAMES |= {f"torch {kind}Storage" for kind in ("Half", "BFloat16", "Float", "Double", "Long", "Int", "Bool")}
_LISTS = {"EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_ENDS = {"STOP", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_CALLS = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}


def check_archive(path: Path) -> None:
    """Raise FileFormatError unless it is an archive as torch writes it that holds tensors by name, and OSError."""
    with path.open("rb") as file:
        beginning = file.read(64)
    if not beginning.startswith(b"PK\x03\x04"):
        raise files.FileFormatError(
            "it is in torch's old format, or damaged" if beginning[:1] == b"\x80" else files.what_it_is(beginning)
        )
    try:
        with zipfile.ZipFile(path) as archive:
            _check_program(_program(archive, path.stat().st_size))
    except files.FileFormatError:
        raise
    except Exception as problem:  # whatever a damaged file makes of zipfile and pickletools
        raise files.FileFormatError(f"it is cut short or damaged ({why(problem)})") from problem


def _program(archive: zipfile.ZipFile, size: int) -> bytes:
    """The record that says which tensors there are."""
    records = archive.infolist()
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed or sum(record.file_size for record in records) > size:
        raise files.FileFormatError("it is compressed, or its records overlap, and a checkpoint of torch's never is")
    found = [record for record in records if record.filename.endswith("/data.pkl")]
    if len(records) > MAX_RECORDS or len(found) != 1 or found[0].file_size > programs.MAX_BYTES:
        raise files.FileFormatError("it is an archive, but not a checkpoint of torch's")
    return archive.read(found[0])


def _check_program(program: bytes) -> None:
    first = last = None
    for step in programs.steps(program):
        first = step if first is None and step.code not in ("PROTO", "FRAME") else first
        last = last if step.code in _ENDS else step
        if step.code in _CALLS or (step.name is not None and step.name not in _NAMES):
            raise files.FileFormatError(f"it asks for more than tensors: {step.code} {step.name or '':.80}".rstrip())
    what = None
    if last is not None and last.code in _LISTS:
        what = "a list of tensors"
    elif last is not None and last.code == "REDUCE" and "_rebuild_" in (first.name or ""):
        what = "one tensor"
    if what:
        raise files.FileFormatError(f"it is {what} without a name, and those of a PromptNet have one each")


def check_stored(tensors: Mapping[str, Tensor]) -> None:
    """Raise FileFormatError where tensors share memory, or repeat it, so that they have more numbers than the file."""
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > sum(stored.values()):
        raise files.FileFormatError("its tensors have more numbers than it has bytes for")


# What its tensors do not say


PREFIXES = ("module.", "promptnet.", "prompt_net.", "model.", "net.", "state_dict.", "_orig_mod.")
MAX_CONFIG_BYTES = 1 << 20
CONFIG_FILE = "config.json"
_CLASS = "PromptNetModel"
# Whatever else it may say, the network here is this one: by field, all values that are.
_FIXED = {
    "act_fn": ("silu",),
    "norm_num_groups": (32,),
    "norm_eps": (1e-5,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "time_embedding_type": ("positional",),
    "resnet_time_scale_shift": ("default",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "mid_block_scale_factor": (1,),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
}


@dataclass(frozen=True)
class ReleasedConfig:
    """What a released file's config.json says of it: whether its second latent is the one being denoised, and how many
    attention heads each level has, None where it does not say."""

    with_noise: bool = True
    heads: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None
    path: Path = Path(CONFIG_FILE)


def without_prefix(tensors: Mapping[str, Tensor], known: str) -> Mapping[str, Tensor]:
    """A PromptNet's tensors by their own names, one of which is `known`: PREFIXES come off, any number of them, and
    tensors without them, which are of other parts of a pipeline, are left out."""
    for name in tensors:
        prefix = rest = name.removesuffix(known)
        while found := next((one for one in PREFIXES if rest.startswith(one)), None):
            rest = rest.removeprefix(found)
        if name.endswith(known) and prefix and not rest:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return tensors


def config_beside(path: Path, warn: Callable[[str], None]) -> ReleasedConfig | None:
    """What config.json in a file's folder says, where it is a PromptNet's; warn: told where it is another program's.

    Raises FileFormatError, which names the file and the field, where it cannot be read, or is of a network that cannot
    be built here.
    """
    beside = path.with_name(CONFIG_FILE)
    try:
        if beside.stat().st_size > MAX_CONFIG_BYTES:
            warn(not_used(beside, f"is larger than {MAX_CONFIG_BYTES >> 20} MiB"))
            return None
        found = json.loads(beside.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as problem:
        raise files.FileFormatError(
            f"'{beside}' beside it cannot be read as JSON ({why(problem)}). Download it once more from where the "
            "PromptNet is from, or move it out of this folder if it belongs to something else"
        ) from problem
    named = found.get("_class_name") if isinstance(found, dict) else None
    if named != _CLASS:
        warn(not_used(beside, f"is of {named!r:.60} and not {_CLASS}" if named else "says of no class that it is its"))
        return None
    for field, values in _FIXED.items():
        said = found.get(field, values[0])
        each = said if isinstance(said, list) else [said]  # some may be said of each level
        if any(one not in values for one in each):
            raise files.FileFormatError(
                f"{CONFIG_FILE} beside it says {field}={said!r:.60}, and only {values[0]!r} can be built here"
            )
    levels = _numbers(found.get("block_out_channels"))
    heads = found.get("attention_head_dim")
    heads = _numbers([heads] * len(levels or ()) if isinstance(heads, int) else heads)
    with_noise = found.get("with_noise", True)
    if not isinstance(with_noise, bool):
        raise files.FileFormatError(
            f"'{beside}' beside it says with_noise={with_noise!r:.60}: write true or false there, as it was released, "
            "or download it once more"
        )
    return ReleasedConfig(with_noise, heads, levels, beside)


def not_used(beside: Path, reason: str) -> str:
    """That a config.json says nothing of the network, and what is taken for granted instead; a sentence."""
    return (
        f"'{beside}' {reason}, so it was not used. In its place: PromptNet looks at the latent being denoised "
        "(with_noise), and has as many heads as Stable Diffusion's UNet of its size. Put the PromptNet's own "
        "config.json there, or the PromptNet into a folder of its own."
    )


def _numbers(values: object) -> tuple[int, ...] | None:
    known = isinstance(values, list) and values and all(type(value) is int and value > 0 for value in values)
    return tuple(values) if known else None
