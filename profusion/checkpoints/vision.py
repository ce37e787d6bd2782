"""CLIP's image tower from files: a tower alone or a whole CLIP, in transformers' names or open_clip's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import kinds
from ..models.configs import VisionConfig
from . import openclip
from .contents import CheckpointError, Contents, Shapes, read_contents, refusal
from .filling import Part, fill
from .openclip import Source, Sources
from .sizes import count

if TYPE_CHECKING:
    from ..models.clip import VisionModel

# By their layers, as the host tells them: ViT-L/14 is OpenAI's, ViT-H/14 and ViT-bigG/14 are LAION's.
_ACTIVATIONS = {24: "quick_gelu", 32: "gelu", 48: "gelu"}
_HEADS = 16
# The rest of a whole CLIP, in either layout, and of LLaVA's files.
_IGNORED = re.compile(
    r"text_model\..*|text_projection(\.weight)?|logit_scale|logit_bias|(.*\.)?position_ids|multi_modal_projector\..*"
    r"|(text\.)?(transformer\.resblocks\..*|token_embedding\.weight|positional_embedding|ln_final\..*|attn_mask)"
)
_FIRST = "vision_model.encoder.layers.0.self_attn.q_proj.weight"


def vision_plan(path: str | Path) -> tuple[Contents, VisionConfig, Sources]:
    """Read a file's header: what image tower it has, and where each of its tensors is.

    Raises CheckpointError, which says what the file is instead.
    """
    contents = read_contents(path)
    sources = _sources(contents)
    shapes = {name: source.shape(contents.shapes[source.name]) for name, source in sources.items()}
    if _FIRST not in shapes or "vision_model.pre_layrnorm.weight" not in shapes:
        raise _of_another_kind(contents, shapes)
    try:
        config = _config(shapes)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as problem:
        raise refusal(contents.path, f"it is an image encoder of sizes unknown here ({problem})") from problem
    if config is None:
        layers = count(shapes, "vision_model.encoder.layers.")
        raise refusal(
            contents.path,
            f"it is an image encoder of {layers} layers: it has to be CLIP's ViT-L/14 (24 layers) or ViT-H/14 (32)",
        )
    return contents, config, sources


def load_image_tower(path: str | Path, dtype: torch.dtype = torch.float32) -> VisionModel:
    """CLIP's image tower of a file, frozen, with weights of this type. Raises CheckpointError."""
    from ..models.clip import VisionModel  # with transformers, which the pack does not wait for

    contents, config, sources = vision_plan(path)
    (tower,) = fill(contents, [Part(VisionModel, config, sources, "image encoder", dtype)])
    return tower


def _sources(contents: Contents) -> Sources:
    """Where the tensors of an image tower are, in either layout. Raises CheckpointError for tensors of neither."""
    open_clip = contents.under("visual.")
    if open_clip:
        found = openclip.vision_sources(open_clip)
        found = {name: Source(f"visual.{x.name}", x.third, x.turned) for name, x in found.items()}
    else:
        own = (name for name in contents.shapes if name.startswith(("vision_model.", "visual_projection.")))
        found = openclip.named_alike(name for name in own if not _IGNORED.fullmatch(name))
    used = {source.name for source in found.values()}
    unknown = [name for name in contents.shapes if name not in used and not _IGNORED.fullmatch(name)]
    if found and unknown:
        raise refusal(
            contents.path, f"it is an image encoder with {len(unknown)} tensors more, such as '{unknown[0]:.80}'"
        )
    return found


def _config(shapes: Shapes) -> VisionConfig | None:
    layers = count(shapes, "vision_model.encoder.layers.")
    if layers not in _ACTIVATIONS:
        return None
    width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    cells = shapes["vision_model.embeddings.position_embedding.weight"][0] - 1
    side = round(cells**0.5)
    if side**2 != cells or width % _HEADS:
        raise ValueError(f"{cells} cells of width {width}")
    return VisionConfig(
        width,
        layers,
        _HEADS,
        shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        side * patch,
        patch,
        shapes["visual_projection.weight"][0] if "visual_projection.weight" in shapes else None,
        _ACTIVATIONS[layers],
    )


def _of_another_kind(contents: Contents, shapes: Shapes) -> CheckpointError:
    if any(name.startswith("vision_model.") for name in shapes):
        return refusal(contents.path, "it is an image encoder, but none of CLIP's: SigLIP's and others do not fit")
    names = ", ".join(f"'{name:.60}'" for name in list(contents.shapes)[:2]) or "nothing"
    reason = kinds.another_kind(contents.path, kinds.VISION_ENCODER)
    return refusal(contents.path, (reason or f"it is no image encoder of CLIP's: it holds {names}").rstrip("."))
