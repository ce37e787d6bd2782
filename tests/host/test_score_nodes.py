"""Concept Scores in a real ComfyUI: the kernel's numbers through the host's own encoders, and what it refuses."""

import importlib
import json
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import comfy.model_management
import tiny
from reports import on_report

from profusion.toybox.drawing import SIZE


@pytest.fixture(scope="module")
def host(pack):
    """The node, Toybox as the host has it, and pictures of two of its concepts."""
    models = importlib.import_module(f"{pack.__name__}.nodes.host.toybox")
    drawn = importlib.import_module(f"{pack.__name__}.profusion.toybox.concepts").drawn_concept
    return types.SimpleNamespace(
        pack=pack,
        node=importlib.import_module(f"{pack.__name__}.nodes.scores").ConceptScores,
        clip=models.load_clip(),
        load_clip=models.load_clip,
        vision=models.load_clip_vision(),
        ball=drawn("teal and coral ball", 3, 1),
        other=drawn("teal and coral ball", 2, 2),
    )


@pytest.fixture
def scores(host):
    """Run the node as the host does, in inference mode: -> (markdown, chart, json's rows, notes)."""

    def run(**inputs):
        defaults = {
            "images": host.other.pictures,
            "references": host.ball.pictures,
            "prompt": "a photo of a ball",
            "clip": host.clip,
            "clip_vision": host.vision,
        }
        with torch.inference_mode():
            table, chart, text = host.node.execute(**{**defaults, **inputs}).args
        found = json.loads(text)
        return table, chart, {(row["metric"], row["subject"]): row for row in found["scores"]}, found["notes"]

    return run


def test_the_schema_is_frozen_and_explained(host):
    schema = host.node.GET_SCHEMA()
    assert schema.node_id == "ProFusion_ConceptScores"
    assert [f"{entry.id}:{entry.get_io_type()}" for entry in schema.inputs] == [
        "images:IMAGE",
        "references:IMAGE",
        "prompt:STRING",
        "clip:CLIP",
        "clip_vision:CLIP_VISION",
        "image_encoder:CLIP_VISION",
        "masks:MASK",
        "reference_masks:MASK",
    ]
    assert [output.io_type for output in schema.outputs] == ["STRING", "IMAGE", "STRING"]
    assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs]) and schema.description
    root = Path(host.pack.__file__).parent
    assert (root / "web" / "docs" / f"{schema.node_id}.md").is_file()
    ids = [node.GET_SCHEMA().node_id for node in host.pack.NODES]
    assert schema.node_id in ids and len(ids) == len(set(ids))


def test_the_hosts_encoders_give_the_kernels_numbers(host, scores):
    theirs = scores()[2]
    ours = scores(clip=None, clip_vision=None)[2]
    assert (
        set(theirs)
        == set(ours)
        == {("CLIP-T", "generated"), ("CLIP-I", "generated"), ("CLIP-I", "references among themselves")}
    )
    for key in ours:
        assert theirs[key]["mean"] == pytest.approx(ours[key]["mean"], abs=1e-4) and theirs[key]["mean"] > 0.3
        assert ours[key]["backbone"] == "Toybox's own pair" and f"{SIZE} pixels" in theirs[key]["backbone"]
    assert scores()[2] == theirs


def test_the_table_the_chart_and_a_prompt_for_each_picture(host, scores):
    table, chart, rows, notes = scores(prompt="a photo of a ball\n\na photo of a cup\n")
    assert table.count("\n") == 3 and "references among themselves" in table and not notes
    assert chart.ndim == 4 and chart.shape[-1] == 3 and chart.min() >= 0 and chart.max() <= 1 and chart.std() > 0.02
    assert rows["CLIP-T", "generated"]["mean"] < scores()[2]["CLIP-T", "generated"]["mean"]


def test_masks_compare_objects_and_backgrounds_apart(host, scores):
    rows = scores(masks=host.other.masks, reference_masks=host.ball.masks, image_encoder=host.vision)[2]
    assert {metric for metric, _ in rows} == {"CLIP-T", "CLIP-I", "CLIP-I, object", "CLIP-I, background"}
    assert rows["CLIP-I, object", "generated"]["mean"] != rows["CLIP-I", "generated"]["mean"]
    transparent = torch.cat([host.other.pictures, host.other.masks[..., None]], dim=-1)
    inside = host.other.pictures * host.other.masks[..., None] + 0.5 * (1 - host.other.masks[..., None])
    assert scores(images=transparent)[2] == scores(images=inside)[2]  # what is transparent is grey, and no background
    assert "both" in scores(masks=host.other.masks)[3][0]


def test_without_a_text_encoder_and_of_pictures_of_any_size(host, scores):
    rows = scores(clip=None, prompt="", images=torch.rand(2, 70, 130, 3))[2]
    assert {metric for metric, _ in rows} == {"CLIP-I"}


def test_a_text_encoder_without_its_projection_gives_no_clip_t(host, scores):
    """As SD 1.x checkpoints are: the host leaves whatever was in memory."""
    clip = host.load_clip()
    for value in (0.0, None):
        with torch.no_grad():
            weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
            weight.fill_(0.0) if value == 0.0 else weight.normal_(generator=torch.Generator().manual_seed(3))
        _, _, rows, notes = scores(clip=clip)
        assert "without its projection" in notes[0] and ("CLIP-T", "generated") not in rows


def test_encoders_without_a_name_here_and_of_sequences(host, scores):
    """SigLIP gives features of each patch; DINOv2 is not CLIP-I."""
    import comfy.image_encoders.dino2
    import comfy.ops

    config = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-6,
        "use_swiglu_ffn": False,
    }
    network = comfy.image_encoders.dino2.Dinov2Model(config, torch.float32, "cpu", comfy.ops.manual_cast)
    encoded = torch.randn(1, 5, 16)
    dino = types.SimpleNamespace(model=network, image_size=518, encode_image=lambda pictures: {"image_embeds": encoded})
    rows = scores(image_encoder=dino)[2]
    assert rows["DINO", "generated"]["mean"] == pytest.approx(1.0)
    assert rows["DINO", "generated"]["backbone"] == "Dinov2Model, 2 layers, 518 pixels"


def test_progress_is_told_and_cancel_stops_it(host, scores):
    seen = []

    def cancel(done, total, _):
        seen.append((done, total))
        comfy.model_management.interrupt_current_processing(len(seen) == 3)

    on_report(lambda done, total, _: seen.append((done, total)))
    scores()
    assert seen == [(done, 6) for done in range(1, 7)]
    seen.clear()
    on_report(cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        scores()
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": ""}, "0 prompts for 2 pictures"),
        ({"prompt": "a\nb\nc"}, "3 prompts for 2 pictures"),
        ({"images": torch.rand(1, 64, 64, 3), "clip_vision": None}, "connect clip_vision"),
        ({"references": torch.zeros(0, SIZE, SIZE, 3)}, "no pictures"),
        ({"images": torch.full((1, SIZE, SIZE, 3), float("nan"))}, "not numbers"),
        ({"masks": torch.ones(3, SIZE, SIZE)}, "3 masks for 2 pictures"),
    ],
)
def test_bad_input_is_named(scores, inputs, message):
    with pytest.raises(ValueError, match=message):
        scores(**inputs)


def test_encoders_that_do_not_belong_together_are_named(scores):
    with pytest.raises(ValueError, match=r"not trained together: .*\[64\] numbers.*of 128"):
        scores(clip=tiny.clip())
