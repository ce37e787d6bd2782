"""Train Toybox: `python -m training.toybox --work DIR`. Stop it at any moment and start it again; same seed, same
weights.

Stages: draw the world; the autoencoder; the judge; the decoder alone; the text tower; the UNet and the image tower; the
joint-attention transformer. After each, and while they learn to draw, DIR/sheets has pictures to look at.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from profusion.models.vae import VAE
from profusion.toybox.joint import JointToybox
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import Toybox, load_network, save_network

from .data import DataSet
from .judge import train_judge
from .mmdit import train_mmdit
from .recipe import Recipe, RecipeError
from .session import Session, Stopped
from .sheets import generated, write_sheet
from .text import check_vocabulary, train_text, vocabulary, whole
from .unet import train_unet
from .vae import encode_all, new_vae, train_decoder, train_vae
from .vision import train_vision, write_host_config

NETWORKS = ("unet", "mmdit")


def autoencoder(session: Session, data: DataSet, out: Path, given: Path | None) -> VAE:
    """The autoencoder and the judge, trained or taken from the folder `given`, and written to `out`."""
    if given:
        vae = new_vae(session).eval()
        vae.load_state_dict(load_network("vae", given))
        save_network("judge", Judge.load(given).network, out)
    else:
        vae = train_vae(session, data)
        write_sheet(session, "2-vae", vae)
        save_network("judge", train_judge(session), out)
        vae = train_decoder(session, data, vae)
    write_sheet(session, "3-decoder", vae)
    save_network("vae", vae, out)
    return vae


def train(session: Session, out: Path, given: Path | None = None, networks: Sequence[str] = NETWORKS) -> None:
    """All stages, each from where it stopped. Every network goes to `out` once it is finished, and to `out`/unfinished
    whenever it is looked at. Raises Stopped when the session is over.

    given: a folder with a finished autoencoder and its judge, which are then not trained. networks: those of NETWORKS
    to train; as they do not need each other, two runs can share a folder and its earlier stages.
    """
    session.recipe.keep(session.work)
    check_vocabulary()
    data = DataSet.draw(session)
    write_sheet(session, "1-drawn")
    vae = autoencoder(session, data, out, given)
    text = train_text(session, data)
    latents = encode_all(session, vae, data)
    if "unet" in networks:
        watched = _watched(session, "unet", "4-unet", vae, out, lambda unet: Toybox(unet, vae, whole(text), None))
        watched(None, train_unet(session, data, latents, text, watched))
        vision = train_vision(session, data, text)
        save_network("vision", vision, out)
        write_host_config(out)
        save_network("text", whole(text), out, vocabulary())
    if "mmdit" in networks:
        watched = _watched(
            session, "mmdit", "5-mmdit", vae, out, lambda network: JointToybox(network, vae, whole(text))
        )
        watched(None, train_mmdit(session, data, latents, text, watched))
    session.say(
        "export", 1, None, f"  {sum(path.stat().st_size for path in out.glob('*.safetensors')):,} bytes in {out}"
    )


def _watched(session: Session, name: str, sheet: str, vae: VAE, out: Path, model: Callable) -> Callable:
    """What to do with a network at a step, or (None) at its end: a sheet of what it draws, and its file."""

    def watch(step: int | None, network: nn.Module) -> None:
        drawing = network.training
        network.eval()
        shown = f"{sheet}-{'finished' if step is None else f'{step:05}'}"
        write_sheet(session, shown, vae, lambda scenes: generated(model(network), scenes, session.sheet_steps))
        save_network(name, network, out if step is None else out / "unfinished")
        network.train(drawing)

    return watch


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("toybox-work"), help="folder for all that is made on the way")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the finished weights (default: WORK/weights)"
    )
    parser.add_argument("--vae", type=Path, default=None, help="folder with a finished autoencoder and judge to take")
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="which of them to train (default: all)"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, mps, ...")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so many; start again to go on")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU (default: torch's choice)")
    for option in fields(Recipe):
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=int, default=option.default)
    return parser.parse_args(given)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    return Recipe(**{option.name: getattr(arguments, option.name) for option in fields(Recipe)})


def ready(device: torch.device) -> None:
    """Ask a device for results that repeat; SystemExit if there is no such device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {device} cannot be used here: {str(error).splitlines()[0]}")
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS repeats no run exactly
        torch.use_deterministic_algorithms(True, warn_only=True)


def main(given: list[str] | None = None) -> None:
    arguments = parse_arguments(given)
    ready(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        session = Session(arguments.work, recipe_of(arguments), arguments.device, arguments.minutes)
        with session.signals():
            train(session, arguments.out or session.work / "weights", arguments.vae, arguments.networks)
    except RecipeError as error:
        sys.exit(str(error))
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from there", flush=True)


if __name__ == "__main__":
    main()
