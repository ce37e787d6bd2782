"""One process of several: the gradient of a global batch, or a few steps, written by the first."""

import json
import sys
from pathlib import Path

import torch

from profusion.pretraining.ranks import joined
from tests.pretraining.small import engine_for, pictures

if __name__ == "__main__":
    out, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    with joined() as ranks:
        engine = engine_for(ranks, **given)
        latents, image_tokens = (part[ranks.rows(8)] for part in pictures())
        engine._gradient(latents, image_tokens)
        found = {}
        for name, value in engine.parameters.items():
            gradient = value.grad
            found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        engine._optimizer.zero_grad()
        losses = []
        for _ in range(3):
            losses.append(engine.take(latents, image_tokens).loss)
            with engine.averaged(), torch.no_grad():  # as a validation does, which is to leave no trace
                kind = next(iter(engine.parameters.values())).dtype
                given_to = (latents.to(kind), image_tokens.to(kind), latents.to(kind))
                engine.objective(*given_to, torch.ones(len(latents), dtype=kind), 0)
        state = engine.state()
        if ranks.first:
            torch.save((found, losses, engine.step, sorted(state)), out)
