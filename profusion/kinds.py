"""What a model file is that was given for another: told from the names in it, and where it belongs.

Nothing is loaded, and nothing runs: a safetensors file has its names in its header, and of an archive of torch's the
program that would rebuild it is listed, not followed.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import programs

MAX_HEADER_BYTES = 8 << 20  # SDXL's checkpoint has a quarter of one

# torch's old format is five programs in a row: this number, its version, the machine, what is kept, and the names of
# its tensors' memory.
_OLD_FORMAT = 0x1950A86A20F9469CFC6C
_OLD_PROGRAMS = 5


@dataclass(frozen=True)
class Kind:
    """what: completes "it is ...". advice: where it belongs, a sentence."""

    what: str
    advice: str


@dataclass(frozen=True)
class Inside:
    """Names in a file: of its tensors, or whatever texts an archive's program has. metadata: a safetensors file's.
    calls: what an archive's program would call, as "module name"."""

    names: tuple[str, ...] = ()
    metadata: Mapping[str, str] | None = None
    calls: tuple[str, ...] = ()

    def any_has(self, *parts: str) -> bool:
        """Whether a name has one of these in it."""
        return any(part in name for name in self.names for part in parts)

    def any_begins(self, *beginnings: str) -> bool:
        """Whether a name begins with one of these."""
        return any(name.startswith(beginnings) for name in self.names)


RESIDUAL = Kind("a residual of ours", "Put it into models/profusion_residuals and choose it in Residual Loader.")
PROMPTNET = Kind("a PromptNet", "Put it into models/profusion_promptnets and choose it in PromptNet Loader.")
LORA = Kind("a LoRA", "Put it into models/loras and choose it in Load LoRA.")
EMBEDDING = Kind(
    "a textual-inversion embedding",
    "Put it into models/embeddings and write embedding:its_name in a prompt.",
)
INFUSION = Kind(
    "a checkpoint of Infusion's own released code",
    "It adds to keys and values after their projection, which a residual here cannot say. Train one with Residual "
    "Trainer from the same pictures.",
)
CHECKPOINT = Kind("a whole checkpoint", "Put it into models/checkpoints and choose it in Load Checkpoint.")
CONTROLNET = Kind("a ControlNet", "Put it into models/controlnet and choose it in Load ControlNet Model.")
IP_ADAPTER = Kind("an IP-Adapter", "Put it where your IP-Adapter nodes look for it, such as models/ipadapter.")
DIFFUSION_MODEL = Kind(
    "a diffusion model alone, without its text encoder and VAE",
    "Put it into models/diffusion_models and choose it in Load Diffusion Model. Of the folder of a ProFusion pipeline, "
    "PromptNet Loader takes promptnet/diffusion_pytorch_model.bin, not the file of the same name in unet.",
)
VAE = Kind("a VAE", "Put it into models/vae and choose it in Load VAE.")
T2I_ADAPTER = Kind("a T2I-Adapter", "Put it into models/controlnet and choose it in Load ControlNet Model.")
TAESD = Kind("TAESD, a small VAE for previews", "Put it into models/vae_approx.")
UPSCALER = Kind("an upscaler", "Put it into models/upscale_models and choose it in Load Upscale Model.")
HYPERNETWORK = Kind("a hypernetwork", "Put it into models/hypernetworks and choose it in HypernetworkLoader.")
TEXT_ENCODER = Kind("a text encoder", "Put it into models/text_encoders and choose it in Load CLIP.")
VISION_ENCODER = Kind("an image encoder", "Put it into models/clip_vision and choose it in Load CLIP Vision.")

_EMBEDDING_NAMES = {"emb_params", "string_to_param", "string_to_token", "clip_l", "clip_g", "t5xxl"}
_TENSORS_OF_A_LORA = (
    ".lora_up.",
    ".lora_down.",
    ".lora_A.",
    ".lora_B.",
    ".lora.up.",
    ".lora.down.",
    "_lora.up.",
    "_lora.down.",
    ".lokr_w",
    ".hada_w",
    ".oft_",
    ".dora_scale",
)
_PROMPTNETS_OWN = ("region_prompt_output.weight", "promptnet_cond_embedding.", "second_latent.")


def _is_glora(inside: Inside) -> bool:
    ends = {name.rpartition(".")[0].rpartition(".")[2] for name in inside.names if name.endswith(".weight")}
    return {"a1", "b1"} <= ends


# In this order: what is more telling comes first.
_KINDS: tuple[tuple[Kind, Callable[[Inside], bool]], ...] = (
    (INFUSION, lambda inside: inside.any_has("target_output")),
    (PROMPTNET, lambda inside: inside.any_has(*_PROMPTNETS_OWN)),
    (LORA, lambda inside: inside.any_has(*_TENSORS_OF_A_LORA) or inside.any_begins("lora_unet_", "lora_te")),
    (LORA, lambda inside: _is_glora(inside) or any(name.endswith((".diff", ".diff_b")) for name in inside.names)),
    (T2I_ADAPTER, lambda inside: inside.any_begins("adapter.body.", "body.0.block1.")),
    (UPSCALER, lambda inside: inside.any_has(".RDB1.", ".rdb1.", "RRDB_trunk.")),
    (HYPERNETWORK, lambda inside: any(re.match(r"\d{3,4}\.\d+\.linear\b", name) for name in inside.names)),
    (TAESD, lambda inside: any(re.fullmatch(r"(taesd_\w+\.)?\d+\.conv\.0\.weight", name) for name in inside.names)),
    (IP_ADAPTER, lambda inside: inside.any_begins("ip_adapter.", "image_proj.")),
    (EMBEDDING, lambda inside: bool(_EMBEDDING_NAMES & set(inside.names[:50])) and len(inside.names) < 500),
    (EMBEDDING, lambda inside: len(inside.names) <= 2 and inside.any_begins("<")),
    (CHECKPOINT, lambda inside: inside.any_has("model.diffusion_model.")),
    (
        CONTROLNET,
        lambda inside: inside.any_begins("control_model.", "controlnet_", "input_hint_block.", "zero_convs."),
    ),
    (
        DIFFUSION_MODEL,
        lambda inside: inside.any_begins("time_embedding.", "time_embed.", "joint_blocks.", "double_blocks."),
    ),
    (VAE, lambda inside: inside.any_begins("first_stage_model.", "decoder.conv_in.", "decoder.conv_out.")),
    (VISION_ENCODER, lambda inside: inside.any_begins("vision_model.", "visual.")),
    (
        TEXT_ENCODER,
        lambda inside: inside.any_begins("text_model.", "cond_stage_model.", "encoder.block.", "model.layers."),
    ),
)
_OURS = {"profusion.residual": RESIDUAL, "profusion.promptnet": PROMPTNET}


def kind_of(path: str | Path) -> Kind | None:
    """What a file is, told from its names; None where that cannot be told. Raises nothing."""
    with suppress(Exception):  # whatever a damaged file makes of a library: its own loader says what is wrong
        return _kind(names_in(Path(path)))
    return None


def another_kind(path: str | Path, wanted: Kind) -> str | None:
    """Where the file is of a known kind other than the wanted one: "it is ... . Put it ..."; None otherwise."""
    kind = kind_of(path)
    return None if kind is None or kind == wanted else f"it is {kind.what}. {kind.advice}"


def _kind(inside: Inside) -> Kind | None:
    danger = next((call for call in inside.calls if not programs.of_models(call)), None)
    if danger is not None:
        return Kind(
            f"a file that would run code if it were opened: {danger.replace(' ', '.', 1):.60}",
            "No model needs that. Delete it without opening it.",
        )
    own = _OURS.get((inside.metadata or {}).get("format", ""))
    return own or next((kind for kind, fits in _KINDS if fits(inside)), None)


def names_in(path: Path) -> Inside:
    """The names in a safetensors file or an archive of torch's. Raises OSError or ValueError for anything else."""
    if not path.is_file():  # a pipe would never answer
        raise ValueError("no file")
    with path.open("rb") as file:
        beginning = file.read(8)
        if beginning.startswith(b"PK\x03\x04"):
            return _in_archive(path)
        length = int.from_bytes(beginning, "little")
        if length > MAX_HEADER_BYTES:
            if beginning[:1] == b"\x80":  # torch's old format, which is a few pickles in a row
                return _in_programs(beginning + file.read(programs.MAX_BYTES))
            raise ValueError("no safetensors header")
        header: dict[str, object] = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None)
    return Inside(tuple(header), metadata if isinstance(metadata, dict) else None)


def _in_archive(path: Path) -> Inside:
    with zipfile.ZipFile(path) as archive:
        found = [record for record in archive.infolist() if re.fullmatch(r"(.*/)?data\.pkl", record.filename)]
        if len(found) != 1 or found[0].file_size > programs.MAX_BYTES or found[0].compress_type != zipfile.ZIP_STORED:
            raise ValueError("no archive of torch's")
        return _in_programs(archive.read(found[0]))


def _in_programs(data: bytes) -> Inside:
    """The texts of a program, or of all of torch's old format, and what it would call; to where it is cut short."""
    texts: list[str] = []
    calls: list[str] = []
    stream, old = io.BytesIO(data), False
    with suppress(ValueError):
        for number in range(_OLD_PROGRAMS):
            for step in programs.steps(stream):
                old |= number == 0 and step.number == _OLD_FORMAT
                if step.name is not None:
                    calls.append(step.name)
                if step.text is not None:
                    texts.append(step.text)
            if not old:
                break
    names = (text for text in texts if not re.fullmatch(r"storage|cpu|cuda(:\d+)?|\d*", text))
    return Inside(tuple(dict.fromkeys(names)), calls=tuple(dict.fromkeys(calls)))
