"""`python -m profusion score`: the pictures of a folder against the references and their prompts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import Tensor

from ..metrics.chart import chart
from ..metrics.checks import MetricError
from ..metrics.concept import Pictures, concept_scores, prompt_lines
from ..metrics.encoders import ImageEncoder
from ..metrics.libraries import CLIP_MODELS, DINO, OPENAI, OpenClip, Timm
from ..metrics.scores import Scores
from ..models.chunks import weighted_parts
from ..pictures import picture_paths, read_each, read_picture
from ..references import check_not_inverted
from ..stamped import how_made
from .encoder import ToyboxEncoder


def add_to(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Declare the command."""
    one = commands.add_parser("score", help="measure pictures of a concept: CLIP-T, CLIP-I, DINO")
    one.add_argument("--images", type=Path, required=True, metavar="DIR", help="the generated pictures")
    one.add_argument(
        "--references", type=Path, required=True, metavar="DIR", help="the pictures that the concept was learned from"
    )
    for name, whose in (("masks", "generated pictures"), ("reference-masks", "references")):
        one.add_argument(
            f"--{name}",
            type=Path,
            metavar="DIR",
            help=(
                f"pictures that are white where the object is in the {whose}, in the order of their names; with both "
                "folders of masks, objects and backgrounds are compared apart"
            ),
        )
    prompt = one.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="what all pictures should show (default: what they say themselves, see draw)")
    prompt.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a line for each picture, in the order of their names"
    )
    one.add_argument(
        "--clip",
        action="append",
        metavar="CLIP",
        help=(
            "toybox (default; for Toybox's own pictures), or open_clip:NAME[:WEIGHTS]; may be given several times. "
            f"NAME: {', '.join(CLIP_MODELS)}, or one of open_clip's own; WEIGHTS: {OPENAI}, a tag of open_clip's or a "
            "file"
        ),
    )
    one.add_argument(
        "--dino", nargs="?", const=DINO, metavar="NAME", help="a model of timm as a further judge (default: %(const)s)"
    )
    one.add_argument("--json", type=Path, metavar="FILE", help="write the scores there too")
    one.add_argument("--chart", type=Path, metavar="FILE", help="write a picture of them there")
    return one


def run(options: argparse.Namespace) -> Scores:
    """Measure, and write what was asked for. Raises MetricError, PictureError and OSError."""
    paths = picture_paths(options.images)
    generated, references = (
        _pictures(paths, options.masks),
        _pictures(picture_paths(options.references), options.reference_masks),
    )
    if options.prompt is not None:
        prompts = [options.prompt]
    elif options.prompts is not None:
        prompts = prompt_lines(options.prompts.read_text(encoding="utf-8"), len(paths))
    else:
        prompts = [_prompt_in(path) for path in paths]
    encoders = [_pair(name) for name in options.clip or ["toybox"]]
    if options.dino is not None:
        encoders.append(Timm(options.dino))
    scores = concept_scores(generated, references, prompts, encoders)
    if options.json is not None:
        asked = {"images": [path.name for path in paths], "prompts": prompts}
        options.json.write_text(json.dumps({**asked, **scores.as_json()}, indent=2) + "\n")
    if options.chart is not None:
        chart(scores).save(options.chart)
    return scores


def _prompt_in(path: Path) -> str:
    """The prompt that a picture was drawn from, without its weights. Raises MetricError where the file has none."""
    prompt = (how_made(path) or {}).get("prompt")
    if not isinstance(prompt, str):
        raise MetricError(
            f"{path} does not say what it was drawn from, as pictures of `python -m profusion draw` do: give --prompt "
            "or --prompts"
        )
    return "".join(part for part, _ in weighted_parts(prompt))


def _pictures(paths: list[Path], masks: Path | None) -> Pictures:
    """Each of its own size; what is transparent is grey."""
    images = [picture for picture, _ in read_each(paths)]
    return Pictures(images, None if masks is None else [_mask(path) for path in picture_paths(masks)])


def _mask(path: Path) -> Tensor:
    """(H, W) of a picture that is white where the object is."""
    mask = read_picture(path)[0].mean(dim=-1)
    fix = "Invert it. If the object does reach all edges, paint a corner black"
    check_not_inverted(mask, f"{path} is white all around and black inside", fix)
    return mask


def _pair(name: str) -> ImageEncoder:
    library, _, model = name.partition(":")
    if name == "toybox":
        return ToyboxEncoder()
    if library != "open_clip" or not model:
        raise MetricError(
            f"--clip {name}: give toybox, or open_clip:NAME with a name such as {next(iter(CLIP_MODELS))}"
        )
    model, _, weights = model.partition(":")
    return OpenClip(model, weights or OPENAI)
