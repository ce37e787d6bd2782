"""Fusion Sampling on today's flow models: nothing changes where nothing is asked for, and the rest is sensible."""

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="ComfyUI was not found: set COMFYUI_PATH")

import tiny_transformers  # noqa: E402

FAMILIES = [family for family in tiny_transformers.FAMILIES if family != "pixart"]


@pytest.fixture(scope="module")
def draw(pack):
    """The node as it comes, but for what is given; its latent and what it said."""
    node = pack.nodes.fusion.FusionKSampler
    inputs = {entry.id: getattr(entry, "default", None) for entry in node.GET_SCHEMA().inputs}
    few = {"seed": 7, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "text": None}

    def run(family, model=None, batch=1, text=None, **given):
        positive, negative = (tiny_transformers.conditioning(family, seed=seed) for seed in (1, 2))
        model = tiny_transformers.shared(family) if model is None else model
        made = {"model": model, "positive": positive, "negative": negative, "text": text}
        made["latent_image"] = {"samples": tiny_transformers.latent(family, batch)}
        said = []
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(pack.nodes.fusion, "show", lambda cls, message: said.append(message))
            output = node.execute(**{**inputs, **few, **made, **given})
        return output.args[0]["samples"], said[0]

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_without_fusion_steps_it_is_ksampler(draw, family):
    model = tiny_transformers.shared(family)
    positive, negative = (tiny_transformers.conditioning(family, seed=seed) for seed in (1, 2))
    for sampler, cfg in (("euler", 3.0), ("dpmpp_2m", 1.0), ("euler_ancestral", 3.0)):
        plain = tiny_transformers.sample(family, model, positive, negative, sampler=sampler, cfg=cfg, steps=4)
        drawn, said = draw(family, fusion_steps=0, sampler_name=sampler, cfg=cfg)
        assert torch.equal(drawn, plain), sampler
        rows = 1 if cfg == 1 else 2
        assert said == f"{rows:.2f} evaluations a step and picture (KSampler: {rows})"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "flux2"])  # whose prompts are long
def test_fusion_draws_a_picture_and_a_text_of_any_length(draw, family):
    """Of several pictures each is what it is, and the stage does something."""
    text = tiny_transformers.conditioning(family, rows=40, seed=4)
    plain, _ = draw(family, text=text, fusion_steps=0, batch=2)
    drawn, _ = draw(family, text=text, fusion_end=0.9, batch=2)
    assert drawn.isfinite().all() and not torch.equal(drawn, plain)
    assert torch.equal(draw(family, text=text, fusion_end=0.9, batch=2)[0], drawn)


def test_a_model_with_its_guidance_built_in_has_no_negative(draw):
    """At cfg 1 none is evaluated, and the node says where one is all the same."""
    model, rows = tiny_transformers.shared("flux").clone(), []

    def count(apply_model, arguments):
        rows.append(len(arguments["input"]))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(count)
    _, said = draw("flux", model, cfg=1.0, fusion_cfg=1.0, fusion_end=0.9)
    assert set(rows) == {1} and said == f"{len(rows) / 4:.2f} evaluations a step and picture (KSampler: 1)"
    rows.clear()
    _, said = draw("flux", model, cfg=1.0, fusion_end=0.9)
    assert set(rows) == {1, 2} and "guided away from the negative, by fusion_cfg 3. A model with its guid" in said


def test_few_steps_have_no_stage_in_pure_noise_and_the_node_says_so(draw):
    """The level at which all is noise has nothing to fuse: that is KSampler's picture, and not another seed's."""
    drawn, said = draw("flux", fusion_end=0.05)
    assert torch.equal(drawn, draw("flux", fusion_steps=0)[0])
    assert "There was no fusion stage: so few steps have no noise level between" in said
    assert "no fusion stage" not in draw("flux", fusion_steps=0)[1]


def test_s_on_a_model_that_no_promptnet_is_for_is_refused_by_name(draw, pack):
    word = [[torch.zeros(1, 8, tiny_transformers.TEXT), {pack.nodes.host.words.WORD: object()}]]
    for family, name in (("flux", "Flux.1"), ("cosmos2", "Cosmos-Predict2"), ("pixart", "it")):
        with pytest.raises(
            ValueError, match=f"there is no PromptNet for {name}, since one looks at a picture with a UN"
        ):
            draw(family, positive=word)
