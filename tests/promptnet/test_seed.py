"""A residual made of S*, and what it does to the noun's value."""

import pytest
import torch

from profusion.infusion import Layer, Placement, cross_attention_layers
from profusion.models.tokenizer import tokenize, words_to_ids
from profusion.promptnet.network import KNOTS
from profusion.promptnet.pseudo_word import encode, prompt_tokens
from profusion.promptnet.seed import seed_residual
from profusion.toybox.fused import FusedToybox
from profusion.toybox.pipeline import NETWORKS, WEIGHTS, Toybox, noun_rows

PROMPTS = ("a photo of a {}", "a {} on snow")


@pytest.fixture(scope="module")
def layers(small):
    return cross_attention_layers(dict(small.unet.named_parameters()))


def spoken(small, word):
    """Each prompt's context with S* (B, tokens, width), and the rows of S*."""
    tokens = word.shape[1]
    prompts = [prompt.format("S*") for prompt in PROMPTS]
    return [(encode(small.text, prompt, word), prompt_tokens(prompt, tokens)[1]) for prompt in prompts]


def plain(small, noun="cat"):
    prompts = [prompt.format(noun) for prompt in PROMPTS]
    return [(small.text(tokenize(prompt)), noun_rows(prompt, noun)) for prompt in prompts]


def word(count=1, tokens=1, seed=0):
    return torch.randn(count, tokens, 24, generator=torch.Generator().manual_seed(seed))


def test_a_word_that_is_the_noun_s_own_embedding_is_nothing_to_add(small, layers):
    own = small.text.text_model.embeddings.token_embedding.weight[words_to_ids("cat")][None]
    residual = seed_residual(spoken(small, own), plain(small), layers, "cat")
    assert residual.delta.shape == (len(layers), 1, 24) and not residual.delta.any()
    assert seed_residual(spoken(small, 2 * own), plain(small), layers, "cat").delta.any()


def test_the_noun_s_value_becomes_that_of_s_in_every_layer(small, layers):
    (with_word, *_), (with_noun, *_) = spoken(small, word()), plain(small)
    residual = seed_residual([with_word], [with_noun], layers, "cat")
    assert residual.noun == "cat" and residual.steps == 0 and residual.layers == tuple(layer.name for layer in layers)
    (context, rows), weights = with_noun, small.unet.state_dict()
    placement = Placement(residual.delta, residual.layers, rows)
    values = [name for name in weights if name.endswith("attn2.to_v.weight")]
    assert len(values) == len(layers)
    for name in values:
        (layer,) = cross_attention_layers({name: weights[name]})
        changed, before, theirs = (x @ weights[name].T for x in (placement.add_to(context, layer.name), context, with_word[0]))
        torch.testing.assert_close(changed[:, rows], theirs[:, with_word[1]], rtol=0, atol=1e-5)
        others = [row for row in range(77) if row not in rows]
        assert torch.equal(changed[:, others], before[:, others]) and not torch.allclose(changed[:, rows], before[:, rows])


def test_timesteps_prompts_and_rows_count_as_their_mean(small, layers):
    words, pair = word(3, 2), plain(small, "snow cat")
    assert [len(rows) for _, rows in pair] == [2, 2]
    residual = seed_residual(spoken(small, words), pair, layers, "snow cat")
    expected = torch.stack([
        context[row] - nouns[0, list(noun)].mean(dim=0)
        for (contexts, rows), (nouns, noun) in zip(spoken(small, words), pair, strict=True)
        for context in contexts
        for row in rows
    ])  # fmt: skip
    assert len(expected) == len(PROMPTS) * 3 * 2
    torch.testing.assert_close(residual.delta, expected.mean(dim=0).expand(len(layers), 1, 24), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_explained(small, layers):
    with pytest.raises(ValueError, match="no prompts"):
        seed_residual([], [], layers, "cat")
    with pytest.raises(ValueError, match="2 prompts with S\\* and 1 with the noun"):
        seed_residual(spoken(small, word()), plain(small)[:1], layers, "cat")
    with pytest.raises(ValueError, match="width 24 and layers that take 25"):
        seed_residual(spoken(small, word()), plain(small), [Layer("input.1.0", 25)], "cat")


@pytest.mark.skipif(
    not all((WEIGHTS / f"toybox_{name}.safetensors").is_file() for name in NETWORKS),
    reason="Toybox's weights are not there: train them with `python -m training.toybox`",
)
def test_toybox_s_seed_is_that_of_its_promptnet_s_words():
    from profusion.promptnet.toybox import new_promptnet

    toybox = Toybox.load()
    network = new_promptnet(toybox).eval().requires_grad_(False)
    with torch.no_grad():
        network.output.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    fused = FusedToybox(toybox, network)
    pictures = torch.rand(2, 96, 96, 3, generator=torch.Generator().manual_seed(2))
    seed = fused.seed(pictures, "cup")
    words = fused.words(pictures, torch.tensor(KNOTS))
    prompts = ("a photo of a {}", "a picture of a {}", "a {}")
    expected = [
        encode(toybox.text, prompt.format("S*"), words, holds_position=True)[:, prompt_tokens(prompt.format("S*"), words.shape[1])[1]].mean(dim=(0, 1))
        - toybox.context(prompt.format("cup"))[0, noun_rows(prompt.format("cup"), "cup")].mean(dim=0)
        for prompt in prompts
    ]
    expected = torch.stack(expected).mean(dim=0)
    assert seed.architecture == "Toybox" and expected.abs().max() > 0.1
    torch.testing.assert_close(seed.delta[0, 0], expected, rtol=0, atol=1e-5)
    assert torch.equal(seed.delta, seed.delta[:1].expand_as(seed.delta))
