"""The benchmarks that run in a host still find in it what they time."""

import pytest

pytest.importorskip("comfy.samplers", reason="ComfyUI was not found: set COMFYUI_PATH")

import torch  # noqa: E402

from benchmarks.host_cost import Studio  # noqa: E402
from benchmarks.trainer_cost import Task, material, residual_steps  # noqa: E402


def test_pictures_are_drawn_with_concepts(pack):
    with torch.inference_mode():
        Studio(pack, steps=1, batch=1).infusion(2)()


def test_a_training_takes_its_steps(pack):
    steps = residual_steps(Task(*material("toybox", 8), batch=1, rate=0.01))
    assert torch.tensor([float(next(steps)) for _ in range(2)]).isfinite().all()
    steps.close()
