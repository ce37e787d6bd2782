"""Make the workflows' thumbnails and README's two pictures: `COMFYUI_PATH=... python -m tools.thumbnails
[NAME ...]`.

A thumbnail shows what its workflow draws: it is run in a host, as a user would run it. NAME is a workflow's, or
`readme`; default: all of them, a quarter of an hour on a CPU.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from profusion import demo
from profusion.pictures import INK, PAPER, from_image, grid, to_image
from profusion.toybox import world
from profusion.toybox.concepts import DEMO_PROMPTS, drawn_concept
from profusion.toybox.fused import FRESH_NOISE, FUSED_SHARE, GUIDED, FusedToybox, first_levels
from profusion.toybox.pipeline import STEPS, Toybox, seeded
from tests.host.live import Server, to_prompt
from tools.hosts import needed_host

ROOT = Path(__file__).parents[1]
SIDE, GAP = 160, 8


@dataclass(frozen=True)
class Thumbnail:
    """workflow: the file that is run, whose saved picture number `pick` is shown, with this label below."""

    workflow: str
    label: str
    pick: int = 0


THUMBNAILS = {
    "infusion_train_and_generate": Thumbnail("infusion_train_and_generate", "learn it, draw it anywhere"),
    "infusion_transformer": Thumbnail("infusion_transformer", "the same on a transformer"),
    "infusion_two_concepts": Thumbnail("infusion_two_concepts", "two concepts, one prompt"),
    "infusion_sd15": Thumbnail("infusion_train_and_generate", "for SD 1.5; the picture is Toybox's"),
    "infusion_flux": Thumbnail("infusion_transformer", "for Flux.1; the picture is Toybox's"),
    "infusion_z_image": Thumbnail("infusion_transformer", "for Z-Image; the picture is Toybox's"),
    "profusion_one_image": Thumbnail("profusion_one_image", "one picture, no training"),
    "profusion_finetune": Thumbnail("profusion_finetune", "one picture, 50 steps"),
    "profusion_pretrain": Thumbnail("profusion_pretrain", "a PromptNet of your own"),
    "profusion_two_references": Thumbnail("profusion_two_references", "two things, a picture each"),
    "profusion_with_infusion": Thumbnail("profusion_with_infusion", "both methods, one prompt"),
    "overfitting": Thumbnail("overfitting", "does it overfit? measure it"),
}
README = "readme"
PLACES = ("a photo of a {} on grass", "a photo of a {} on snow", "a photo of a {} by a brick wall")


def board(left: Sequence[Tensor], right: Tensor, label: str) -> Image.Image:
    """The pictures to learn from on the left, one large or up to four small, an arrow, and
    what is drawn on the right."""
    half = (SIDE - GAP) // 2
    width = 2 * SIDE + 3 * GAP + 96
    image = Image.new("RGB", (width, SIDE + 2 * GAP + 26), PAPER)
    draw = ImageDraw.Draw(image)
    side = SIDE if len(left) == 1 else half
    for index, picture in enumerate(left[:4]):
        at = GAP + index % 2 * (half + GAP), GAP + index // 2 * (half + GAP)
        image.paste(to_image(picture).resize((side, side), Image.Resampling.LANCZOS), at)
    y, x = GAP + SIDE // 2, SIDE + 2 * GAP + 14
    draw.line([(x, y), (x + 50, y)], INK, 5)
    draw.polygon([(x + 50, y - 12), (x + 68, y), (x + 50, y + 12)], INK)
    image.paste(ImageOps.pad(to_image(right), (SIDE, SIDE), Image.Resampling.LANCZOS, PAPER), (width - SIDE - GAP, GAP))
    draw.text((width / 2, SIDE + GAP + 16), label, INK, ImageFont.load_default(17), anchor="mm")
    return image


def shown(workflow: dict) -> list[Tensor]:
    """The pictures that a workflow's Toybox Loaders give: of several toys, two each."""
    loaders = [node["widgets_values"] for node in workflow["nodes"] if node["type"] == "ProFusion_ToyboxLoader"]
    each = 4 if len(loaders) == 1 else 2
    return [picture for toy, count, seed, *_ in loaders for picture in drawn_concept(toy, count, seed).pictures[:each]]


def saved(server: Server, workflow: dict) -> list[Tensor]:
    """Run a workflow: the pictures that it saves."""
    outputs = server.run(to_prompt(workflow, server.get("/object_info")), seconds=7200)["outputs"]
    results = [str(node["id"]) for node in workflow["nodes"] if node["type"] == "SaveImage"]
    files = [item for node in results for item in outputs[node]["images"]]
    query = "/view?filename={filename}&subfolder={subfolder}&type={type}"
    return [from_image(Image.open(io.BytesIO(server.fetch(query.format(**item))))) for item in files]


def make_thumbnails(names: Sequence[str]) -> None:
    host = needed_host()
    drawn: dict[str, list[Tensor]] = {}
    with tempfile.TemporaryDirectory() as base:
        server = Server(host, Path(base))
        try:
            server.wait(600)
            for name in names:
                thumbnail = THUMBNAILS[name]
                workflow = json.loads((ROOT / "workflows" / f"{thumbnail.workflow}.json").read_text())
                if thumbnail.workflow not in drawn:
                    drawn[thumbnail.workflow] = saved(server, workflow)
                path = ROOT / "workflows" / f"{name}.jpg"
                board(shown(workflow), drawn[thumbnail.workflow][thumbnail.pick], thumbnail.label).save(
                    path, quality=90
                )
                print(path)
        finally:
            server.stop()


def make_infusion_picture() -> None:
    """What the demo learns and draws of Infusion: the demo's own toy, settings, prompts and first seeds."""
    toybox, toy = Toybox.load(), drawn_concept()
    residual = demo.train(toybox, toy, demo.OPTIONS, print).residual
    rows = [("pictures to learn from", [*toy.pictures])]
    for seed in demo.SEEDS[:2]:
        drawn = [demo.infused(toybox, residual, prompt, [seed], demo.SAMPLING_STEPS) for prompt in DEMO_PROMPTS]
        for name, latents in zip(("plain", "Infusion, same seed"), zip(*drawn, strict=True), strict=True):
            rows.append((name, [toybox.vae.pictures(latent)[0] for latent in latents]))
    path = ROOT / "docs" / "grid.jpg"
    image = grid(rows, [prompt.format(toy.noun) for prompt in DEMO_PROMPTS])
    image.thumbnail((1340, 1340), Image.Resampling.LANCZOS)
    image.save(path, quality=90)
    print(path)


def make_profusion_picture() -> None:
    """Every toy that Toybox has never seen, from one picture each, as the demo draws it: none is picked out."""
    fused = FusedToybox.load()
    toys = [drawn_concept(name, 1) for name in world.CONCEPTS]
    rows = [("the one picture", [toy.pictures[0] for toy in toys])]
    for place in PLACES:
        latents = [
            fused.generate(
                place.format("S*"),
                [toy.noun],
                [toy.pictures],
                seeded(1),
                GUIDED,
                first_levels(FUSED_SHARE, STEPS),
                fresh=seeded(FRESH_NOISE)[0],
            )
            for toy in toys
        ]
        rows.append((place.format("S*"), [fused.toybox.vae.pictures(latent)[0] for latent in latents]))
    path = ROOT / "docs" / "profusion.jpg"
    grid(rows, [toy.name for toy in toys], scale=1).save(path, quality=90)
    print(path)


def main() -> None:
    names = sys.argv[1:] or [*THUMBNAILS, README]
    unknown = set(names) - {*THUMBNAILS, README}
    if unknown:
        sys.exit(f"no {', '.join(sorted(unknown))}: choose from {', '.join([*THUMBNAILS, README])}")
    workflows = [name for name in names if name != README]
    if workflows:
        make_thumbnails(workflows)
    if README in names:
        make_infusion_picture()
        make_profusion_picture()


if __name__ == "__main__":
    main()
