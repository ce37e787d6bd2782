"""Attention Probe: what a noun has of each layer's attention, and the plain picture, as it would be without."""

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="ComfyUI was not found: set COMFYUI_PATH")

import tiny  # noqa: E402
import tiny_texts  # noqa: E402
import tiny_transformers  # noqa: E402

TEXT = "a photo of a cat on grass"
LEFT = torch.cat([torch.ones(1, 64, 32), torch.zeros(1, 64, 32)], dim=2)


@pytest.fixture(scope="module")
def probe(pack):
    node = pack.nodes.probe.AttentionProbe
    inputs = {entry.id: getattr(entry, "default", None) for entry in node.GET_SCHEMA().inputs}
    few = {"text": TEXT, "noun": "cat", "seed": 7, "steps": 2, "cfg": 3.0, "negative": None, "object": None}

    def run(model, clip, latent, **given):
        shown = []
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(pack.nodes.probe, "show", lambda cls, text: shown.append(text))
            made = {"model": model, "clip": clip, "latent_image": {"samples": latent}}
            said, drawn, attention = node.execute(**{**inputs, **few, **made, **given}).args
        assert shown == [said]
        return said, drawn["samples"], attention

    return run


def rows(said):
    """The table's (layer, inside, outside)."""
    return [(name, float(inside), float(outside)) for name, inside, outside in map(str.split, said.splitlines()[2:])]


@pytest.mark.parametrize("family", ["flux", "zimage", "wan", "sd3"])
def test_it_measures_transformers_and_draws_the_plain_picture(pack, probe, family):
    model, clip, latent = tiny_transformers.shared(family), tiny_texts.clip(family), tiny_transformers.latent(family)
    said, drawn, attention = probe(model, clip, latent, object=LEFT)
    encode = pack.nodes.host.placing.encode_prompt
    plain = tiny_transformers.sample(family, model, encode(clip, TEXT, ()), encode(clip, "", ()), steps=2)
    assert torch.equal(drawn, plain)
    layers = pack.nodes.host.families.acting_on(model).layers
    assert [name for name, *_ in rows(said)] == [layer.name for layer in layers]
    assert all(0 < share < 100 for _, *shares in rows(said) for share in shares)
    assert attention.shape == (1, *latent.shape[-2:]) and float(attention.max()) == 1


def test_shares_are_those_of_the_maps_that_a_softmax_gives(pack, probe):
    """On a UNet whose keys are all alike each token has the same share, whatever the picture is."""
    model, clip = tiny.model(), tiny.clip()
    with torch.no_grad():
        for name, weight in model.model.diffusion_model.named_parameters():
            if name.endswith("attn2.to_k.weight"):
                weight.zero_()
    said, _, _ = probe(model, clip, torch.zeros(1, 4, 8, 8), object=LEFT)
    expected = round(100 / 77, 2)
    assert [shares for _, *shares in rows(said)] == [[expected, expected]] * len(rows(said))
    assert "That is much alike: the model hardly tells by this noun" in said


def test_the_object_may_be_told(probe):
    model, clip, latent = tiny.model(), tiny.clip(), torch.zeros(1, 4, 8, 8)
    found, told, other = (probe(model, clip, latent, object=one)[0] for one in (None, LEFT, 1 - LEFT))
    assert found != told
    assert [(name, outside, inside) for name, inside, outside in rows(told)] == rows(other)


def test_an_object_that_is_nowhere_is_refused(probe):
    with pytest.raises(ValueError, match="object is all black: make it white where the object is"):
        probe(tiny.model(), tiny.clip(), torch.zeros(1, 4, 8, 8), object=torch.zeros(1, 64, 64))


def test_a_noun_that_is_not_there_and_a_model_with_streams(infused, probe):
    """Infusion on the model is left out: the probe is of the plain one."""
    with pytest.raises(ValueError, match="noun is of the noun 'dog', which is not a word of the prompt"):
        probe(infused.model, infused.clip, torch.zeros(1, 4, 8, 8), noun="dog")
    patched, _ = infused.patch(infused.residual())
    drawn = [probe(model, infused.clip, torch.zeros(1, 4, 8, 8))[1] for model in (infused.model, patched)]
    assert torch.equal(*drawn)
