"""Residual Trainer in a real ComfyUI: through the host's own model, with its patches,
cancelled, resumed, and broken."""

import asyncio
import errno
import importlib
import os
import sys
import types
import uuid
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.model_management  # noqa: E402
import tiny  # noqa: E402
from pooled import PooledVae, pictures  # noqa: E402
from reports import cancel_at, on_report, stop_listening  # noqa: E402

VALUES = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight"


@pytest.fixture(scope="module")
def host(pack):
    """The pack's modules that are tested here."""
    nodes = {
        name.rpartition(".")[2]: importlib.import_module(f"{pack.__name__}.nodes.{name}")
        for name in ("trainer", "host.display", "host.evaluation", "host.residual_training")
    }
    names = ("residual.training", "residual", "pictures", "loop", "keeping")
    kernel = {name.split(".")[-1]: sys.modules[f"{pack.__name__}.profusion.{name}"] for name in names}
    return types.SimpleNamespace(pack=pack, **nodes, **kernel)


@pytest.fixture(scope="module")
def clip():
    return tiny.clip()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The host's folder of residuals, moved to an empty place."""
    import folder_paths

    folder = tmp_path / "models" / "profusion_residuals"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "profusion_residuals", ([str(folder)], {".safetensors"}))
    return folder


@pytest.fixture
def train(host, clip, folder):
    """Run the node as the host does, in inference mode: -> (residual, loss plot, samples, masks)."""

    def run(model=None, **inputs):
        inputs = {**defaults(), **inputs}
        with torch.inference_mode():
            arguments = {"model": tiny.model() if model is None else model, "clip": clip, "vae": PooledVae(), **inputs}
            return host.trainer.ResidualTrainer.execute(**arguments).args

    yield run
    host.residual_training._unsaved.clear()


def defaults():
    options = {
        "noun": "ball",
        "steps": 2,
        "learning_rate": 0.02,
        "batch_size": 2,
        "seed": 0,
        "flip": True,
        "preserve": 1.0,
    }
    samples = {"sample_every": 0, "sample_prompt": "a photo of a %noun% on grass", "sample_steps": 1, "sample_cfg": 2.0}
    return {"images": pictures(), **options, **samples}


def same(one, other):
    assert all(map(torch.equal, one.numbers(), other.numbers()))
    assert torch.equal(one.delta, other.delta) and one.steps == other.steps
    assert one.training_state.keys() == other.training_state.keys()
    for name, value in one.training_state.items():
        assert torch.equal(value, other.training_state[name])


def fingerprint(model):
    """What must be as before, once a training is over."""
    network = model.model
    return {
        "parameters": {name: (id(value), value.requires_grad) for name, value in network.named_parameters()},
        "buffers": {name: id(value) for name, value in network.named_buffers()},
        "modes": [part.training for part in network.modules()],
        "forwards": [part for part in network.modules() if "forward" in vars(part)],
        "options": repr(model.model_options),
        "wrappers": repr((model.wrappers, model.callbacks, model.object_patches)),
    }


# The schema, frozen: only append


def test_the_schema_is_frozen_and_explained(host):
    schema = host.trainer.ResidualTrainer.GET_SCHEMA()
    assert schema.node_id == "ProFusion_ResidualTrainer"
    assert [f"{entry.id}:{entry.get_io_type()}" for entry in schema.inputs] == [
        "model:MODEL",
        "clip:CLIP",
        "vae:VAE",
        "images:IMAGE",
        "noun:STRING",
        "steps:INT",
        "learning_rate:FLOAT",
        "batch_size:INT",
        "seed:INT",
        "flip:BOOLEAN",
        "preserve:FLOAT",
        "sample_every:INT",
        "sample_prompt:STRING",
        "sample_steps:INT",
        "sample_cfg:FLOAT",
        "masks:MASK",
        "resume:RESIDUAL",
        "gradient_checkpointing:COMBO",
        "stop_early:COMBO",
        "find_object:COMBO",
        "capacity:INT",
    ]
    assert [output.io_type for output in schema.outputs] == ["RESIDUAL", "IMAGE", "IMAGE", "MASK"]
    assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs]) and schema.description
    root = Path(host.trainer.__file__).parents[1]
    assert (root / "web" / "docs" / f"{schema.node_id}.md").is_file()


def test_the_seed_stays_as_it_is_when_queued_again(host):
    """Another seed after every queue would train anew each time."""
    assert host.trainer.ResidualTrainer.INPUT_TYPES()["required"]["seed"][1]["control_after_generate"] is False


# What comes out


def test_it_gives_a_residual_a_plot_samples_and_a_file(train, host, folder):
    seen = []
    on_report(lambda done, _, preview: seen.append((done, preview)))
    residual, plot, samples, masks = train(steps=4, sample_every=2)
    assert (residual.noun, residual.steps, residual.seed) == ("ball", 4, 0) and residual.delta.any()
    assert plot.shape == (1, 288, 512, 3) and samples.shape == (3, 64, 64, 3)
    assert samples.isfinite().all() and not torch.equal(samples[0], samples[2])
    assert masks.shape == pictures().shape[:3] and (masks == 1).all()
    (path,) = folder.rglob("*.safetensors")
    assert path.relative_to(folder).as_posix() == "training/ball_4_steps_00001_.safetensors"
    same(host.residual.load_residual(path), residual)
    assert sorted({done for done, _ in seen}) == [1, 2, 3, 4]
    previews = [preview for _, preview in seen if preview]
    assert len(previews) >= 2 and previews[0][0] == "JPEG" and previews[-1][1].height > previews[0][1].height


def test_the_plain_picture_comes_last_and_is_what_the_sampler_draws(train, clip):
    model = tiny.model()
    samples = train(model)[2]
    text = "a photo of a ball on grass"
    plain = tiny.sample(
        model, tiny.encode(clip, text), tiny.encode(clip, ""), scheduler="simple", steps=1, cfg=2.0, seed=0, size=(8, 8)
    )
    assert torch.equal(samples[-1:], PooledVae().decode(plain))


def test_sampling_in_between_does_not_change_the_training(train):
    same(train(steps=4, sample_every=1)[0], train(steps=4)[0])


def test_weights_loaded_in_inference_mode_train_alike_and_come_back(train):
    outside = tiny.model()
    with torch.inference_mode():
        inside = tiny.model()
    assert inside.model.diffusion_model.input_blocks[0][0].weight.is_inference()
    residuals = []
    for model in (outside, inside):
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([model])
        before = fingerprint(model)
        residuals.append(train(model)[0])
        assert fingerprint(model) == before
        assert all(parameter.grad is None for parameter in model.model.parameters())
    same(*residuals)


def test_an_aliased_weight_is_the_same_memory_and_is_not_taken_back_from_the_host(host):
    with torch.inference_mode():
        linear, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    own = linear.weight
    with host.evaluation.differentiable(linear):
        assert not linear.weight.is_inference() and linear.weight.data_ptr() == own.data_ptr()
        linear(torch.ones(1, 3, requires_grad=True)).sum().backward()
        linear.bias = other.bias
    assert linear.weight is own and linear.bias is other.bias


# Parity with the kernel


def toybox_folder(host, folder):
    """Toybox's files with random weights."""
    names = ("clip", "unet", "vae", "tokenizer")
    models = {name: importlib.import_module(f"{host.pack.__name__}.profusion.models.{name}") for name in names}
    pipeline = importlib.import_module(f"{host.pack.__name__}.profusion.toybox.pipeline")
    configs = importlib.import_module(f"{host.pack.__name__}.profusion.toybox.configs")
    clip = models["clip"]
    networks = {
        "unet": models["unet"].UNet(configs.TOYBOX),
        "vae": models["vae"].VAE(configs.TOYBOX_VAE),
        "text": clip.TextModel(configs.TOYBOX_TEXT),
        "vision": clip.VisionModel(configs.TOYBOX_VISION),
    }
    for seed, network in enumerate(networks.values()):
        tiny.randomise(network, seed)
    tokens = models["tokenizer"].tokenize([prompt.format("ball") for prompt in host.training.NOUN_PROMPTS]).unique()
    pipeline.save_weights(folder, tokens=tokens, **networks)
    return folder


@pytest.mark.parametrize(("weights", "capacity"), [("random", 1), ("random", 3), ("shipped", 1)])
def test_the_kernel_and_the_node_train_the_same_residual(train, host, tmp_path, weights, capacity):
    pipeline = importlib.import_module(f"{host.pack.__name__}.profusion.toybox.pipeline")
    models = importlib.import_module(f"{host.pack.__name__}.nodes.host.toybox")
    if weights == "shipped" and not all(
        (pipeline.WEIGHTS / f"toybox_{n}.safetensors").is_file() for n in pipeline.NETWORKS
    ):
        pytest.skip("Toybox's weights are not there: train them with `python -m training.toybox`")
    folder = toybox_folder(host, tmp_path / "toybox") if weights == "random" else pipeline.WEIGHTS
    images, masks = pictures(2, 96, 96), torch.zeros(2, 96, 96)
    masks[0, 20:70, 20:70], masks[1, 40:90, 10:60] = 1, 1
    options = host.training.TrainingOptions(steps=3, batch_size=2, seed=11, capacity=capacity)
    kernel = pipeline.Toybox.load(folder).training(images, masks, "ball", options)
    losses = list(kernel.steps())
    with torch.inference_mode():
        networks = {"model": models.load_model(folder), "clip": models.load_clip(None, folder)}
        networks["vae"] = models.load_vae(folder)
    residual = train(**networks, images=images, masks=masks, steps=3, seed=11, capacity=capacity)[0]
    assert residual.layers == kernel.residual().layers and residual.architecture == "Toybox"
    assert all(0.01 < loss < 100 for loss in losses)
    torch.testing.assert_close(residual.delta, kernel.residual().delta, rtol=0, atol=1e-4)
    # AdamW makes a share of a step out of how a gradient that is all but zero was rounded, and gates have such.
    for ours, theirs in zip(residual.numbers(), kernel.residual().numbers(), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


# Automatic: learning_rate 0


@pytest.fixture
def automatic(host, monkeypatch):
    """The rules of an automatic training, with checks that fit into a few steps."""
    rules = sys.modules[f"{host.pack.__name__}.profusion.residual.automatic"]
    monkeypatch.setattr(rules, "CHECK_EVERY", 2)
    return rules


def test_a_graph_of_before_trains_as_it_did_and_a_new_node_is_automatic(train, host):
    """Saved graphs hold the rate; what was appended is then what its default makes of it."""
    entries = host.trainer.ResidualTrainer.INPUT_TYPES()
    assert entries["required"]["learning_rate"][1]["default"] == 0
    assert [entries["optional"][name][1]["default"] for name in ("stop_early", "find_object")] == ["auto", "auto"]
    assert entries["optional"]["capacity"][1]["default"] == 1
    same(train(stop_early="auto", find_object="auto")[0], train(stop_early="off", find_object="off")[0])


def test_the_kernel_and_the_node_find_the_same_masks_and_residual(train, host, tmp_path, automatic):
    pipeline = importlib.import_module(f"{host.pack.__name__}.profusion.toybox.pipeline")
    models = importlib.import_module(f"{host.pack.__name__}.nodes.host.toybox")
    folder = toybox_folder(host, tmp_path / "toybox")
    images = pictures(2, 96, 96)
    options = host.training.TrainingOptions(steps=4, batch_size=2, seed=11, learning_rate=0.0)
    kernel = pipeline.Toybox.load(folder).training(images, torch.ones(2, 96, 96), "ball", options)
    list(kernel.steps())
    with torch.inference_mode():
        networks = {"model": models.load_model(folder), "clip": models.load_clip(None, folder)}
        networks["vae"] = models.load_vae(folder)
    residual = train(**networks, images=images, steps=4, seed=11, learning_rate=0.0)[0]
    assert len(kernel.checks) == 2 and all(0 < check < 2 for check in kernel.checks)
    torch.testing.assert_close(
        residual.training_state["checks"], torch.tensor(kernel.checks).double(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(residual.delta, kernel.residual().delta, rtol=0, atol=1e-3)


def test_an_automatic_training_goes_on_bit_for_bit_after_cancel(train, host, folder, automatic):
    whole = train(steps=6, learning_rate=0.0)[0]
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    cancel_at(3)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(steps=6, learning_rate=0.0)
    stop_listening()
    (path,) = folder.rglob("*.safetensors")
    half = host.residual.load_residual(path)
    assert 0 < half.steps < 6
    same(train(steps=6, learning_rate=0.0, resume=half)[0], whole)


def test_it_ends_early_says_why_and_names_the_file_by_its_steps(train, host, folder, automatic, monkeypatch):
    monkeypatch.setattr(automatic, "WORTHWHILE", 2.0)
    seen = []
    monkeypatch.setattr(host.trainer, "show", lambda node, text, *rest, **more: seen.append(text))
    residual = train(steps=40, learning_rate=0.0)[0]
    ended = 2 * (automatic.PATIENCE + 1)
    assert residual.steps == ended
    (path,) = folder.rglob("*.safetensors")
    assert path.name == f"ball_{ended}_steps_00001_.safetensors"
    assert f"ball: {ended} steps" in seen[0] and "has hardly fallen" in seen[0]
    again = train(steps=40, learning_rate=0.0, resume=residual)[0]
    assert again.steps == ended and torch.equal(again.delta, residual.delta)
    assert train(steps=10, learning_rate=0.0, stop_early="off")[0].steps == 10


def test_found_masks_come_out_and_are_shown_and_given_ones_are_kept(train, host, automatic, monkeypatch):
    heights = []
    shown = host.trainer.show
    monkeypatch.setattr(
        host.trainer, "show", lambda node, text, picture, **more: heights.append(picture.height) or shown(node, text)
    )
    found = train(learning_rate=0.0)[3]
    assert found.shape == pictures().shape[:3] and 0 <= found.amin() < found.amax() <= 1
    mask = torch.zeros(1, *pictures().shape[1:3])
    mask[:, 16:48, 16:48] = 1
    given = train(learning_rate=0.0, masks=mask)[3]
    assert set(given.unique().tolist()) <= {0.0, 1.0} and given[0, 30, 30] == 1 and given[0, 0, 0] == 0
    assert heights[0] > heights[1]
    assert (train(learning_rate=0.0, find_object="off")[3] == 1).all()


def test_pictures_that_the_model_does_not_know_are_said_to_be_so(train, host, automatic, monkeypatch):
    seen = []
    monkeypatch.setattr(host.trainer, "show", lambda node, text, *rest, **more: seen.append(text))
    monkeypatch.setattr(automatic, "STRANGE", 0.0)
    train(learning_rate=0.0)
    assert "times as much of them as of a ball that it draws itself" in seen[0]
    monkeypatch.setattr(automatic, "STRANGE", 1e9)
    train(learning_rate=0.0)
    assert "far from what the model knows" not in seen[1]


# The host's own model


def test_a_lora_takes_part(train):
    change = 0.3 * torch.randn(32, tiny.CONTEXT, generator=torch.Generator().manual_seed(8))
    patched = tiny.model()
    patched.add_patches({VALUES: ("diff", (change,))})
    baked = tiny.model()
    with torch.no_grad():
        dict(baked.model.named_parameters())[VALUES].add_(change)
    residual = train(patched)[0]
    torch.testing.assert_close(residual.delta, train(baked)[0].delta, rtol=0, atol=1e-5)
    assert not torch.allclose(residual.delta, train()[0].delta, rtol=0, atol=1e-4)


def test_patches_take_part_and_guidance_does_not(train):
    calls = {"attn1": 0, "replace": 0, "wrapper": 0, "guidance": 0}
    model = tiny.model()

    def attn1(q, k, v, extra_options):
        calls["attn1"] += 1
        return 0.9 * q, k, v

    def replace(q, k, v, extra_options):
        calls["replace"] += 1
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def wrapper(apply_model, arguments):
        calls["wrapper"] += torch.is_grad_enabled()
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    def guidance(arguments):
        calls["guidance"] += torch.is_grad_enabled()
        return arguments["denoised"]

    model.set_model_attn1_patch(attn1)
    model.set_model_attn2_replace(replace, "middle", 0)
    model.set_model_unet_function_wrapper(wrapper)
    model.set_model_sampler_post_cfg_function(guidance)
    residual = train(model)[0]
    assert calls["attn1"] and calls["replace"] and calls["wrapper"] == 2 and not calls["guidance"]
    assert not torch.equal(residual.delta, train()[0].delta)


def test_a_model_that_has_infusion_on_it_trains_as_without(train, host):
    streams, families = host.pack.nodes.host.streams, host.pack.nodes.host.families
    model = tiny.model()
    patched = streams.add_streams(model, families.model_layers(model), False)
    same(train(patched)[0], train(model)[0])


def test_a_velocity_model_is_trained_on_the_noise_it_implies(host, clip):
    model = tiny.model()
    velocity = comfy.model_base.ModelType.V_PREDICTION
    model.add_object_patch("model_sampling", comfy.model_base.model_sampling(model.model.model_config, velocity))
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.7, 5.0])
    context = tiny.encode(clip, "a ball")
    trained, seen = host.evaluation.TrainedModel(model, [context]), []

    def note(apply_model, arguments):
        out = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        seen.append(out)
        return out

    model.set_model_unet_function_wrapper(note)
    with torch.inference_mode():
        eps = []
        trained.run(lambda: eps.append(trained.predict_noise(x, sigma, 0, {})), (2, 4, 8, 8))
    network = model.model.diffusion_model
    scale = sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        scaled = x / (scale**2 + 1).sqrt()
        time = model.get_model_object("model_sampling").timestep(sigma).float()
        v = network(scaled, time, context=context[0][0].expand(2, -1, -1))
    expected = scaled * scale / (scale**2 + 1).sqrt() + v / (scale**2 + 1).sqrt()
    torch.testing.assert_close(eps[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float8_e5m2, torch.bfloat16),
        (torch.float16, None),
        (torch.bfloat16, None),
    ],
)
def test_models_of_any_precision_train_a_float32_residual(train, dtype, compute):
    with torch.inference_mode():
        model = tiny.model(dtype, compute)
    residual = train(model, steps=1)[0]
    assert residual.delta.dtype == torch.float32 and (residual.delta != 0).all()
    assert {parameter.dtype for parameter in model.model.diffusion_model.parameters()} == {dtype}


def test_an_overflow_names_the_way_out(train, folder):
    model = tiny.model(torch.float16)
    with torch.no_grad():
        model.model.diffusion_model.out[2].weight.fill_(6e4)
    with pytest.raises(Exception, match="the loss is (inf|nan) at step 0.*use a model in float32 or bfloat16"):
        train(model)
    assert not list(folder.rglob("*.safetensors"))


def test_models_that_infusion_cannot_move_are_refused_by_name(train, host):
    class Flux(torch.nn.Module):
        pass

    model = tiny.model()
    model.add_object_patch("diffusion_model", Flux())
    with pytest.raises(ValueError, match="Flux.* is not supported: the model has none of a UNet's cross-attentions"):
        train(model)


# Cancel, errors and resuming


@pytest.mark.parametrize("capacity", [1, 3])
def test_a_resumed_training_goes_on_bit_for_bit(train, host, folder, capacity):
    whole = train(steps=4, capacity=capacity)[0]
    half = train(steps=2, capacity=capacity)[0]
    (path,) = folder.rglob("ball_2_steps*")
    for resume in (half, host.residual.load_residual(path)):
        same(train(steps=4, capacity=capacity, resume=resume)[0], whole)


def test_cancel_stops_within_a_step_keeps_what_was_learned_and_leaves_nothing_behind(train, host, folder):
    model = tiny.model()
    whole = train(model, steps=4)[0]
    before = fingerprint(model)
    for step in (1, 2, 3):
        cancel_at(step)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(model, steps=4)
        stop_listening()
        assert fingerprint(model) == before
        (path,) = folder.rglob(f"ball_partial_{step}_steps_*.safetensors")
        partial = host.residual.load_residual(path)
        assert partial.steps == step
        same(train(model, steps=4, resume=partial)[0], whole)


def test_cancel_while_sampling_keeps_what_was_learned(train, host, folder):
    model, drawing = tiny.model(), []

    def note(apply_model, arguments):
        if not torch.is_grad_enabled() and not drawing and torch.is_inference_mode_enabled():
            drawing.append(True)
            comfy.model_management.interrupt_current_processing(True)
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(note)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(model, steps=4, sample_every=2)
    (path,) = folder.rglob("*.safetensors")
    assert host.residual.load_residual(path).steps == 2


def test_cancel_before_the_first_step_is_done_writes_nothing(train, folder):
    comfy.model_management.interrupt_current_processing(True)
    model = tiny.model()
    model.set_model_unet_function_wrapper(lambda *_: comfy.model_management.throw_exception_if_processing_interrupted())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(model)
    assert not list(folder.rglob("*.safetensors"))


def failing_after(steps, problem):
    """A model that fails in this step's second evaluation."""
    model, calls = tiny.model(), []

    def wrapper(apply_model, arguments):
        calls.append(0)
        if len(calls) > 2 * steps:
            raise problem
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("problem", [RuntimeError("a kernel failed"), torch.cuda.OutOfMemoryError("GPU is full")])
def test_any_error_keeps_what_was_learned_and_says_where(train, host, folder, problem):
    model = failing_after(2, problem)
    before = fingerprint(model)
    cause = "out of memory while training on 2 pictures" if "GPU" in str(problem) else "a kernel failed"
    kind = host.loop.TrainingError if "kernel" in cause else torch.cuda.OutOfMemoryError  # the host unloads its models
    with pytest.raises(kind, match=cause) as caught:
        train(model, steps=4)
    assert fingerprint(model) == before
    (path,) = folder.rglob("ball_partial_2_steps_*.safetensors")
    assert str(path) in str(caught.value)
    same(train(steps=4, resume=host.residual.load_residual(path))[0], train(steps=4)[0])


def test_an_error_in_the_first_step_writes_nothing(train, host, folder):
    with pytest.raises(host.loop.TrainingError, match=r"a kernel failed.*\nNothing had been learned yet"):
        train(failing_after(0, RuntimeError("a kernel failed")))
    assert not list(folder.rglob("*.safetensors"))


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_stops_it_before_the_training(train, host, folder, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    seen = []
    on_report(lambda done, *_: seen.append(done))
    with pytest.raises(host.residual.ResidualError, match="the disk is full"):
        train()
    assert not seen and not list(folder.rglob("*"))[1:]


def test_a_folder_that_cannot_be_made_stops_it_before_the_training(train, host, folder):
    folder.parent.mkdir(parents=True)
    folder.touch()
    with pytest.raises(host.residual.ResidualError, match="cannot be used"):
        train()


def test_a_disk_that_fills_up_meanwhile_loses_nothing(train, host, folder, monkeypatch):
    """The training is not reported as finished without a file, and queued again it is not repeated."""
    whole, model = train(steps=4)[0], tiny.model()

    def fill(done, *_):
        if done == 3:
            monkeypatch.setattr(host.residual.file.files, "write_atomically", full_disk)

    on_report(fill)
    with pytest.raises(host.loop.TrainingError, match="the disk is full.*\n.*4 steps so far could not be saved"):
        train(model, steps=4)
    monkeypatch.undo()
    folder_paths = sys.modules["folder_paths"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "profusion_residuals", ([str(folder)], {".safetensors"}))
    trained = []
    on_report(lambda done, *_: trained.append(done))
    same(train(model, steps=4)[0], whole)
    assert set(trained) == {4}
    assert len(list(folder.rglob("ball_4_steps_*.safetensors"))) == 2
    trained.clear()
    train(model, steps=4)
    assert set(trained) == {1, 2, 3, 4}, "what has been saved is not kept in memory"


# What is on the disk at any moment


@pytest.fixture
def every_step(host, monkeypatch):
    """What has been learned is written after every step, however little time went by."""
    monkeypatch.setattr(host.keeping, "SECONDS", 0.0)
    monkeypatch.setattr(host.keeping, "SHARE", 1e9)


def test_a_kill_at_any_step_leaves_a_file_that_goes_on_bit_for_bit(train, host, folder, every_step):
    found = {}

    def note(done, *_):
        paths = list(folder.rglob("ball_partial_*.safetensors"))
        found.setdefault(done, (len(paths), host.residual.load_residual(paths[0])) if paths else None)

    on_report(note)
    whole = train(steps=4, sample_every=2)[0]
    stop_listening()
    assert sorted(found) == [1, 2, 3, 4] and all(count == 1 for count, _ in found.values()), (
        "the older ones are removed"
    )
    for done in (1, 2, 3):
        assert found[done][1].steps == done
        same(train(steps=4, resume=found[done][1])[0], whole)
    assert not list(folder.rglob("ball_partial_*"))
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmp"]


def test_before_a_sample_is_drawn_what_it_shows_is_on_the_disk(train, host, folder):
    """Without waiting for the seconds to go by: drawing may be what kills it."""
    drawn, drawing = [], host.residual_training.SamplePictures.draw

    def note(samples, residual):
        drawn.append([host.residual.load_residual(path).steps for path in folder.rglob("*.safetensors")])
        return drawing(samples, residual)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.residual_training.SamplePictures, "draw", note)
        patch.setattr(host.keeping, "SHARE", 1e9)
        train(steps=3, sample_every=1)
    assert drawn == [[1], [2], [3]]


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "full"), RuntimeError("can't allocate"), MemoryError()])
def test_a_copy_that_cannot_be_written_stops_no_training_and_is_said_under_the_node(
    train, host, folder, every_step, monkeypatch, problem
):
    told = []
    monkeypatch.setattr(host.display, "_tell", lambda _, text, preview: told.append(text))
    saving = host.residual_training.save_residual

    def fail(residual, path, *arguments, **named):
        if "partial" in path.name:
            raise problem
        return saving(residual, path, *arguments, **named)

    monkeypatch.setattr(host.residual_training, "save_residual", fail)
    assert train(steps=3)[0].steps == 3
    assert [path.name for path in folder.rglob("*.safetensors")] == ["ball_3_steps_00001_.safetensors"]
    assert len(told) == 2 and told[0].startswith("What has been learned so far cannot be written (")


@pytest.mark.parametrize("problem", [RuntimeError("can't allocate memory"), MemoryError("no memory"), KeyError("odd")])
def test_whatever_keeps_it_from_being_saved_it_is_kept_in_memory(train, host, folder, monkeypatch, problem):
    model = tiny.model()
    whole = train(model, steps=4)[0]

    def fail(*_, **__):
        raise problem

    monkeypatch.setattr(host.residual_training, "save_residual", fail)
    cancel_at(3)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(model, steps=4)
    stop_listening()
    assert len(host.residual_training._unsaved) == 1
    monkeypatch.undo()
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "profusion_residuals", ([str(folder)], {".safetensors"}))
    trained = []
    on_report(lambda done, *_: trained.append(done))
    same(train(model, steps=4)[0], whole)
    assert set(trained) == {4} and not host.residual_training._unsaved


def test_where_the_first_folder_fails_another_one_is_tried(train, host, tmp_path, folder, monkeypatch):
    import folder_paths

    other = tmp_path / "other disk"
    entry = ([str(folder), str(other)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "profusion_residuals", entry)
    saving = host.residual_training.save_residual

    def fail(residual, path, *arguments, **named):
        if path.is_relative_to(folder):
            raise OSError(errno.ENOSPC, "full")
        return saving(residual, path, *arguments, **named)

    monkeypatch.setattr(host.residual_training, "save_residual", fail)
    with pytest.raises(host.loop.TrainingError, match="2 steps so far are saved as") as caught:
        train(failing_after(2, RuntimeError("a kernel failed")), steps=4)
    (path,) = other.rglob("ball_partial_2_steps_*.safetensors")
    assert str(path) in str(caught.value) and not list(folder.rglob("*.safetensors"))


def test_checking_that_a_folder_can_be_written_to_touches_no_other_file(train, host, folder, monkeypatch):
    """Somebody else may take the very name in between."""
    writing = host.residual_training.check_writable

    def meanwhile(kind, prefix, *arguments):
        writing(kind, prefix, *arguments)
        seen.append(sorted(path.name for path in folder.rglob("*") if path.is_file()))

    seen = []
    monkeypatch.setattr(host.residual_training, "check_writable", meanwhile)
    train()
    assert seen == [[]]


# Bad input


@pytest.mark.parametrize("there", [True, False], ids=["there", "missing"])
def test_a_noun_that_is_an_embedding_is_refused_with_what_to_write(train, folder, tmp_path, there):
    from safetensors.torch import save_file

    (tmp_path / "embeddings").mkdir()
    if there:
        save_file({"emb_params": torch.ones(1, tiny.CONTEXT)}, tmp_path / "embeddings" / "foo.safetensors")
    clip = tiny.clip()
    tokenizer = clip.tokenizer.clip_l
    tokenizer.embedding_directory, tokenizer.embedding_size = str(tmp_path / "embeddings"), tiny.CONTEXT
    message = (
        "is an embedding.*Give the class of what it shows, such as cat" if there else "one such as cat, and no emb"
    )
    with pytest.raises(ValueError, match=f"^noun='embedding:foo' .*{message}"):
        train(clip=clip, noun="embedding:foo")
    assert not list(folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"images": torch.ones(0, 64, 64, 3)}, "no pictures"),
        ({"images": torch.ones(1, 1, 1, 3)}, "too small"),
        ({"masks": torch.zeros(1, 64, 64)}, "mask 1 is all black"),
        ({"masks": torch.ones(1, 1, 1)}, "a mask of 1x1 pixels"),
        ({"masks": torch.ones(3, 64, 64)}, "3 masks for 2 pictures"),
        ({"noun": "  "}, "give the class"),
        ({"noun": "!"}, "give the class"),
        ({"noun": "(ball:1.2)"}, "is not found in the prompt"),
        ({"sample_prompt": "a cat"}, "sample_prompt: .*'ball', which is not a word of the prompt 'a cat'"),
        ({"sample_prompt": "two balls"}, "sample_prompt: .*Write 'ball' where it has 'balls'"),
        ({"sample_prompt": " "}, "sample_prompt: the prompt is empty"),
        ({"clip": None}, "clip is None"),
        ({"vae": None}, "vae is None"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_bad_input_is_named_before_anything_is_trained(train, folder, inputs, message):
    with pytest.raises(ValueError, match=message):
        train(**inputs)
    assert not list(folder.rglob("*.safetensors"))


def test_another_model_s_vae_clip_or_residual_is_named(train, host):
    class WideVae(PooledVae):
        def encode(self, pictures):
            return torch.zeros(len(pictures), 16, 8, 8)

    with pytest.raises(ValueError, match="the VAE makes latents of shape .16, 8, 8. and the model takes 4 channels"):
        train(vae=WideVae())
    other = tiny.model(context_dim=32)
    with pytest.raises(ValueError, match="a context of width 64 and the model takes 32"):
        train(other)
    stranger = host.residual.Residual(torch.zeros(1, 1, 8), "ball", ("input.1.0",), "another")
    with pytest.raises(ValueError, match="was trained on another"):
        train(resume=stranger)
    with pytest.raises(ValueError, match="has 2 steps already, and steps=2 counts from the first"):
        train(resume=train()[0])


@pytest.mark.parametrize(("channels", "size"), [(1, (64, 64)), (4, (64, 64)), (3, (61, 75)), (3, (8, 8))])
def test_grey_transparent_and_odd_pictures_train(train, channels, size):
    residual, _, samples, _ = train(images=pictures(2, *size, channels), steps=1)
    assert residual.delta.any()
    assert samples.shape[1:3] == tuple(side // 8 * 8 for side in size)


# Through the host's executor


def test_a_graph_trains_saves_and_shows(host, clip, folder, monkeypatch):
    import execution
    from comfy_api.latest import io
    from executor import prompt_executor

    import nodes

    class Inputs(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            outputs = [io.Model.Output(), io.Clip.Output(), io.Vae.Output(), io.Image.Output()]
            return io.Schema(node_id="TrainerInputs", inputs=[], outputs=outputs)

        @classmethod
        def execute(cls):
            return io.NodeOutput(tiny.model(), clip, PooledVae(), pictures())

    saver = sys.modules[f"{host.pack.__name__}.nodes.residual"].ResidualSaver
    for node in (Inputs, saver, host.trainer.ResidualTrainer):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["1", 3]}
    graph = {
        "1": {"class_type": "TrainerInputs", "inputs": {}},
        "2": {"class_type": "ProFusion_ResidualTrainer", "inputs": {**defaults(), **links}},
        "3": {
            "class_type": "ProFusion_ResidualSaver",
            "inputs": {"residual": ["2", 0], "filename_prefix": "%noun%", "precision": "int6", "preview": ["2", 2]},
        },
    }
    executor = prompt_executor()

    def run():
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("test", graph, None))
        assert valid, (error, node_errors)
        executor.execute(graph, str(uuid.uuid4()), execute_outputs=outputs)
        return [event for event, _ in executor.status_messages]

    assert "execution_success" in run()
    (text,) = executor.history_result["outputs"]["2"]["text"]
    assert "ball: 2 steps" in text and "ball_2_steps_00001_.safetensors" in text and "bytes" in text
    assert sorted(path.name for path in folder.glob("*")) == ["ball_00001_.png", "ball_00001_.safetensors", "training"]
    graph["2"]["inputs"]["steps"] = 3
    cancel_at(2)
    assert "execution_interrupted" in run()
    stop_listening()
    assert list(folder.rglob("ball_partial_2_steps_*.safetensors"))
