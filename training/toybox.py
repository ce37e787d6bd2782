"""Train Toybox: `python -m training.toybox --work DIR`. Stop it at any moment and start it again; same seed, same
weights.

Stages: draw the world; the autoencoder; the judge; the decoder alone; the text tower alone; the UNet with the text
tower; the image tower; export. After each, and while the UNet learns, DIR/sheets has pictures to look at.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from profusion.models.unet import UNet
from profusion.models.vae import VAE
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import load_network, save_network

from .data import DataSet
from .judge import train_judge
from .recipe import Recipe, RecipeError
from .session import Session, Stopped
from .sheets import generated, write_sheet
from .text import check_vocabulary, train_text, vocabulary, whole
from .unet import train_unet
from .vae import encode_all, new_vae, train_decoder, train_vae
from .vision import train_vision, write_host_config


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


def train(session: Session, out: Path, given: Path | None = None) -> None:
    """All stages, each from where it stopped. Every network goes to `out` once it is finished, the UNet and its text
    tower to `out`/unfinished whenever they are looked at. Raises Stopped when the session is over.

    given: a folder with a finished autoencoder and its judge, which are then not trained.
    """
    session.recipe.keep(session.work)
    check_vocabulary()
    data = DataSet.draw(session)
    write_sheet(session, "1-drawn")
    vae = autoencoder(session, data, out, given)
    text = train_text(session, data)
    latents = encode_all(session, vae, data)

    def draw_with(unet: UNet) -> Callable:
        return lambda scenes: generated(unet, vae, whole(text), scenes, session.sheet_steps)

    def watch(step: int, unet: UNet) -> None:
        write_sheet(session, f"4-unet-{step:05}", vae, draw_with(unet))
        save_network("unet", unet, out / "unfinished")
        save_network("text", whole(text), out / "unfinished", vocabulary())

    unet = train_unet(session, data, latents, text, watch)
    write_sheet(session, "5-unet", vae, draw_with(unet))
    save_network("unet", unet, out)
    vision = train_vision(session, data, text)
    save_network("vision", vision, out)
    write_host_config(out)
    save_network("text", whole(text), out, vocabulary())
    session.say(
        "export", 1, None, f"  {sum(path.stat().st_size for path in out.glob('*.safetensors')):,} bytes in {out}"
    )


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("toybox-work"), help="folder for all that is made on the way")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the finished weights (default: WORK/weights)"
    )
    parser.add_argument("--vae", type=Path, default=None, help="folder with a finished autoencoder and judge to take")
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
            train(session, arguments.out or session.work / "weights", arguments.vae)
    except RecipeError as error:
        sys.exit(str(error))
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from there", flush=True)


if __name__ == "__main__":
    main()
