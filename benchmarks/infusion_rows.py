"""What a cheaper customised stream keeps: `python -m benchmarks.infusion_rows RESIDUAL ...`, on Toybox.

F is the plain run: two UNet rows a step. C takes two more in the paper's scheme, which is four in all. Cheaper ones,
all with the background held:

- *F's guidance*: C's conditional row alone, led by F: D_C = c_C + (s - 1)(c_F - u_F)
- every n-th step: between them D_C = D_F + d, d carried on from C's last two steps (`profusion.stride`), as it
  ships; or *kept*: what it was at the last of them

c and u are the denoised predictions with the prompt and the negative, s the scale of guidance. *off*: how far a latent
is from that of the paper's scheme, as a share of what this one is from the plain.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.infusion_background import scores, summary
from benchmarks.results import plus_minus, table
from profusion.attending import UNET
from profusion.diffusion import eps_denoiser, per_row, sampling_sigmas, variance_exploding
from profusion.holding import HELD, Holding
from profusion.infusion import Patches, customised_patches, foundation_patches, on_conditional
from profusion.residual import Residual, load_residual
from profusion.stride import Stride
from profusion.toybox.concepts import DEMO_PROMPTS
from profusion.toybox.judge import Judge
from profusion.toybox.pipeline import CUSTOMISED_GUIDANCE, Toybox, initial_noise, seeded


@dataclass(frozen=True)
class Scheme:
    """every: C is evaluated at each so manyth step. guidance: whether C has its own negative row. carried: whether what
    it differs by is carried on between them."""

    name: str
    every: int = 1
    guidance: bool = True
    carried: bool = True

    @property
    def rows(self) -> float:
        """UNet rows a step, of both streams."""
        return 2 + (2 if self.guidance else 1) / self.every


SCHEMES = (
    *(Scheme(f"own guidance, every {every}", every) for every in (1, 2, 3, 4, 5, 6)),
    *(Scheme(f"own guidance, every {every}, kept", every, carried=False) for every in (2, 4)),
    *(Scheme(f"F's guidance, every {every}", every, False) for every in (1, 4)),
)
WHOLE = SCHEMES[0].name


@torch.no_grad()
def draw(toybox: Toybox, residual: Residual, prompt: str, seeds: Sequence[int], steps: int) -> dict[str, Tensor]:
    """Latents (B, 4, h, w): plain, another seed's, and each scheme's; F is evaluated once for all of them."""
    noise, sigmas, scale = initial_noise(seeded(*seeds)), sampling_sigmas(steps), CUSTOMISED_GUIDANCE
    placements = on_conditional(toybox.placements(prompt, [residual]))
    context = toybox.context(prompt).expand(len(seeds), -1, -1)
    away = toybox.context("").expand(len(seeds), -1, -1)
    holding = Holding(HELD, partial(UNET.looking, toybox.unet), len(seeds), noise.shape[-2:])

    def evaluate(x: Tensor, sigma: Tensor, patches: Patches, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """Denoised, by each of `rows`: 0 with the prompt, 1 with the negative."""
        contexts = torch.cat([away if row else context for row in rows])
        times = len(rows)
        network = eps_denoiser(lambda x, t: toybox.predict(x, t, contexts, None, patches, list(rows)))
        return network(torch.cat([x] * times), torch.cat([sigma] * times)).chunk(times)

    plain = variance_exploding(noise, sigmas[0])
    latents = {scheme.name: plain for scheme in SCHEMES}
    strides = {scheme.name: Stride(scheme.every, sigmas.tolist()) for scheme in SCHEMES}
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        levels, queries = sigma.expand(len(seeds)), {}
        look = holding.watching_foundation(foundation_patches(queries), placements)
        with_prompt, with_negative = evaluate(plain, levels, look, [0, 1])
        guided = with_negative + scale * (with_prompt - with_negative)
        patches = customised_patches(queries, placements)
        for scheme in SCHEMES:
            x, stride = latents[scheme.name], strides[scheme.name]
            if stride.due(float(sigma)):
                own, *negative = evaluate(x, levels, patches, [0, 1] if scheme.guidance else [0])
                leads = own - negative[0] if negative else with_prompt - with_negative
                drawn = own + (scale - 1) * leads
                if not scheme.carried:
                    stride = strides[scheme.name] = Stride(scheme.every, sigmas.tolist())
                stride.keep(float(sigma), [drawn], [guided])
            else:
                (drawn,) = stride.between(float(sigma), [guided])
            denoised = holding.denoised(drawn, guided)
            latents[scheme.name] = denoised + (x - denoised) * per_row(after / sigma, x)
        plain = guided + (plain - guided) * per_row(after / sigma, plain)
    latents = {name: holding.finished(x, plain) for name, x in latents.items()}
    others = seeded(*(seed + 1000 for seed in seeds))
    return {"plain": plain, **latents, "another seed": toybox.generate([prompt] * len(seeds), others, steps, scale)}


def off(latents: Tensor, whole: Tensor, plain: Tensor) -> Tensor:
    """How far latents (B, C, H, W) are from those of the whole scheme, as a share of how far these are from plain."""
    return (latents - whole).flatten(1).abs().mean(dim=1) / (whole - plain).flatten(1).abs().mean(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("residuals", nargs="+", type=Path, help="files named as their concept, _ for spaces")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    toybox, judge = Toybox.load(), Judge.load()
    gathered: dict[str, dict[str, list[Tensor]]] = {}
    for path in given.residuals:
        residual, name = load_residual(path), path.stem.replace("_", " ")
        for prompt in DEMO_PROMPTS[: given.prompts]:
            latents = draw(toybox, residual, prompt.format(residual.noun), range(1, given.seeds + 1), given.steps)
            found = scores(toybox, judge, name, latents)
            for kind, of_kind in found.items():
                of_kind["off"] = off(latents[kind], latents[WHOLE], latents["plain"])
                for score, values in of_kind.items():
                    gathered.setdefault(kind, {}).setdefault(score, []).append(values)
        print(f"drawn: {name}", flush=True)
        found = summary({kind: {s: torch.cat(v) for s, v in of_kind.items()} for kind, of_kind in gathered.items()})
        if given.out:
            given.out.write_text(json.dumps(found, indent=2) + "\n")
    cost = {scheme.name: f"{scheme.rows:.2f}" for scheme in SCHEMES}
    rows = [
        [kind, cost.get(kind, "2.00"), *(plus_minus(values) for values in of_kind.values())]
        for kind, of_kind in found.items()
    ]
    print(table(["scheme", "rows a step", *next(iter(found.values()))], rows))


if __name__ == "__main__":
    main()
