"""What ProFusion is to be compared with: pictures as prompts, after IP-Adapter (arXiv 2308.06721), trained on Toybox.

`python -m benchmarks.image_prompt --json FILE`. Every cross-attention layer gets keys and values of its own for four
tokens that are projected from the picture's CLIP embedding, and adds what they say to what the text says:

    out = W_O (softmax(Q K^T / sqrt(d)) V + scale * softmax(Q K'^T / sqrt(d)) V')

The base model stays as it is. Trained on pictures that Toybox's world draws, for minutes, not for as long
as the PromptNet that ships: that is part of the result. Judged as Fusion Sampling is, against the plain
model that reads only the text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.fusion_judging import FUSION_PROMPTS, references, scores
from benchmarks.results import percent, plus_minus, table, write
from profusion.diffusion import (
    per_row,
    sample_euler,
    sampling_sigmas,
    timestep_of,
    training_sigmas,
    variance_preserving,
)
from profusion.infusion import ExtraOptions, Patches, layer_name
from profusion.models.attention import attention
from profusion.models.unet import CrossAttention, SpatialTransformer, UNet
from profusion.promptnet.pseudo_word import with_noun
from profusion.toybox import world
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import Toybox, initial_noise

TOKENS = 4
DROPPED = 0.05  # of the texts and of the pictures, each; so that guidance and the text alone stay possible


def cross_attentions(unet: UNet) -> dict[str, CrossAttention]:
    """The cross-attention modules under the names of `profusion.infusion`'s layers."""
    stages = [(f"input.{i}", stage) for i, stage in enumerate(unet.input_blocks)]
    stages += [("middle.0", unet.middle_block), *((f"output.{i}", stage) for i, stage in enumerate(unet.output_blocks))]
    return {
        f"{name}.{index}": block.attn2
        for name, stage in stages
        for part in stage
        if isinstance(part, SpatialTransformer)
        for index, block in enumerate(part.transformer_blocks)
    }


class ImagePrompt(nn.Module):
    """The adapter: image embeddings (B, 128) to attention patches. New keys and values start as the text's."""

    def __init__(self, unet: UNet):
        super().__init__()
        width = unet.config.context_dim
        self._attentions = cross_attentions(unet)  # a plain dictionary: the base model is no part of the adapter
        self.project, self.norm = nn.Linear(width, TOKENS * width), nn.LayerNorm(width)
        names = {name: name.replace(".", "_") for name in self._attentions}
        self.keys = nn.ModuleDict({names[name]: _copied(one.to_k) for name, one in self._attentions.items()})
        self.values = nn.ModuleDict({names[name]: _copied(one.to_v) for name, one in self._attentions.items()})

    def patches(self, embeddings: Tensor, scale: float = 1.0) -> Patches:
        """For evaluations of as many conditional rows as embeddings (B, 128); unconditional
        ones see an empty picture."""
        inputs: dict[str, Tensor] = {}
        tokens = {0: self._tokens(embeddings), 1: self._tokens(torch.zeros_like(embeddings))}

        def remember(n: Tensor, context: Tensor, value: Tensor, extra_options: ExtraOptions):
            inputs[layer_name(extra_options)] = n
            return n, context, value

        def add(out: Tensor, extra_options: ExtraOptions) -> Tensor:
            layer = layer_name(extra_options)
            base, name = self._attentions[layer], layer.replace(".", "_")
            pictures = torch.cat([tokens[kind] for kind in extra_options["cond_or_uncond"]])
            query = base.to_q(inputs.pop(layer))
            seen = attention(query, self.keys[name](pictures), self.values[name](pictures), base.heads)
            return out + scale * F.linear(seen, base.to_out[0].weight)

        return {"attn2_patch": [remember], "attn2_output_patch": [add]}

    def _tokens(self, embeddings: Tensor) -> Tensor:
        return self.norm(self.project(embeddings).unflatten(1, (TOKENS, -1)))


def _copied(linear: nn.Linear) -> nn.Linear:
    copy = nn.Linear(linear.in_features, linear.out_features, bias=False)
    copy.weight.data.copy_(linear.weight)
    return copy


@dataclass(frozen=True)
class Examples:
    """Of single objects: latents (N, 4, CELLS, CELLS), CLIP embeddings (N, 128), captions without attributes."""

    latents: Tensor
    embeddings: Tensor
    captions: list[str]


def examples(toybox: Toybox, count: int, seed: int = 0, batch: int = 32) -> Examples:
    """Drawn as Toybox's own training pictures are: nothing that is held out."""
    rng, scenes = np.random.default_rng((30, seed)), []
    while len(scenes) < count:
        scene = world.sample_scene(rng)
        if len(scene.objects) == 1:
            scenes.append(scene)
    latents, embeddings = [], []
    with torch.no_grad():
        for first in range(0, count, batch):
            drawn = [world.render(scene).image for scene in scenes[first : first + batch]]
            pictures = torch.from_numpy(np.stack(drawn)).float() / 255
            latents.append(toybox.vae.latents(pictures))
            embeddings.append(embedded(toybox, pictures))
    return Examples(torch.cat(latents), torch.cat(embeddings), [world.bare_caption(scene).text for scene in scenes])


@torch.no_grad()
def embedded(toybox: Toybox, pictures: Tensor) -> Tensor:
    """CLIP embeddings (B, 128) of pictures (B, H, W, 3), of variance 1 as the adapter takes them."""
    embeddings = toybox.vision.embed(toybox.vision.preprocess(pictures))
    return embeddings * embeddings.shape[1] ** 0.5


def train(
    toybox: Toybox, adapter: ImagePrompt, known: Examples, steps: int, rate: float = 1e-3, batch: int = 8, seed: int = 0
) -> Iterator[float]:
    """The noise prediction of the examples under their captions and their own pictures; yields each step's loss."""
    generator, sigmas = torch.Generator().manual_seed(seed), training_sigmas()
    captions = sorted(set(known.captions))
    contexts = torch.cat([toybox.context(captions), toybox.context("")])
    spoken = torch.tensor([captions.index(caption) for caption in known.captions])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1)
    for _ in range(steps):
        chosen = torch.randint(len(known.latents), (batch,), generator=generator)
        mute, blind = torch.rand(2, batch, generator=generator) < DROPPED
        sigma = sigmas[torch.randint(len(sigmas), (batch,), generator=generator)]
        noise = torch.randn(known.latents[chosen].shape, generator=generator)
        noisy = variance_preserving(known.latents[chosen] + per_row(sigma, noise) * noise, sigma)
        context = contexts[spoken[chosen].masked_fill(mute, len(captions))]
        embeddings = known.embeddings[chosen].masked_fill(blind[:, None], 0.0)
        options = {"patches": adapter.patches(embeddings), "cond_or_uncond": [0]}
        predicted = toybox.unet(noisy, timestep_of(sigma), context, transformer_options=options)
        loss = (predicted - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


@torch.no_grad()
def draw(
    toybox: Toybox,
    adapter: ImagePrompt,
    prompts: Sequence[str],
    pictures: Tensor,
    generators,
    steps: int,
    cfg: float,
    scale: float,
) -> Tensor:
    """A picture for each prompt in plain words and its reference (B, SIZE, SIZE, 3) -> (B, SIZE, SIZE, 3)."""
    evaluate = toybox.evaluator(toybox.context(prompts), cfg)
    patches = adapter.patches(embedded(toybox, pictures), scale)
    noise = initial_noise(generators)
    latents = sample_euler(lambda x, sigma: evaluate(x, sigma, patches), noise, sampling_sigmas(steps))
    return toybox.vae.pictures(latents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2048, help="pictures to train on")
    parser.add_argument("--training-steps", type=int, default=3000)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="0 is the plain model")
    parser.add_argument("--count", type=int, default=32, help="unseen pictures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="write the figures here, and the adapter beside them")
    given = parser.parse_args()
    toybox, judge = Toybox.load(), Judge.load()
    adapter, kept = ImagePrompt(toybox.unet), given.json.with_suffix(".safetensors")
    if kept.is_file():
        adapter.load_state_dict(load_file(kept))
    else:
        for step, loss in enumerate(
            train(toybox, adapter, examples(toybox, given.examples), given.training_steps), start=1
        ):
            if step % 100 == 0:
                print(f"train {step}/{given.training_steps}  loss {loss:.4f}", flush=True)
        save_file(adapter.state_dict(), kept)
    known, found = references(given.count, given.seed), {}
    for scale in given.scales:

        def answer(prompt, nouns, pictures, generators, fresh, scale=scale) -> Tensor:
            texts = [with_noun(prompt, noun) for noun in nouns]
            return draw(toybox, adapter, texts, torch.cat(list(pictures)), generators, given.steps, given.cfg, scale)

        found[f"scale {scale:g}"] = scores(answer, judge, known, FUSION_PROMPTS, 32).as_json()
        print(f"scale {scale:g}", json.dumps(found[f"scale {scale:g}"]), flush=True)
    rows = [
        (name, plus_minus(one["concept"]), percent(one["noun"]), percent(one["text"])) for name, one in found.items()
    ]
    write(
        given.json,
        vars(given),
        found,
        table(("image prompt", "likeness to the picture", "right noun", "rest of the prompt followed"), rows),
    )


if __name__ == "__main__":
    main()
