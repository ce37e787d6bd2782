"""Overfit Report in a real ComfyUI, on a tiny random model: exact zeros, the kernel's numbers, and what it refuses."""

import importlib
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.model_management
import tiny
from pooled import PooledVae
from reports import on_report

FISHER, WASSERSTEIN, ROWS = "latent Fisher divergence", "2-Wasserstein", "UNet rows a picture"
BASE, OTHER = "base model (ball)", "other seeds (ball)"


@pytest.fixture(scope="module")
def host(pack, infused):
    module = importlib.import_module(f"{pack.__name__}.nodes.overfit")
    return types.SimpleNamespace(
        pack=pack,
        node=module.OverfitReport,
        infused=infused,
        evaluation=sys.modules[f"{pack.__name__}.nodes.host.evaluation"],
    )


def lora(model, size=0.05, only=""):
    """A model with random changes to its attention weights, as a LoRA makes them."""
    generator, changed = torch.Generator().manual_seed(3), model.clone()
    patches = {
        name: (size * torch.randn(weight.shape, generator=generator),)
        for name, weight in model.model.state_dict().items()
        if "attn" in name and name.endswith("weight") and weight.ndim == 2 and only in name
    }
    assert changed.add_patches(patches, 1.0)
    return changed


@pytest.fixture
def report(host):
    """Run the node as the host does, in inference mode: -> (markdown, chart, scores by metric and subject, notes)."""

    def run(count=3, **inputs):
        defaults = {
            "model": host.infused.model,
            "clip": host.infused.clip,
            "latent": {"samples": torch.zeros(count, 4, 8, 8)},
            "noun": "ball",
            "class_prompt": "a photo of a %noun%",
            "prompts": "a house on a hill\n\na street at night\n",
            "draws": 3,
            "seed": 5,
            "steps": 2,
            "cfg": 2.0,
            "sampler_name": "euler",
            "scheduler": "simple",
        }
        with torch.inference_mode():
            table, chart, text = host.node.execute(**{**defaults, **inputs}).args
        found = json.loads(text)
        return table, chart, {(row["metric"], row["subject"]): row for row in found["scores"]}, found["notes"]

    return run


def test_the_schema_is_frozen_and_explained(host):
    schema = host.node.GET_SCHEMA()
    assert schema.node_id == "ProFusion_OverfitReport"
    assert [f"{entry.id}:{entry.get_io_type()}" for entry in schema.inputs] == [
        "model:MODEL",
        "clip:CLIP",
        "latent:LATENT",
        "noun:STRING",
        "class_prompt:STRING",
        "prompts:STRING",
        "draws:INT",
        "seed:INT",
        "steps:INT",
        "cfg:FLOAT",
        "sampler_name:COMBO",
        "scheduler:COMBO",
        "customised:MODEL",
        "customised_clip:CLIP",
        "conditioning:CONDITIONING",
        "residual:RESIDUAL",
        "residual_2:RESIDUAL",
        "residual_3:RESIDUAL",
        "residual_4:RESIDUAL",
        "vae:VAE",
    ]
    assert [output.io_type for output in schema.outputs] == ["STRING", "IMAGE", "STRING"]
    assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs]) and schema.description
    assert (Path(host.pack.__file__).parent / "web" / "docs" / f"{schema.node_id}.md").is_file()
    ids = [node.GET_SCHEMA().node_id for node in host.pack.NODES]
    assert schema.node_id in ids and len(ids) == len(set(ids))


def test_infusion_left_other_prompts_alone_exactly_and_a_lora_did_not(host, report):
    table, chart, rows, notes = report(residual=host.infused.residual(), customised=lora(host.infused.model))
    residual, customised = "residual (ball)", "customised (ball)"
    assert rows[FISHER, residual]["mean"] == rows[FISHER, residual]["low"] == rows[FISHER, residual]["high"] == 0.0
    assert rows[FISHER, residual]["count"] == 6 and rows[FISHER, customised]["mean"] > 0
    assert rows[WASSERSTEIN, residual]["mean"] > 0 and rows[WASSERSTEIN, customised]["mean"] > 0
    assert rows[WASSERSTEIN, OTHER]["mean"] > 0 and rows[WASSERSTEIN, OTHER]["low"] is None
    assert rows[ROWS, BASE]["mean"] == rows[ROWS, customised]["mean"] == 4  # 2 steps, cond and uncond
    assert rows[ROWS, residual]["mean"] == 8
    assert [note.split(": it moved")[0] for note in notes if "it moved" in note] == [customised]
    assert any("3 pictures for 256 dimensions" in note for note in notes)
    assert f"| {residual} | 0 (0 to 0) |" in table and chart.shape[0] == 1 and chart.shape[-1] == 3


def test_the_same_model_is_0_apart(host, report):
    rows = report(customised=host.infused.model.clone())[2]
    assert rows[FISHER, "customised (ball)"]["mean"] == 0.0
    assert rows[WASSERSTEIN, "customised (ball)"]["mean"] < 1e-4 < rows[WASSERSTEIN, OTHER]["mean"]


def test_the_infusion_patchs_two_outputs_are_what_the_residual_is(host, report):
    residual = host.infused.residual()
    patched, conditioning = host.infused.patch(residual, text="a photo of a ball")
    rows = report(residual=residual, customised=patched, conditioning=conditioning)[2]
    for metric in (FISHER, WASSERSTEIN, ROWS):
        assert rows[metric, "residual (ball)"]["mean"] == rows[metric, "customised (ball)"]["mean"]
    plain = report(customised=patched)[2]  # without its conditioning the patched model draws no concept
    assert plain[WASSERSTEIN, "customised (ball)"]["mean"] < 1e-4


def test_predictions_are_the_models_own(host):
    """Against the network called by hand, without guider or batches."""
    model, device = host.infused.model, host.infused.model.load_device
    fisher = sys.modules[f"{host.pack.__name__}.profusion.metrics.fisher"]
    prompts = ["a house", "a (street:1.3) at night"]
    contexts = [host.infused.encode(prompt) for prompt in prompts]
    generator = torch.Generator().manual_seed(0)
    latents = fisher.unit_latents(2, (4, 8, 8), 1, generator)
    noisy = fisher.noisy_latents(latents, 5, generator, model.get_model_object("model_sampling").sigmas)
    told = []
    with torch.inference_mode():
        found = host.evaluation.noise_predictions(model, contexts, noisy, told.append)
        for row, prompt in enumerate(noisy.prompts):
            sigma = noisy.sigma[row : row + 1]
            x = noisy.x[row : row + 1].to(device)
            context = contexts[prompt][0][0].to(device)
            denoised = model.model.apply_model(x, sigma.to(device), c_crossattn=context)
            torch.testing.assert_close(found[row], ((x - denoised) / sigma.to(device)).cpu()[0], atol=1e-4, rtol=1e-4)
    assert told == [4, 1, 4, 1]


def test_its_own_text_encoder_counts(host, report):
    other = tiny.clip()
    with torch.no_grad():
        other.cond_stage_model.clip_l.transformer.text_model.final_layer_norm.weight.mul_(1.5)
    rows = report(customised=host.infused.model, customised_clip=other)[2]
    assert rows[FISHER, "customised (ball)"]["mean"] > 0 and rows[WASSERSTEIN, "customised (ball)"]["mean"] > 0


def test_several_residuals_have_their_own_nouns(host, report):
    rows = report(
        residual=host.infused.residual(),
        residual_3=host.infused.residual(noun="cup", seed=6),
        class_prompt="a %noun% on grass",
        count=2,
    )[2]
    assert {subject for metric, subject in rows if metric == WASSERSTEIN} == {
        OTHER,
        "other seeds (cup)",
        "residual (ball)",
        "residual_3 (cup)",
    }


@pytest.mark.parametrize("weights", ["the same", "others"])
def test_a_residual_of_another_base_is_noted(host, report, weights, caplog):
    identity = sys.modules[f"{host.pack.__name__}.nodes.host.identity"]
    origin_of = sys.modules[f"{host.pack.__name__}.profusion.residual"].Origin
    model = host.infused.model
    told = replace(host.infused.residual(), origin=origin_of("base.ckpt", sample=identity.weights_sample(model)))
    if weights == "others":
        model = tiny.model()
        tiny.randomise(model.model.diffusion_model, seed=99)
    table, _, _, notes = report(model=model, residual=told)
    said = [note for note in notes if "was trained on base.ckpt" in note]
    assert len(said) == (weights == "others") == caplog.text.count("was trained on base.ckpt")
    assert all(note in table for note in said)


def test_the_same_seed_gives_the_same_report_and_another_one_does_not(host, report):
    changed = lora(host.infused.model)
    one, same, other = (report(customised=changed, seed=seed)[2] for seed in (5, 5, 6))
    assert one == same and one[FISHER, "customised (ball)"] != other[FISHER, "customised (ball)"]


def test_with_a_vae_the_pictures_are_shown(host, report):
    small = report(residual=host.infused.residual(), count=2)[1]
    large = report(residual=host.infused.residual(), count=2, vae=PooledVae())[1]
    assert large.shape[1] > small.shape[1] and torch.equal(large[:, -small.shape[1] :], small)


def test_progress_ends_at_its_total_and_cancel_stops_it(host, report):
    seen = []

    def report_it(done, total, _):
        seen.append((done, total))
        comfy.model_management.interrupt_current_processing(stop is not None and len(seen) == stop)

    on_report(report_it)
    stop = None
    report(residual=host.infused.residual(), customised=lora(host.infused.model))
    values = [value for value, _ in seen]
    assert values == sorted(values) and seen[-1][0] == seen[-1][1]
    seen.clear()
    stop = 4
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        report(residual=host.infused.residual())
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "connect a residual, or a customised model"),
        ({"count": 1, "residual": True}, "set the batch_size"),
        ({"prompts": " \n", "residual": True}, "prompts is empty"),
        ({"prompts": "a house\na ball at night", "residual": True}, "prompt 2, 'a ball at night', has the noun 'ball'"),
        ({"noun": " ", "customised": True}, "noun is empty"),
        ({"class_prompt": "a house", "residual": True}, "not a word of the prompt 'a house'"),
        ({"clip": None, "residual": True}, "clip is None"),
    ],
)
def test_bad_input_is_named(host, report, inputs, message):
    made = {"residual": host.infused.residual, "customised": host.infused.model.clone}
    inputs = {name: made[name]() if value is True else value for name, value in inputs.items()}
    with pytest.raises(ValueError, match=message):
        report(**inputs)


def test_a_model_that_overflows_is_named(host, report):
    with pytest.raises(ValueError, match="customised model's prediction 1 of 6 .*float32"):
        report(customised=lora(host.infused.model, float("inf")))
