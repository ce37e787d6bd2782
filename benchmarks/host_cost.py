"""What the nodes cost inside ComfyUI: `COMFYUI_PATH=... python -m benchmarks.host_cost`, against its plain KSampler.

Everything runs on Toybox in the host's own classes, in one process, interleaved; medians and their
ratios. S* is made once for a picture and a prompt, whatever is then drawn with it: its ratio is its share
of one plain run of so many steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.results import table, write
from benchmarks.timing import CLOCKS, against, interleaved
from profusion.references import gather
from profusion.toybox.drawing import SIZE
from profusion.toybox.pipeline import CELLS, Toybox
from profusion.toybox.promptnet import new_promptnet
from tools.hosts import needed_host

ROOT = Path(__file__).resolve().parents[1]
FINETUNE, FINETUNES = "PromptNet Finetune, 50 steps of batch 4, once for a picture", 3
PICTURE = torch.rand(1, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(0))
PROMPT, NOUNS = "a photo of a ball and a star and a cup and a cat on grass", ("ball", "star", "cup", "cat")


def load_pack(host: Path):
    """The pack, as the host loads it, once."""
    if "profusion_pack" in sys.modules:
        return sys.modules["profusion_pack"]
    sys.path.insert(0, str(host))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    spec = importlib.util.spec_from_file_location(
        "profusion_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["profusion_pack"] = module
    spec.loader.exec_module(module)
    return module


class Studio:
    """Toybox in the host and the runs that are timed."""

    def __init__(self, pack, steps: int, batch: int):
        import comfy.sample
        import comfy.utils

        comfy.utils.PROGRESS_BAR_ENABLED = False
        self._sample, self.steps = comfy.sample, steps
        self.nodes = pack.nodes
        self.model, self.clip = pack.nodes.host.toybox.load_model(), pack.nodes.host.toybox.load_clip()
        self.positive, self.negative = self.encode(PROMPT), self.encode("")
        self.latent = torch.zeros(batch, 4, CELLS, CELLS)
        layers = pack.nodes.host.families.model_layers(self.model)
        names = tuple(layer.name for layer in layers)
        generator = torch.Generator().manual_seed(0)
        residual = pack.profusion.residual.Residual
        self.residuals = [
            residual(torch.randn(len(layers), 1, 128, generator=generator), noun, names, "Toybox") for noun in NOUNS
        ]

    @cached_property
    def promptnet(self):
        """What it has learnt costs no time."""
        network = new_promptnet(Toybox.load()).eval().requires_grad_(False)
        return self.nodes.host.words.handed_to_the_host(network, "untrained")

    def encode(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def ksampler(self, model, positive) -> None:
        noise = self._sample.prepare_noise(self.latent, 1)
        self._sample.sample(
            model,
            noise,
            self.steps,
            4.0,
            "euler",
            "simple",
            positive,
            self.negative,
            self.latent,
            disable_pbar=True,
            seed=1,
        )

    def infusion(self, count: int, **changes: object) -> Callable[[], None]:
        """A picture with so many concepts, drawn anew: the plain run that was kept of the one before is forgotten."""
        draw = self.next_infusion(count, **changes)

        def anew() -> None:
            self.nodes.host.streams.FOUNDATIONS.forget(self.model.model)
            draw()

        return anew

    def next_infusion(self, count: int, **changes: object) -> Callable[[], None]:
        """The same, as the next picture of the same prompt and seed. changes: of the node's inputs, as they come."""
        node = self.nodes.infusion.InfusionAttentionPatch
        more = {f"residual_{index}": residual for index, residual in enumerate(self.residuals[1:count], start=2)}
        given = {"model": self.model, "clip": self.clip, "text": PROMPT, "residual": self.residuals[0], **more}
        model, positive = node.execute(**{**defaults(node), **given, **changes}).args
        return lambda: self.ksampler(model, positive)

    def word(self) -> Callable[[], list]:
        """S* of a picture in a prompt, as a CONDITIONING: PromptNet and text encoder."""
        glue, models = self.nodes.host.words, self.nodes.host.toybox
        reference = glue.encode_pictures(
            self.promptnet.config, models.load_vae(), models.load_clip_vision(), gather(PICTURE)
        )
        return lambda: glue.WordInPrompt(self.promptnet, self.clip, reference, "a photo of S* on grass").conditioning()

    def finetune(self) -> None:
        """What PromptNet Finetune does with one picture, as its inputs come."""
        models, options = self.nodes.host.toybox, self.nodes.host.finetuning.FinetuneOptions(learning_rate=2e-5)
        vision, vae = models.load_clip_vision(), models.load_vae()
        with torch.inference_mode():
            finetuning = self.nodes.host.finetuning.Finetuning(
                self.promptnet, self.model, self.clip, vision, vae, gather(PICTURE), False, True, options
            )
            finetuning.run(lambda: None)

    def fusion(self, positive: list, text: bool, **changes) -> Callable[[], None]:
        """Fusion KSampler with the defaults of its own inputs, except for these."""
        node = self.nodes.fusion.FusionKSampler
        inputs = defaults(node) | {
            "steps": self.steps,
            "cfg": 4.0,
            "positive": positive,
            "negative": self.negative,
            "model": self.model,
        }
        inputs |= {"text": self.encode("a photo of a ball on grass")} if text else {}
        return lambda: node.execute(**{**inputs, "latent_image": {"samples": self.latent}, **changes})


def defaults(node: type) -> dict[str, object]:
    """The inputs of a new node that have a value of their own."""
    return {
        entry.id: entry.default for entry in node.GET_SCHEMA().inputs if getattr(entry, "default", None) is not None
    }


def measure(studio: Studio, rounds: int, only: str = "", clock: str = "wall") -> dict[str, dict[str, float]]:
    """Medians of seconds a picture, and ratios to the plain KSampler of the same round; `only` those named so."""
    word = studio.word()
    with torch.inference_mode():
        positive = word()
    tasks: dict[str, Callable[[], object]] = {
        "plain KSampler": lambda: studio.ksampler(studio.model, studio.positive),
        "Infusion as it comes, 1 concept": studio.infusion(1),
        "the next picture of its prompt and seed": studio.next_infusion(1, strength=0.9),
        "Infusion as it comes, 4 concepts": studio.infusion(4),
        "Infusion, held, 1 concept": studio.infusion(1, background="held"),
        "Infusion, held and each apart, 2 concepts": studio.infusion(2, background="held", concepts="each apart"),
        "Infusion, the paper's scheme, 1 concept": studio.infusion(1, every=1),
        "Infusion, the paper's scheme, shared latent": studio.infusion(1, every=1, stream="shared latent"),
        "S*: PromptNet and text encoder, for any runs": word,
        "Fusion KSampler, no fusion stage, 1 term": studio.fusion(positive, False, fusion_steps=0),
        "Fusion KSampler, no fusion stage, 2 terms": studio.fusion(positive, True, fusion_steps=0),
        "Fusion KSampler, full, 2 terms": studio.fusion(positive, True, fusion_end=1.0),
        "Fusion KSampler, first 40 %, 1 term": studio.fusion(positive, False, fusion_end=0.4),
        "Fusion KSampler as it comes": studio.fusion(positive, True),
    }
    plain = "plain KSampler"
    tasks = {name: task for name, task in tasks.items() if name == plain or only in name}
    with torch.inference_mode():
        times = interleaved(tasks, rounds, clock)
    if only not in FINETUNE:
        return against(times, plain, len(studio.latent))
    beside = interleaved({plain: torch.inference_mode()(tasks[plain]), FINETUNE: studio.finetune}, FINETUNES, clock)
    found = against(times, plain, len(studio.latent))
    return found | {FINETUNE: against(beside, plain, len(studio.latent))[FINETUNE]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--only", default="", metavar="TEXT", help="time what has this in its name alone")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, beside others")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    given = parser.parse_args()
    figures = measure(Studio(load_pack(needed_host()), given.steps, given.batch), given.rounds, given.only, given.clock)
    rows = [(name, f"{one['seconds']:.3f}", f"{one['times_plain']:.2f}") for name, one in figures.items()]
    recipe = {**vars(given), "threads": torch.get_num_threads()}
    write(
        given.json, recipe, figures, table(("in ComfyUI, on Toybox", "s a picture", "times the plain KSampler"), rows)
    )


if __name__ == "__main__":
    main()
