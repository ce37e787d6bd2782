"""A residual made of S*: what it is the least squares of, and that with it a noun is drawn
more as the word would be."""

import pytest
import torch
from torch.nn import functional as F

from profusion.infusion import Placement, cross_attention_layers, customised_patches, foundation_patches
from profusion.loop import TrainingError
from profusion.losses import masked_noise_error
from profusion.models.unet import CrossAttention
from profusion.promptnet import seed
from profusion.promptnet.seed import PROMPT_PAIRS, ResidualSeed, attention_modules, demand, least_squares
from profusion.residual.training import Reference
from profusion.toybox.pipeline import CELLS, NETWORKS, WEIGHTS, Toybox, noun_rows

ROWS = (2, 3)


@pytest.fixture
def attention():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return CrossAttention(48, 24, 4).requires_grad_(False)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def straight(attention, n, context):
    """Maps (N, h, T, L) and what each head reads (N, h, T, d), written down by hand."""

    def cut(x):
        return x.view(*x.shape[:2], attention.heads, -1).transpose(1, 2)

    query, key, value = cut(attention.to_q(n)), cut(attention.to_k(context)), cut(attention.to_v(context))
    shares = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)
    return shares, shares @ value


def test_the_residual_is_the_least_squares_over_all_cells_and_heads(attention, monkeypatch):
    monkeypatch.setattr(seed, "RIDGE", 1e-9)
    n, noun, word = drawn(3, 10, 48), drawn(1, 7, 24, seed=1).expand(3, -1, -1), drawn(1, 7, 24, seed=2)
    mask = torch.rand(3, 10, 1, generator=torch.Generator().manual_seed(3))
    shares, plain = straight(attention, n, noun)
    _, spoken = straight(attention, n, word.expand(3, -1, -1))
    share = shares[..., list(ROWS)].sum(dim=-1, keepdim=True)  # (N, h, T, 1)
    to_value = attention.to_v.weight.view(4, -1, 24)
    left = (share[..., None] * to_value[:, None]).reshape(-1, 24)  # a row for each number that the noun adds to
    right = (mask[:, None] * (spoken - plain)).reshape(-1, 1)
    expected = torch.linalg.lstsq(left, right).solution[:, 0]
    found = least_squares(to_value, *demand(attention, n, noun, ROWS, word, mask))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert expected.abs().max() > 0.1


def test_a_value_that_alone_differs_is_found_again(attention, monkeypatch):
    """Where the keys do not see what the word has more than the noun, the residual is just that."""
    monkeypatch.setattr(seed, "RIDGE", 1e-9)
    attention.to_k.weight[:, 12:] = 0
    noun, more = drawn(1, 7, 24, seed=1), F.pad(drawn(12, seed=2), (12, 0))
    word = noun.clone()
    word[:, ROWS] += more
    mask = torch.ones(1, 10, 1)
    found = demand(attention, drawn(1, 10, 48), noun, ROWS, word, mask)
    torch.testing.assert_close(least_squares(attention.to_v.weight.view(4, -1, 24), *found), more, rtol=0, atol=1e-3)
    outside = demand(attention, drawn(1, 10, 48), noun, ROWS, word, 0 * mask)
    assert not least_squares(attention.to_v.weight.view(4, -1, 24), *outside).any()


def test_a_noun_that_nobody_looks_at_asks_for_nothing():
    assert torch.equal(least_squares(drawn(4, 4, 24), torch.zeros(4), torch.zeros(4, 4)), torch.zeros(24))


def seeding(small, words, batches=2, **inputs):
    """On the small UNet, with two prompts of random contexts."""
    contexts = drawn(2, 11, 24, seed=1)

    def predict(x, sigma, prompt, patches):
        options = {"patches": patches, "cond_or_uncond": [0]}
        scaled = x / (sigma.view(-1, 1, 1, 1) ** 2 + 1).sqrt()
        return small.unet(scaled, 500 + 0 * sigma, contexts[prompt].expand(len(x), -1, -1), transformer_options=options)

    references = [Reference(drawn(4, 8, 8, seed=index), torch.ones(8, 8)) for index in range(2)]
    words = contexts.split(1) if words is None else words
    arguments = {"references": references, "prompt_rows": (ROWS, (4,)), "words": words, "noun": "cat", **inputs}
    layers = cross_attention_layers(dict(small.unet.named_parameters()))
    return ResidualSeed(predict, modules=attention_modules(small.unet), layers=layers, batches=batches, **arguments)


def done(run):
    assert list(run.steps()) == list(range(1, run.batches + 1))
    return run.residual()


def test_a_word_that_is_the_noun_leaves_nothing_to_add(small):
    residual = done(seeding(small, None))
    assert residual.delta.abs().max() < 1e-4 and residual.steps == 0 and residual.noun == "cat"
    words = drawn(2, 11, 24, seed=9).split(1)
    other = done(seeding(small, words))
    assert (other.delta != 0).any(dim=2).all() and other.delta.abs().max() > 0.1
    assert torch.equal(done(seeding(small, words)).delta, other.delta)


def test_every_layer_has_its_module(small):
    layers = cross_attention_layers(dict(small.unet.named_parameters()))
    modules = attention_modules(small.unet)
    assert set(modules) == {layer.name for layer in layers} and len(set(map(id, modules.values()))) == len(layers)


def test_what_does_not_fit_is_explained(small):
    with pytest.raises(TrainingError, match="no pictures"):
        seeding(small, None, references=[])
    with pytest.raises(ValueError, match="1 prompts with S\\* and 2 with the noun"):
        seeding(small, drawn(1, 11, 24).split(1))
    with pytest.raises(TrainingError, match="not finished"):
        seeding(small, None).residual()
    run = seeding(small, (torch.full((2, 11, 24), torch.nan)).split(1))
    with pytest.raises(TrainingError, match="not finite"):
        done(run)


@pytest.mark.skipif(
    not all((WEIGHTS / f"toybox_{name}.safetensors").is_file() for name in NETWORKS),
    reason="Toybox's weights are not there: train them with `python -m training.toybox`",
)
def test_with_a_residual_made_of_another_word_the_noun_is_drawn_more_like_it():
    """On noise and in places that it was not made from: the prediction of "cat" comes nearer to that of "ladybird"."""
    toybox = Toybox.load()
    nouns, others = (
        [prompt.format("cat") for prompt, _ in PROMPT_PAIRS],
        toybox.context([prompt.format("ladybird") for prompt, _ in PROMPT_PAIRS]),
    )
    rows, predict = [noun_rows(prompt, "cat") for prompt in nouns], toybox.noise_predictor(nouns)
    latent, noise = (drawn(4, CELLS, CELLS, seed=number) for number in (1, 2))
    layers = cross_attention_layers(dict(toybox.unet.named_parameters()))
    run = ResidualSeed(
        predict,
        [Reference(latent, torch.ones(CELLS, CELLS))],
        rows,
        others.split(1),
        attention_modules(toybox.unet),
        layers,
        "cat",
    )
    residual = done(run)
    sigma, queries, mask = torch.tensor([3.0]), {}, torch.ones(1, CELLS, CELLS)
    noisy = drawn(1, 4, CELLS, CELLS, seed=5) + 3 * noise
    with torch.no_grad():
        plain = predict(noisy, sigma, 0, foundation_patches(queries))
        placement = Placement(residual.delta, residual.layers, rows[0])
        changed = predict(noisy, sigma, 0, customised_patches(queries, lambda options, chunk: (placement,)))
        wanted = toybox.noise_predictor([PROMPT_PAIRS[0][0].format("ladybird")])(noisy, sigma, 0, {})
    assert masked_noise_error(changed, wanted, mask) < 0.7 * masked_noise_error(plain, wanted, mask)
