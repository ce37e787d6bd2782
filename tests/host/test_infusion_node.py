"""ProFusion_InfusionAttentionPatch: its inputs, what it finds in prompts and models, and what it refuses."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="no ComfyUI: set COMFYUI_PATH to a checkout")

import tiny  # noqa: E402
from infused import PROMPT  # noqa: E402

KEY = "profusion_infusion"


def rows(conditioning):
    return [concept.placement.rows for concept in conditioning[0][1][KEY]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of a ball", (5,)),
        ("BALL", (1,)),
        ("a Ball, and so on", (2,)),
        ("a (ball:1.3) on grass", (2,)),
        ("a ((big) ball)", (3,)),
        ("a [ball] \\(round\\)", (3,)),
        ("a snowball and a ball", (5,)),
        ("the ball's shadow", (2,)),
        ("a ball or a ball", (2, 5)),
        ("word " * 80 + "ball", (77 + 6,)),
    ],
)
def test_the_noun_is_found_where_the_encoder_reads_it(infused, text, expected):
    _, conditioning = infused.patch(infused.residual(), text=text)
    assert rows(conditioning) == [expected]
    chunks = infused.clip.tokenize(text)["l"]
    (ball,) = [token for token, _ in infused.clip.tokenize("ball")["l"][0][1:2]]
    tokens = [token for chunk in chunks for token, _ in chunk]
    assert all(tokens[row] == ball for row in expected)


def test_a_noun_of_several_tokens_and_one_of_several_words(infused):
    _, conditioning = infused.patch(infused.residual(noun="axolotl"), text="an axolotl here")
    (found,) = rows(conditioning)
    assert len(found) > 1 and found == tuple(range(2, 2 + len(found)))
    _, conditioning = infused.patch(infused.residual(noun="Teddy Bear"), text="my teddy bear, not a bear")
    assert rows(conditioning) == [(2, 3)]


@pytest.mark.parametrize(
    ("occurrence", "expected"), [("first", (2,)), ("second", (5,)), ("last", (8,)), ("all", (2, 5, 8))]
)
def test_an_occurrence_is_chosen(infused, occurrence, expected):
    _, conditioning = infused.patch(infused.residual(), text="a ball or a ball or a ball", occurrence=occurrence)
    assert rows(conditioning) == [expected]


def test_two_concepts_of_one_noun(infused):
    text, residual = "a ball beside a ball", infused.residual()
    _, conditioning = infused.patch(residual, text=text, residual_2=infused.residual(seed=6, noun="Ball"))
    assert rows(conditioning) == [(2,), (5,)]
    _, conditioning = infused.patch(residual, text=text, residual_2=residual, occurrence="second", occurrence_2="first")
    assert rows(conditioning) == [(5,), (2,)]
    with pytest.raises(ValueError, match="residual_3: occurrence number 3 .* there are 2 of the noun 'ball'"):
        infused.patch(residual, text=text, residual_2=residual, residual_3=residual)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": "a photo of a cat"}, "noun 'ball', which is not a word of the prompt 'a photo of a cat'"),
        ({"text": "footballs, a ballroom"}, "not a word of the prompt 'footballs, a ballroom'"),
        ({"text": "two balls on grass"}, "of the prompt 'two balls on grass'. Write 'ball' where it has 'balls'"),
        ({"text": "a football"}, "Write 'ball' as a word of its own: it is only a part of 'football'"),
        ({"text": ""}, "the prompt is empty"),
        ({"text": " \n"}, "the prompt is empty"),
        (
            {"occurrence": "third"},
            "occurrence third .* there are 1 of the noun 'ball' in the prompt 'a photo of a ball",
        ),
        ({"start_percent": 0.8, "end_percent": 0.2}, "never be active"),
        ({"region": torch.zeros(1, 8, 8)}, "region is all black"),
    ],
)
def test_what_cannot_work_is_refused(infused, inputs, message):
    before = repr(infused.model.model_options)
    with pytest.raises(ValueError, match=message):
        infused.patch(infused.residual(), **inputs)
    assert repr(infused.model.model_options) == before


def test_a_missing_text_encoder_is_refused(infused):
    with pytest.raises(ValueError, match="no text encoder"):
        infused.node.execute(infused.model, None, PROMPT, infused.residual(), 1.0, 0.0, 1.0, "auto", "own trajectory")


def test_a_residual_of_another_architecture_is_refused(infused, pack):
    names = tuple(f"input.{index}.0" for index in range(10))
    other = pack.profusion.residual.Residual(torch.zeros(10, 1, 128), "ball", names, "Toybox")
    with pytest.raises(pack.profusion.residual.ResidualError, match="Toybox.*UNet with 7 cross-attentions of 64"):
        infused.patch(other)


def test_a_text_encoder_of_another_width_is_refused(infused, pack):
    model = tiny.model(context_dim=32)
    layers = pack.nodes.host.families.model_layers(model)
    delta, names = torch.zeros(len(layers), 1, 32), tuple(layer.name for layer in layers)
    residual = pack.profusion.residual.Residual(delta, "ball", names, "other")
    with pytest.raises(ValueError, match="width 64 and the model takes 32"):
        infused.patch(residual, model)


def test_a_conditioning_for_another_architecture_is_refused_when_sampled(infused, pack):
    from infused import Infused

    other = Infused(
        pack, tiny.model(num_res_blocks=[2, 1], transformer_depth=[1, 1, 1], transformer_depth_output=[1] * 5)
    )
    model, _ = infused.patch(infused.residual())
    _, positive = other.patch(other.residual())
    with pytest.raises(ValueError, match="residual has 9 layers.*model has 7: their architectures differ"):
        infused.run(model, positive)
    assert torch.equal(infused.run(infused.model, positive), infused.run(infused.model, infused.positive))


def flux():
    parameters = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 8,
        "context_in_dim": 8,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [4, 6, 6],
        "theta": 100,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": True,
    }
    import comfy.ldm.flux.model

    if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:  # newer hosts will have it
        parameters["txt_ids_dims"] = []
    return comfy_models().Flux(parameters)


def sd3():
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 8, "out_features": 64}}
    parameters = {
        "in_channels": 16,
        "patch_size": 2,
        "out_channels": 16,
        "depth": 1,
        "input_size": None,
        "adm_in_channels": 8,
        "context_embedder_config": embedder,
        "num_patches": 36,
        "pos_embed_max_size": 6,
        "pos_embed_scaling_factor": None,
    }
    return comfy_models().SD3(parameters)


def comfy_models():
    import comfy.supported_models

    return comfy.supported_models


def patcher(config):
    import comfy.model_patcher

    config.set_inference_dtype(torch.float32, None)
    device = torch.device("meta")
    return comfy.model_patcher.ModelPatcher(config.get_model({}, "", device), load_device=device, offload_device=device)


@pytest.mark.parametrize("config", [flux, sd3])
def test_a_residual_of_a_unet_is_refused_on_a_transformer_by_name(infused, config):
    with pytest.raises(ValueError, match="trained on UNet with .* but the model is transformer with [0-9]+ joint att"):
        infused.patch(infused.residual(), patcher(config()))


@pytest.mark.parametrize(
    ("config", "host_class", "count", "width"),
    [("SD15", "SD15", 16, 768), ("SD21", "SD20", 16, 1024), ("SDXL", "SDXL", 70, 2048)],
)
def test_real_models_have_their_layers(pack, config, host_class, count, width):
    """Built by the host, without memory, as it would from a checkpoint's tensors."""
    import comfy.model_detection

    from profusion.models import configs
    from profusion.models.unet import UNet

    with torch.device("meta"):
        state = UNet(getattr(configs, config)).state_dict()
    detected = comfy.model_detection.model_config_from_unet(state, "")
    assert type(detected).__name__ == host_class
    layers = pack.nodes.host.families.model_layers(patcher(detected))
    assert len(layers) == count and {layer.context_dim for layer in layers} == {width}


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float16, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e5m2, torch.float32),
    ],
    ids=str,
)
def test_models_of_other_dtypes_are_exact(pack, dtype, compute):
    from infused import Infused

    Infused(pack, tiny.model(dtype, compute)).assert_node_exact(steps=2)


def test_a_conditioning_of_another_text_is_refused(infused):
    for other in ("dogs run on a wide green field", "a photo of a ball on grass, " * 12):
        with pytest.raises(ValueError, match="not of the prompt in text, 'a photo of a ball on grass'"):
            infused.patch(infused.residual(), conditioning=infused.encode(other))
    longer = PROMPT + ", and more words than one chunk holds" * 12
    with pytest.raises(ValueError, match="has 77 rows, and the text makes 154"):
        infused.patch(infused.residual(), text=longer, conditioning=infused.encode(PROMPT))


def scaled(conditioning, by):
    return [[context * by, extras] for context, extras in conditioning]


@pytest.mark.parametrize("by", [1.05, 0.2, 40.0, "each row"])
def test_a_conditioning_of_the_same_text_is_taken_however_scaled(infused, generator, by):
    by = 0.5 + torch.rand(1, 77, 1, generator=generator) if by == "each row" else by
    own = scaled(infused.positive, by)
    _, placed = infused.patch(infused.residual(), conditioning=own)
    assert torch.equal(placed[0][0], own[0][0]) and "profusion_infusion" in placed[0][1]


@pytest.mark.parametrize("layer", [-1, -2])
def test_a_conditioning_of_the_same_text_is_taken_from_any_of_the_last_layers(infused, layer):
    skipping = infused.clip.clone()
    skipping.clip_layer(layer)
    own = tiny.encode(skipping, PROMPT)
    assert torch.equal(own[0][0], infused.positive[0][0]) == (layer == -1)
    _, placed = infused.patch(infused.residual(), conditioning=own)
    assert "profusion_infusion" in placed[0][1]
    with pytest.raises(ValueError, match="not of the prompt in text"):
        infused.patch(infused.residual(), conditioning=tiny.encode(skipping, f"one {PROMPT}"))
    assert infused.clip.layer_idx is None


@pytest.mark.parametrize("change", ["turned", "zeroed", "another word", "words in another order", "one more"])
def test_a_conditioning_of_as_many_rows_that_may_be_of_another_text_is_refused(infused, change, generator):
    """Also in long texts, of which most stays."""
    filler = "a very large field of grass under a wide sky, " * 3
    text = f"{filler}a photo of a ball and a star"
    own = infused.encode(text)
    other = {
        "turned": lambda: scaled(own, -1),
        "zeroed": lambda: scaled(own, 0),
        "another word": lambda: infused.encode(text.replace("ball", "cup")),
        "words in another order": lambda: infused.encode(f"{filler}a photo of a star and a ball"),
        "one more": lambda: infused.encode(f"the {text}"),
    }[change]()
    assert other[0][0].shape == own[0][0].shape
    with pytest.raises(ValueError, match="may stand elsewhere in it: it is encoded otherwise than this clip"):
        infused.patch(infused.residual(), text=text, conditioning=other)


def test_a_concept_is_placed_in_the_entry_that_is_of_the_text(infused):
    """As Conditioning (Combine) leaves several."""
    both = [*infused.encode("a star at night"), *infused.encode(PROMPT)]
    _, placed = infused.patch(infused.residual(), conditioning=both)
    assert ["profusion_infusion" in extras for _, extras in placed] == [False, True]
    assert all(torch.equal(one[0], other[0]) for one, other in zip(placed, both, strict=True))


@pytest.mark.parametrize("noun", ["", " "])
def test_a_noun_without_a_word_is_refused_by_name(infused, pack, noun):
    prompt = sys.modules[f"{pack.__name__}.profusion.prompt"]
    with pytest.raises(prompt.NounError, match="noun"):
        pack.nodes.host.placing.noun_spans(infused.clip, "a photo of a cat", noun)


def test_the_schema_is_frozen(infused):
    """Saved workflows hold widget values by position: append only."""
    concept = ["residual{}", "strength{}", "occurrence{}", "region{}"]
    schema = infused.node.define_schema()
    assert schema.node_id == "ProFusion_InfusionAttentionPatch"
    assert [entry.id for entry in schema.inputs] == [
        "model",
        "clip",
        "text",
        "residual",
        "strength",
        "start_percent",
        "end_percent",
        "occurrence",
        "stream",
        "region",
        *[name.format(suffix) for suffix in ("_2", "_3", "_4") for name in concept],
        "conditioning",
        "background",
        "concepts",
        "every",
        "lock",
    ]
    assert [output.io_type for output in schema.outputs] == ["MODEL", "CONDITIONING"]
    assert [entry.id for entry in schema.inputs if not entry.optional] == [entry.id for entry in schema.inputs][:9]
    assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs])
    assert all(output.id is None for output in schema.outputs)


def test_the_help_page_names_every_input(infused, pack):
    schema = infused.node.define_schema()
    page = (Path(pack.__file__).parent / "web" / "docs" / f"{schema.node_id}.md").read_text()
    assert all(f"`{entry.id}`" in page for entry in schema.inputs)
