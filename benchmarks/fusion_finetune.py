"""What fine-tuning to one picture adds: `python -m benchmarks.fusion_finetune --json FILE`, on Toybox.

Each unseen picture has a PromptNet of its own, of 50 steps (ProFusion, arXiv 2305.13579, section 3.1), together with
the UNet's attention layers. Its drawings are judged as `benchmarks.fusion_judging` says, in the ablation's variants:
after fine-tuning on the picture alone; on the picture and three variants of it, its object on other backgrounds, drawn
by inpainting as Concept Augment does; and, of PromptNet alone on the first `--regularised` pictures, with a penalty of
so much strength on how far S* leaves the noun's own word, which the paper does without.

Every picture's figures are kept beside --json, and a run that was stopped goes on after the last.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fusion_ablation import SHIPPED, Variant, drawn_by, variants
from benchmarks.fusion_judging import FUSION_PROMPTS, References, Scores, references, scores
from benchmarks.jobs import Job, Runner, file_name
from benchmarks.results import percent, plus_minus, table, write
from profusion.augment import composite, redrawn_cells, soft_edge, variant_prompts
from profusion.diffusion import sample_euler, sampling_sigmas
from profusion.fusion import FusionOptions
from profusion.metrics.cost import stored_bytes
from profusion.pretraining.promptnet import starting_word
from profusion.promptnet.changes import changed, patch_tensors
from profusion.promptnet.file import load_promptnet
from profusion.promptnet.finetune import FinetuneOptions, FinetunePictures, FinetuneTraining, trainable_copy
from profusion.toybox.fused import FusedToybox
from profusion.toybox.judge import Judge
from profusion.toybox.picture_sets import digest, encoded_pictures
from profusion.toybox.pipeline import Toybox, initial_noise, seeded
from profusion.toybox.promptnet import toybox_finetuning
from profusion.toybox.world import BACKGROUND_PHRASES

PLACES = ("grass", "sea", "sand")  # of the variants; none of those that the judged prompts name
PENALTIES = (1.0, 10.0, 100.0)
EDGE = 4  # pixels over which a variant's object fades into its background, as Concept Augment has it


@dataclass(frozen=True)
class Setting:
    """One way to fine-tune. augmented: on variants too. attention: whether the UNet's layers
    learn. penalty: see `penalise`."""

    name: str
    augmented: bool = False
    attention: bool = True
    penalty: float = 0.0
    trained: bool = True


NONE = Setting("not fine-tuned", trained=False)
SETTINGS = (NONE, Setting("the picture alone"), Setting("with augmentation", augmented=True))
REGULARISED = tuple(
    Setting(f"PromptNet alone, penalty {penalty:g}", attention=False, penalty=penalty) for penalty in (0.0, *PENALTIES)
)


@dataclass(frozen=True)
class Recipe:
    """What all settings have in common; see the command line."""

    promptnet: Path
    count: int
    training_steps: int
    learning_rate: float
    attention_learning_rate: float
    steps: int
    cfg: float
    text_weight: float
    seed: int

    def options(self, index: int) -> FinetuneOptions:
        """Of a picture's training."""
        rates = {"learning_rate": self.learning_rate, "attention_learning_rate": self.attention_learning_rate}
        return FinetuneOptions(steps=self.training_steps, seed=index, **rates)


@torch.no_grad()
def augmented(toybox: Toybox, picture: Tensor, mask: Tensor, noun: str, seed: int, steps: int, cfg: float) -> Tensor:
    """The picture (SIZE, SIZE, 3) and, for each of PLACES, one in which what is around its object is
    drawn anew: (4, SIZE, SIZE, 3)."""
    texts = variant_prompts("\n".join(f"a photo of a %noun% {BACKGROUND_PHRASES[place]}" for place in PLACES), noun)
    latent = toybox.vae.latents(picture[None])
    redrawn = redrawn_cells(mask, tuple(latent.shape[-2:]))
    noise = initial_noise(seeded(*(seed + index for index in range(len(texts)))))
    evaluate = toybox.evaluator(toybox.context(texts), cfg)

    def inpaint(x: Tensor, sigma: Tensor) -> Tensor:
        given = latent + sigma.view(-1, 1, 1, 1) * noise
        return torch.where(redrawn > 0, evaluate(torch.where(redrawn > 0, x, given), sigma, {}), latent)

    drawn = toybox.vae.pictures(sample_euler(inpaint, noise, sampling_sigmas(steps)))
    edge = soft_edge(mask, EDGE)
    return torch.stack([picture, *(composite(one, picture, edge) for one in drawn)])


def penalise(training: FinetuneTraining, noun: Tensor, penalty: float) -> None:
    """Add penalty * the mean square of S* - noun to a fine-tuning's loss: how far S* may leave the noun's embedding."""
    encode, error, words = training._encode_word, training._error, []

    def remember(prompt: int, word: Tensor) -> Tensor:
        words[:] = [word]
        return encode(prompt, word)

    def penalised(*given) -> Tensor:
        return error(*given) + penalty * (words[0] - noun).square().mean()

    training._encode_word, training._error = remember, penalised


def finetuned(
    fused: FusedToybox,
    known: References,
    index: int,
    setting: Setting,
    options: FinetuneOptions,
    sampling: tuple[int, float],
) -> tuple[FusedToybox, AbstractContextManager, dict[str, int]]:
    """A picture's own PromptNet; what its drawings are to be made within; and the bytes of that."""
    if not setting.trained:
        return fused, nullcontext(), {}
    toybox, noun = fused.toybox, known.nouns[index]
    pictures = known.pictures[index : index + 1]
    if setting.augmented:
        pictures = augmented(toybox, pictures[0], known.masks[index], noun, 5000 + 10 * index, *sampling)
    given = encoded_pictures(toybox, pictures)
    network = trainable_copy(fused.promptnet)
    training = toybox_finetuning(
        toybox, network, FinetunePictures(given.latents, given.image_tokens), options, setting.attention
    )
    if setting.penalty:
        penalise(training, starting_word(toybox, network.config, noun), setting.penalty)
    with changed(toybox.unet, training.changes):
        for _ in training.steps():
            pass
    size = stored_bytes(patch_tensors(training.changes).values())
    own = FusedToybox(toybox, network.requires_grad_(False))
    return own, changed(toybox.unet, training.changes), {"patch_bytes": size}


@lru_cache(maxsize=1)
def _studio(promptnet: Path, count: int, seed: int) -> tuple[FusedToybox, Judge, References]:
    return FusedToybox(Toybox.load(), load_promptnet(promptnet)), Judge.load(), references(count, seed)


def one_picture(recipe: Recipe, setting: Setting, index: int, ways: Sequence[Variant]) -> dict:
    """Fine-tune to a picture and draw it: its scores under every prompt by variant, and what the training cost."""
    fused, judge, known = _studio(recipe.promptnet, recipe.count, recipe.seed)
    own, within, cost = finetuned(fused, known, index, setting, recipe.options(index), (recipe.steps, recipe.cfg))
    with within:
        found = {
            way.name: vars(
                scores(drawn_by(own, way, recipe.steps), judge, known.only(index), FUSION_PROMPTS, 1, first_seed=index)
            )
            for way in ways
        }
    return {"setting": setting.name, "scores": found, **cost}


def part(figures: dict[str, dict[str, dict]], names: Sequence[str]) -> str:
    """The table of some settings: a row for each, and for each variant."""
    rows = [
        (setting, way, plus_minus(one["concept"]), percent(one["noun"]), percent(one["text"]))
        for setting in names
        for way, one in figures[setting].items()
    ]
    return table(
        ("fine-tuned on", "sampling", "likeness to the picture", "right noun", "rest of the prompt followed"), rows
    )


def gathered(rows: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """The figures of all pictures together: by setting, by variant."""
    found: dict[str, dict[str, dict]] = {}
    for setting in dict.fromkeys(row["setting"] for row in rows):
        some = [row["scores"] for row in rows if row["setting"] == setting]
        found[setting] = {
            way: Scores(
                *([value for one in some for value in one[way][key]] for key in ("concept", "noun", "text"))
            ).as_json()
            for way in some[0]
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--promptnet", type=Path, default=SHIPPED, help="the PromptNet's file")
    parser.add_argument("--count", type=int, default=32, help="unseen pictures")
    parser.add_argument("--regularised", type=int, default=4, help="of these, with a penalty")
    parser.add_argument("--training-steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--attention-learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=20, help="of sampling")
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--text-weight", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here, and a table beside them")
    given = vars(parser.parse_args())
    out, workers, regularised = given.pop("json"), given.pop("workers"), given.pop("regularised")
    recipe = Recipe(**given)
    ways = variants(recipe.cfg, recipe.text_weight, FusionOptions())
    work = [(setting, index, ways) for setting in SETTINGS for index in range(recipe.count)]
    work += [(setting, index, ways[:2]) for setting in REGULARISED for index in range(min(regularised, recipe.count))]
    folder = out.with_suffix(".work")
    said = {**given, "promptnet": digest(recipe.promptnet)}  # wherever it lies
    rows = Runner(said, workers).run(
        [
            Job(
                folder / file_name(setting.name, str(index)),
                partial(one_picture, recipe, setting, index, some),
                f"{setting.name}: {index + 1}",
            )
            for setting, index, some in work
        ]
    )
    figures = gathered(rows)
    size = max(row.get("patch_bytes", 0) for row in rows)
    first = f"{recipe.count} unseen pictures x {len(FUSION_PROMPTS)} prompts; {recipe.training_steps} steps each."
    second = f"The first {regularised} of them, with a penalty on how far S* leaves the noun:"
    tables = [part(figures, [setting.name for setting in some]) for some in (SETTINGS, REGULARISED)]
    last = f"The changes of the attention layers take {size:,} bytes."
    write(out, {**said, "patch_bytes": size}, figures, "\n\n".join((first, tables[0], second, tables[1], last)))


if __name__ == "__main__":
    main()
