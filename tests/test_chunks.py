"""Prompts with weights and of any length: what is weighed, in which chunk each word is, and what a picture makes of it.

tests/host/test_checkpoints.py compares all of it with the host's own.
"""

import pytest
import torch

from profusion.models.chunks import PromptError, chunks, weighted_parts
from profusion.models.conditioning import of_one_length
from profusion.models.tokenizer import END, START, tokenize, words_to_ids
from profusion.pipeline import context_length, noun_spans, places, seeded
from profusion.prompt import NounError
from profusion.residual import Residual, ResidualError
from profusion.residual.training import TrainingOptions
from profusion.stable_diffusion import StableDiffusion
from tests import shrunken

SIZE = 16
LONG = "a quiet wide street in the old town at dawn " * 9


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (cat:1.2) here", [("a ", 1.0), ("cat", 1.2), (" here", 1.0)]),
        ("(cat)", [("cat", 1.1)]),
        ("((cat))", [("cat", 1.1 * 1.1)]),
        ("(a (cat:0.5):2)", [("a ", 2.0), ("cat", 0.5)]),
        (r"\(cat\)", [("(cat)", 1.0)]),
        ("(cat", [("(cat", 1.0)]),
        ("cat) dog", [("cat) dog", 1.0)]),
        ("(:1.2)", [(":1.2", 1.1)]),
        ("(time 12:30 here)", [("time 12:30 here", 1.1)]),
        ("", []),
    ],
)
def test_what_brackets_weigh(text, parts):
    assert weighted_parts(text) == parts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(cat:nan)", "weight nan"),
        ("a (cat: inf )", "weight inf"),
        ("(" * 5000 + "cat" + ")" * 5000, "hundreds of brackets"),
        ("a cat, embedding:style-1 and more", "embedding 'style-1'"),
        ("(embedding:bad:1.2)", "embedding 'bad'"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, words):
    with pytest.raises(PromptError, match=words):
        chunks(text)


def test_a_short_prompt_is_one_chunk_as_it_was():
    (chunk,) = chunks("a photo of a cat", pad=0)
    assert [token.id for token in chunk] == tokenize("a photo of a cat", 0)[0].tolist()
    assert {token.weight for token in chunk} == {1.0} and [token.part for token in chunk] == [0, *[1] * 5, *[0] * 71]


def test_a_long_prompt_goes_on_where_it_was_cut():
    ids, parted = words_to_ids(LONG), chunks(LONG)
    assert len(parted) == 2 and {len(chunk) for chunk in parted} == {77}
    assert [token.id for chunk in parted for token in chunk if token.part] == ids
    assert all(chunk[0].id == START and END in [token.id for token in chunk] for chunk in parted)
    assert context_length(LONG) == 154


def test_a_part_of_few_tokens_is_not_divided():
    text = "word " * 74 + "(a small cat)"
    first, second = chunks(text)
    assert [token.part for token in second[1:5]] == [2, 2, 2, 0] and first[75].part == 0


def test_a_noun_in_the_second_chunk_has_that_chunks_rows():
    assert noun_spans(f"{LONG} cat", "cat") == [(1 + len(words_to_ids(LONG)) + 2,)]
    assert noun_spans("a (cat:1.2) and \\(cat\\)", "cat") == [(2,), (5,)]


def test_concepts_of_one_noun_take_a_place_each_and_one_alone_takes_all():
    text = "a cat beside a cat"
    assert places(text, ["cat"]) == [(2, 5)] and places(text, ["cat", "cat"]) == [(2,), (5,)]
    with pytest.raises(NounError, match="residual 3: occurrence number 3 was asked for, and there are 2"):
        places(text, ["cat", "cat", "cat"])
    with pytest.raises(NounError, match="'x.safetensors' is of the noun 'cat'.*Write 'cat' where it has 'cats'"):
        places("two cats", ["cat"], ["'x.safetensors'"])


def test_contexts_of_several_lengths_become_one():
    one, two = torch.rand(1, 154, 3), torch.rand(1, 231, 3)
    first, second = of_one_length([one, two])
    assert first.shape == second.shape == (1, 462, 3)
    assert torch.equal(first[:, 154:308], one) and torch.equal(second[:, 231:], two)


@pytest.fixture(scope="module", params=["SD 1.x", "SDXL"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    return StableDiffusion.load(shrunken.written(path, shrunken.checkpoint(request.param)), SIZE)


def residual(model, size=30.0):
    layers = model.training(torch.rand(1, SIZE, SIZE, 3), torch.ones(1, SIZE, SIZE), "cat", TrainingOptions(steps=1))
    empty = layers.residual()
    delta = size * torch.randn(empty.delta.shape, generator=torch.manual_seed(3))
    return Residual(delta, "cat", empty.layers, empty.architecture)


def test_a_prompt_of_two_chunks_is_drawn_alone_as_beside_a_short_one(model):
    both = model.generate([f"{LONG} cat", "a cat"], seeded(1, 2), steps=2)
    for index, prompt in enumerate((f"{LONG} cat", "a cat")):
        alone = model.generate([prompt], seeded(1 + index), steps=2)
        torch.testing.assert_close(both[index : index + 1], alone, rtol=1e-3, atol=1e-3)
    cut = model.generate([LONG], seeded(1), steps=2)
    assert (cut - both[:1]).abs().max() > 1e-3, "the words of the second chunk count"


def test_weights_and_the_negative_prompt_count(model):
    plain = model.generate(["a cat on grass"], seeded(1), steps=2)
    assert torch.equal(model.generate(["a (cat:1.0) on grass"], seeded(1), steps=2), plain)
    assert (model.generate(["a (cat:1.5) on grass"], seeded(1), steps=2) - plain).abs().max() > 1e-3
    assert (model.generate(["a cat on grass"], seeded(1), steps=2, negative=LONG) - plain).abs().max() > 1e-3


def test_a_residual_acts_at_its_noun_in_any_chunk_and_under_any_negative(model):
    prompt, one = f"{LONG} cat", residual(model)
    plain, customised = model.generate_customised(prompt, [one], seeded(1), steps=2, negative=f"{LONG} {LONG}")
    expected = model.generate([prompt], seeded(1), steps=2, negative=f"{LONG} {LONG}")
    torch.testing.assert_close(plain, expected, rtol=1e-3, atol=1e-3)
    assert (customised - plain).abs().max() > 1e-2
    _, none = model.generate_customised(prompt, [one], seeded(1), steps=2, negative=f"{LONG} {LONG}", strength=0.0)
    torch.testing.assert_close(none, plain, rtol=1e-3, atol=1e-3)


def test_a_residual_of_another_architecture_is_refused_with_its_name(model):
    other = Residual(torch.ones(1, 1, 8), "cat", ("input.1.0",), "Toy")
    with pytest.raises(ResidualError, match="was trained on Toy"):
        model.generate_customised("a cat", [other], seeded(1), steps=2)


def test_a_noun_of_more_tokens_than_a_chunk_is_trained(model):
    noun = "\u2ff0" * 24  # of three tokens each
    assert context_length(f"a {noun}") == 77 and context_length(f"a photo of a {noun}") == 154
    options = TrainingOptions(steps=3)
    training = model.training(torch.rand(1, SIZE, SIZE, 3), torch.ones(1, SIZE, SIZE), noun, options)
    assert all(loss > 0 for loss in training.steps()) and training.delta.any()
