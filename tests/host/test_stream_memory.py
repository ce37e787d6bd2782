"""What remembers something of a run, wherever a pack keeps it: each stream has its own, so F is the plain run."""

import gc
import random

import numpy as np
import pytest
import torch

samplers = pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.controlnet  # noqa: E402
import comfy.model_patcher  # noqa: E402
from comfy.patcher_extension import PatcherInjection  # noqa: E402

SIGMAS = (9.0, 6.0, 4.0, 2.0, 0.0)


def mean_in_an_array():
    mean = np.zeros((1, 4, 8, 8), dtype=np.float32)

    def guided(args):
        np.copyto(mean, 0.7 * mean + 0.3 * args["denoised"].numpy())
        return args["denoised"] + 0.2 * torch.from_numpy(mean.copy())

    return guided


def numpy_generator():
    generator = np.random.default_rng(0)
    return lambda args: args["denoised"] * (1 + 0.1 * generator.random())


def steps_of_a_list():
    steps = iter([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    return lambda args: args["denoised"] * (1 + next(steps))


def global_numpy():
    np.random.seed(3)
    return lambda args: args["denoised"] * (1 + 0.1 * np.random.rand())


def global_python():
    random.seed(3)
    return lambda args: args["denoised"] * (1 + 0.1 * random.random())


@pytest.mark.parametrize(
    "make", [mean_in_an_array, numpy_generator, steps_of_a_list, global_numpy, global_python], ids=lambda f: f.__name__
)
def test_a_patch_that_remembers(infused, make):
    def patched():
        model = infused.model.clone()
        model.set_model_sampler_post_cfg_function(make())
        return model

    plain = infused.run(patched(), infused.positive, steps=4)
    zero = infused.run(*infused.patch(infused.residual(0.0), patched()), steps=4)
    assert torch.equal(zero, plain)
    customised, foundation = infused.run_both(*infused.patch(infused.residual(), patched()), steps=4)
    assert torch.equal(foundation, plain) and not torch.equal(customised, plain)


class Remembering(samplers.CFGGuider):
    """Guidance away from the mean of all predictions so far."""

    def __init__(self, model):
        super().__init__(model)
        self.history = []

    def predict_noise(self, *args, **kwargs):
        found = super().predict_noise(*args, **kwargs)
        self.history.append(found)
        return found + 0.2 * (found - torch.stack(self.history).mean(0))


def guided(infused, model, positive):
    guider = Remembering(model)
    guider.set_conds(positive, infused.negative)
    guider.set_cfg(4.0)
    latent = torch.zeros(1, 4, 8, 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        euler = samplers.sampler_object("euler")
        return guider.sample(noise, latent, euler, torch.tensor(SIGMAS), disable_pbar=True, seed=7)


def test_a_guider_that_remembers(infused):
    plain = guided(infused, infused.model, infused.positive)
    assert torch.equal(guided(infused, *infused.patch(infused.residual(0.0))), plain)
    found = []
    patched, positive = infused.patch(infused.residual())
    watched = infused.pack.nodes.host.streams.add_streams(patched, infused.layers, False, found.append)
    assert not torch.equal(guided(infused, watched, positive), plain)
    assert torch.equal(patched.model.process_latent_out(found[0].float()), plain)


class Counting(comfy.controlnet.ControlBase):
    """A control model of a pack's own, stronger each time; another may come before it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def get_control(self, x, *args, **kwargs):
        self.count += 1
        given = {"middle": [torch.full((len(x), 64, 4, 4), self.count / 20)], "input": [], "output": []}
        if self.previous_controlnet is None:
            return given
        before = self.previous_controlnet.get_control(x, *args, **kwargs)
        return {**given, "middle": [given["middle"][0] + before["middle"][0]]}

    def get_models(self):
        return []

    def copy(self):
        return Counting()

    def pre_run(self, *args):
        self.count = 0
        super().pre_run(*args)


@pytest.mark.parametrize("chained", [False, True])
def test_a_control_model_that_remembers(infused, chained):
    def controlled(conditioning):
        control = Counting()
        if chained:
            control.set_previous_controlnet(Counting())
        return [[text, {**more, "control": control, "control_apply_to_uncond": True}] for text, more in conditioning]

    plain = infused.run(infused.model, controlled(infused.positive), steps=4)
    assert not torch.equal(plain, infused.run(infused.model, infused.positive, steps=4))
    zero, positive = infused.patch(infused.residual(0.0))
    assert torch.equal(infused.run(zero, controlled(positive), steps=4), plain)
    patched, positive = infused.patch(infused.residual())
    customised, foundation = infused.run_both(patched, controlled(positive), steps=4)
    assert torch.equal(foundation, plain) and not torch.equal(customised, plain)


def test_a_packs_own_patcher_keeps_what_it_put_on_the_network(infused):
    """A copy of it, once gone, would eject the original's adapters: the next plain run would lack them."""
    inside, seen = [0], []

    class PacksPatcher(comfy.model_patcher.ModelPatcher):
        pass

    PacksPatcher.__module__ = "some_pack.patching"

    def inject(_):
        inside[0] += 1

    def eject(_):
        inside[0] -= 1

    own = PacksPatcher(infused.model.model, infused.model.load_device, infused.model.offload_device)
    own.set_injections("adapters", [PatcherInjection(inject=inject, eject=eject)])
    patched, positive = infused.patch(infused.residual(), own)

    class Seen:
        noted = seen

    def note(args):
        Seen.noted.append((inside[0], patched.is_injected))
        return args["denoised"]

    patched.set_model_sampler_post_cfg_function(note)
    for conditioning in (positive, infused.positive):
        infused.run(patched, conditioning)
        gc.collect()
        assert set(seen) == {(1, True)}
        seen.clear()
