"""How large a residual's file is, by base model: `python -m benchmarks.residual_bytes`. Of random values, as they are
stored, with what a training says of itself."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.results import table, write
from profusion import __version__
from profusion.infusion import architecture_name, cross_attention_layers
from profusion.models.configs import SD15, SD21, SDXL
from profusion.models.unet import UNet
from profusion.residual import Origin, Residual, save_residual
from profusion.residual.origin import Sample
from profusion.residual.training import NOUN_PROMPTS
from profusion.toybox.configs import TOYBOX

ORIGIN = Origin(
    base="v1-5-pruned-emaonly-fp16.safetensors",
    base_hash="0123456789",
    sample=Sample("A" * 44),
    learning_rate=0.02,
    prompts=NOUN_PROMPTS,
    version=__version__,
    day="2026-11-27",
)
MODELS = {"Stable Diffusion 1.x": SD15, "Stable Diffusion 2.x": SD21, "SDXL": SDXL, "Toybox": TOYBOX}


def measure(folder: Path) -> dict[str, dict[str, int]]:
    """Layers, their width and the file's bytes of each model."""
    found = {}
    for name, config in MODELS.items():
        with torch.device("meta"):
            layers = cross_attention_layers(dict(UNet(config).named_parameters()))
        width, names = layers[0].context_dim, tuple(layer.name for layer in layers)
        delta = torch.randn(len(layers), 1, width, generator=torch.Generator().manual_seed(0))
        residual = Residual(delta, "cat", names, architecture_name(layers), 300, 7, origin=ORIGIN)
        found[name] = {
            "layers": len(layers),
            "width": width,
            "bytes": save_residual(residual, folder / "residual.safetensors").size,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="write the figures here, and a table beside them")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    rows = [
        (name, f"{one['layers']} of width {one['width']}", f"{one['bytes'] / 1000:.1f} KB")
        for name, one in found.items()
    ]
    write(given.json, {}, found, table(("model", "cross-attention layers", "residual file"), rows))


if __name__ == "__main__":
    main()
