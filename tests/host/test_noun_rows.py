"""A noun's rows in the context of today's models, as the host's own tokenizers and text encoders make it."""

import re
import types

import pytest
import torch

pytest.importorskip("comfy.samplers", reason="ComfyUI was not found: set COMFYUI_PATH")

import comfy.conds  # noqa: E402
import comfy.sampler_helpers  # noqa: E402
import comfy.samplers  # noqa: E402
import tiny_texts  # noqa: E402
import tiny_transformers  # noqa: E402

FAMILIES = [*tiny_texts.FAMILIES]
TEXT = "Cat photo, a cat on grass, snowcat, (cat:1.2)"


@pytest.fixture(scope="module")
def host(pack):
    return pack.nodes.host


@pytest.fixture(scope="module")
def kernel(pack):
    return pack.profusion


def texts_at(host, clip, encoder, spans, context):
    """What the vocabulary has for the tokens at these rows, which are the rows' first numbers."""
    vocabulary = host.placing.tokenizer_of(clip, encoder).inv_vocab
    pieces = ["".join(vocabulary[int(context[0, row, 0])] for row in span) for span in spans]
    return [re.sub("[▁Ġ]", " ", text).removesuffix("</w>").strip().lower() for text in pieces]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("anima", "sd3")])
def test_the_rows_are_those_of_the_nouns_own_tokens(host, family):
    """At its start, within the text, between brackets, and not in a longer word."""
    clip = tiny_texts.clip(family)
    context = host.placing.encode_prompt(clip, TEXT, ())[0][0]
    spans = host.placing.noun_spans(clip, TEXT, "cat")
    encoder = {"sd3 without T5": "l"}.get(family) or [*host.placing.read_by_encoders(clip, TEXT)][-1]
    assert texts_at(host, clip, encoder, spans, context) == ["cat"] * 3
    assert all(max(one) < min(following) for one, following in zip(spans, spans[1:], strict=False))


def test_in_sd3_a_noun_stands_twice(host):
    clip = tiny_texts.clip("sd3")
    context = host.placing.encode_prompt(clip, TEXT, ())[0][0]
    spans = host.placing.noun_spans(clip, TEXT, "cat")
    assert context.shape[1] == 154 and [len(span) for span in spans] == [2, 2, 2]
    for part, encoder in enumerate(("l", "t5xxl")):
        assert texts_at(host, clip, encoder, [span[part : part + 1] for span in spans], context) == ["cat"] * 3


def test_animas_rows_are_those_that_its_adapter_makes(host):
    """One of each of T5's tokens, whatever rows of the language model there are."""
    clip = tiny_texts.clip("anima")
    _, extras = host.placing.encode_prompt(clip, TEXT, ())[0]
    spans = host.placing.noun_spans(clip, TEXT, "cat")
    pieces = host.placing.tokenizer_of(clip, "t5xxl").inv_vocab
    assert [[pieces[int(extras["t5xxl_ids"][row])] for row in span] for span in spans] == [["▁Cat"], ["▁cat"], ["▁cat"]]


def test_a_template_has_no_nouns(host):
    text = "a user of a background"
    for family, noun in (("zimage", "user"), ("qwen", "background"), ("qwen", "user")):
        clip = tiny_texts.clip(family)
        context = host.placing.encode_prompt(clip, text, ())[0][0]
        (span,) = host.placing.noun_spans(clip, text, noun)
        encoder = clip.cond_stage_model.clip
        assert texts_at(host, clip, encoder, [span], context) == [noun]
        assert not host.placing.noun_spans(clip, text, "assistant")


@pytest.mark.parametrize(
    ("family", "text", "noun", "written"),
    [
        ("flux", "a Fire hydrant at night", "fire hydrant", "fire hydrant"),
        ("qwen", "a fire hydrant at night", "Fire Hydrant", "fire hydrant"),
        ("qwen", "一只猫在草地上", "猫", "çĮ«"),  # the bytes of 猫
    ],
)
def test_a_noun_may_have_several_words_and_other_letters(host, family, text, noun, written):
    clip = tiny_texts.clip(family)
    context = host.placing.encode_prompt(clip, text, ())[0][0]
    encoder = {"flux": "t5xxl", "qwen": "qwen25_7b"}[family]
    assert texts_at(host, clip, encoder, host.placing.noun_spans(clip, text, noun), context) == [written.lower()]


def test_errors_say_what_is_wrong_with_a_noun(host):
    spans = host.placing.noun_spans
    flux = tiny_texts.clip("flux")
    with pytest.raises(ValueError, match="noun='猫' has no word in it that the text encoder 't5xxl' reads: give one"):
        spans(flux, "一只猫在草地上", "猫")
    with pytest.raises(ValueError, match="noun='embedding:cat' is an embedding, and Infusion acts at a word"):
        spans(flux, "a embedding:cat", "embedding:cat")
    assert spans(flux, "a snowcat", "cat") == [] == spans(tiny_texts.clip("qwen"), "a snowcat", "(cat)")


def test_a_prompt_is_encoded_once(host, kernel, monkeypatch):
    clip, calls, layer = tiny_texts.clip("flux"), [], kernel.infusion.Layer("any", tiny_transformers.TEXT)
    encode = clip.encode_from_tokens_scheduled
    monkeypatch.setattr(clip, "encode_from_tokens_scheduled", lambda tokens: calls.append(tokens) or encode(tokens))
    conditionings, rows = host.placing.encode_training_prompts(clip, "cat", [layer])
    assert len(calls) == len(conditionings) == len(rows)


def test_a_conditioning_with_rows_of_zeros_is_known_again(host):
    """Padding is zero in some: it has no direction, and is what it was."""
    clip = tiny_texts.clip("cosmos2")
    ((context, extras),) = host.placing.encode_prompt(clip, TEXT, ())
    context = context.clone()
    context[:, 100:] = 0
    known = host.placing.placed_in(clip, TEXT, [[2 * context, {}]], (), lambda: [[context, extras]])
    assert torch.equal(known[0][0], 2 * context)
    context = torch.cat([context[:, :99], torch.zeros_like(context[:, 99:])], 1)
    with pytest.raises(ValueError, match="nouns may stand elsewhere"):
        host.placing.placed_in(clip, TEXT, [[context, {}]], (), lambda: host.placing.encode_prompt(clip, TEXT, ()))


@torch.inference_mode()
def conds_in_sampling(family, positive, negative):
    """The conds of a run, as the host makes them of CONDITIONINGs before it samples, its model and its latent."""
    model, latent = tiny_transformers.shared(family).model, tiny_transformers.latent(family)
    groups = {"positive": positive, "negative": negative}
    groups = {name: comfy.sampler_helpers.convert_cond(group) for name, group in groups.items()}
    return model, latent, comfy.samplers.process_conds(model, latent, groups, torch.device("cpu"), latent, seed=0)


@pytest.mark.parametrize(("family", "first"), [("sd3", 0), ("cosmos2", 0), ("anima", 0), ("flux2", 488)])
@torch.inference_mode()
def test_a_concept_acts_where_the_model_has_its_text(host, kernel, family, first):
    """Also where that attends to other rows than its conditioning has; not where the host put other text under it."""
    tiny_transformers.shared(family)
    positive, negative = (tiny_transformers.conditioning(family, seed=seed) for seed in (1, 2))
    if family == "anima":
        for (_, extras), ids in zip((*positive, *negative), ([3, 9, 5, 1], [3, 8, 5, 1]), strict=True):
            extras |= {"t5xxl_ids": torch.tensor(ids), "t5xxl_weights": torch.ones(4)}
    positive[0][1]["area"] = (8, 8, 0, 0)
    model, latent, conds = conds_in_sampling(family, positive, negative)
    rows = [[host.streams._first_row(cond, model, latent) for cond in conds[name]] for name in ("positive", "negative")]
    texts = [[cond["cross_attn"][0, 0, 0].item() for cond in conds[name]] for name in ("positive", "negative")]
    own, other = positive[0][0][0, 0, 0].item(), negative[0][0][0, 0, 0].item()
    assert texts == [[own], [other, own]]  # the host has copied the area with its text into the negative
    assert rows == [[first], [first, None]]
    placement = kernel.infusion.Placement(torch.ones(1, 1, tiny_transformers.TEXT), ("any",), (2,))
    concept, cond = kernel.infusion.PlacedConcept(placement, 0.0, 1.0), conds["positive"][0]
    placed = host.streams._resolve(concept, cond, first, model, latent, ("any",))
    attended = cond["model_conds"]["c_crossattn"].cond
    assert (placed.rows, placed.context_length) == ((first + 2,), attended.shape[1])
    zeroed = {**cond, "cross_attn": torch.zeros_like(cond["cross_attn"])}
    assert host.streams._resolve(concept, zeroed, first, model, latent, ("any",)) is None


def test_another_text_is_told_in_half_precision_however_large_its_numbers_are(host):
    own, other = 1000 * torch.randn(2, 1, 64, 256, generator=torch.Generator().manual_seed(1)).half()
    entries = [comfy.conds.CONDRegular(one) for one in (own + 0, other)]
    model = types.SimpleNamespace(extra_conds=lambda **_: {"c_crossattn": entries[0]})
    x = torch.zeros(1, 4, 8, 8)
    conds = [{"cross_attn": 2 * own, "model_conds": {"c_crossattn": entry}} for entry in entries]
    assert [host.streams._first_row(cond, model, x) for cond in conds] == [0, None]


@pytest.mark.parametrize("family", ["flux", "sd3", "zimage", "anima", "wan"])
def test_the_node_draws_at_the_noun_of_the_models_own_tokenizer(host, kernel, pack, family):
    """From text to picture: without a residual the plain picture to the bit, with one another."""
    model, clip = tiny_transformers.shared(family), tiny_texts.clip(family)
    layers = host.families.acting_on(model).layers
    names, told = [layer.name for layer in layers], {"network": layers[0].network, "adds_to": layers[0].adds_to}
    delta = torch.randn(len(layers), 1, layers[0].context_dim, generator=torch.Generator().manual_seed(5))
    plain, negative = (host.placing.encode_prompt(clip, text, ()) for text in (TEXT, ""))

    def drawn(size, noun="cat"):
        residual = kernel.residual.Residual(size * delta, noun, names, "a transformer", **told)
        common = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "occurrence": "second"}
        node = pack.nodes.infusion.InfusionAttentionPatch
        patched, positive = node.execute(model, clip, TEXT, residual, stream="own trajectory", **common).args
        return tiny_transformers.sample(family, patched, positive, negative, steps=2)

    expected = tiny_transformers.sample(family, model, plain, negative, steps=2)
    assert torch.equal(drawn(0.0), expected)
    customised = drawn(3.0)
    assert customised.isfinite().all() and not torch.equal(customised, expected)
    with pytest.raises(ValueError, match="'dog', which is not a word of the prompt"):
        drawn(1.0, "dog")
