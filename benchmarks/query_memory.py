"""What F's queries take on the device while they wait for C, from the shapes alone: the UNet is evaluated without
memory.

python -m benchmarks.query_memory [--model sd15 sd2 sdxl] [--pixels 512 1024] [--rows 2]
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from unittest import mock

import torch

from benchmarks.training_memory import MODELS, PIXELS_A_CELL, TOKENS
from profusion import queries
from profusion.infusion import foundation_patches
from profusion.models.unet import UNet
from profusion.queries import WaitingQueries, bytes_on_device, query_numbers


@dataclass(frozen=True)
class Waiting:
    """Bytes a picture: all that F leaves, what of it stays on the device, and the most of one layer.

    reckoned: what the host is told.
    """

    left: int
    kept: int
    layer: int
    reckoned: float


def measure(model: str, cells: tuple[int, int], rows: int) -> Waiting:
    """Of a float16 model, for one picture under so many conditionings."""
    config, layers, spilled = MODELS[model], {}, []
    with torch.device("meta"), mock.patch.object(queries, "OWN_MEMORY", ("meta",)):
        unet = UNet(config).half()
        store = WaitingQueries(spill=lambda waiting: (spilled.append(waiting.nbytes), waiting)[1])
        options = {"patches": foundation_patches(store), "cond_or_uncond": list(range(rows))}
        added = torch.zeros(rows, config.adm_channels, dtype=torch.float16) if config.adm_channels else None
        x, context = torch.zeros(rows, 4, *cells), torch.zeros(rows, TOKENS, config.context_dim)
        unet(x.half(), torch.zeros(rows), context.half(), added, options)
    for (layer, _), waiting in store.items():
        layers[layer] = layers.get(layer, 0) + waiting.nbytes
    numbers = query_numbers(dict(unet.named_parameters()))
    reckoned = bytes_on_device(numbers, cells[0] * cells[1], rows, 2)
    return Waiting(store.on_device + sum(spilled), store.on_device, max(layers.values()), reckoned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["sd15", "sd2", "sdxl"])
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--rows", type=int, default=2, help="conditionings in a batch: 2 under guidance")
    arguments = parser.parse_args()
    print(
        "MB (1e6 bytes) a picture, float16. most: kept and one layer's, while C has it. told: what the host is told\n"
    )
    print("| model | pixels | F leaves | on the device | in main memory | most | told |")
    print("|---|---|---|---|---|---|---|")
    for model, pixels in itertools.product(arguments.model, arguments.pixels):
        cells = pixels // PIXELS_A_CELL
        found = measure(model, (cells, cells), arguments.rows)
        sizes = (found.left, found.kept, found.left - found.kept, found.kept + found.layer, found.reckoned)
        print(f"| {model} | {pixels} | " + " | ".join(f"{size / 1e6:.1f}" for size in sizes) + " |")


if __name__ == "__main__":
    main()
