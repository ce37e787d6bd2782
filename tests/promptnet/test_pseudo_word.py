"""Where S* goes in a prompt, and what the text encoder makes of it."""

import pytest
import torch

from profusion.models.tokenizer import END, START, tokenize, words_to_ids
from profusion.promptnet import pseudo_word as words
from profusion.promptnet.pseudo_word import (
    PlaceholderError,
    encode,
    placed,
    prompt_tokens,
    scaled,
    split_prompt,
    with_noun,
    with_stand_in,
    without_position,
)


@pytest.mark.parametrize(
    ("prompt", "before", "after"),
    [
        ("S*", "", ""),
        ("a photo of S* on snow", "a photo of ", " on snow"),
        ("(S*:1.2), cats* and s*", "(", ":1.2), cats* and s*"),
        ("S*'s hat", "", "'s hat"),
        ("CATS* near S*.", "CATS* near ", "."),
    ],
)
def test_the_placeholder_is_found(prompt, before, after):
    assert split_prompt(prompt) == (before, after)


@pytest.mark.parametrize("prompt", ["a photo of a cat", "", "cats* on snow", "CATS*", "S *", "s*"])
def test_a_prompt_without_a_placeholder_is_quoted(prompt):
    with pytest.raises(PlaceholderError, match="there is no S\\*") as caught:
        split_prompt(prompt)
    assert repr(prompt) in str(caught.value)


def test_two_placeholders_are_refused_and_a_long_prompt_is_cut():
    with pytest.raises(PlaceholderError, match="2 times in the prompt 'S\\* and S\\*'"):
        split_prompt("S* and S*")
    with pytest.raises(PlaceholderError) as caught:
        split_prompt("word " * 1000)
    assert len(str(caught.value)) < 500


def test_the_noun_takes_its_place():
    assert with_noun("a photo of S* on snow", " ball ") == "a photo of ball on snow"
    with pytest.raises(PlaceholderError, match="no class noun"):
        with_noun("S* on snow", "  ")


def test_every_stand_in_is_one_token():
    assert all(len(words_to_ids(word)) == 1 for word in words._STAND_INS)


def test_the_rest_of_the_prompt_is_tokenised_as_without():
    ids, rows = prompt_tokens("A photo, of (S*) 's cat", 2)
    before, after = words_to_ids("a photo, of ("), words_to_ids(") 's cat")
    assert rows == (1 + len(before), 2 + len(before))
    assert ids[0] == START and ids[1 : rows[0]].tolist() == before
    assert ids[rows[1] + 1 :].tolist() == [*after, *[END] * (77 - 1 - len(before) - 2 - len(after))]


def test_a_stand_in_is_never_a_word_of_the_prompt():
    text, stand_in = with_stand_in("a zebra with an accordion and S*")
    assert text.count("zebra") == 1 and words_to_ids(text).count(stand_in) == 1
    crowded = " ".join(words._STAND_INS[:-1])
    assert with_stand_in(f"{crowded} S*")[1] == words_to_ids(words._STAND_INS[-1])[0]
    with pytest.raises(PlaceholderError, match="leave one of them out"):
        with_stand_in(f"{crowded} {words._STAND_INS[-1]} S*")


def test_a_placeholder_beyond_the_last_token_is_refused():
    assert prompt_tokens("cat " * 74 + "S*")[1] == (75,)
    with pytest.raises(PlaceholderError, match="too far back"):
        prompt_tokens("cat " * 75 + "S*")
    with pytest.raises(PlaceholderError, match="too far back"):
        prompt_tokens("cat " * 74 + "S*", 2)


def test_a_hosts_token_lists_take_the_embeddings_in_place():
    text, stand_in = with_stand_in("a (S*:1.2) cat", 2)
    assert text.count(":1.2") == 1
    word = torch.randn(2, 24)
    other = torch.randn(24)
    chunks = [
        [(START, 1.0, 0), (other, 1.0, 1), (stand_in, 1.2, 2)],
        [(START, 1.0, 0), (stand_in, 1.2, 2), (END, 1.0, 0)],
    ]
    changed, places = placed(chunks, stand_in, word)
    assert places == [(0, 2), (1, 1)]
    assert torch.equal(changed[0][2][0], word[0]) and torch.equal(changed[1][1][0], word[1])
    assert changed[0][2][1:] == (1.2, 2) and changed[0][1][0] is other and changed[1][2] == (END, 1.0, 0)
    assert chunks[0][2][0] == stand_in
    with pytest.raises(PlaceholderError, match="2 places for the 1"):
        placed(chunks, stand_in, word[:1])


def test_a_words_own_embedding_makes_the_plain_context(small):
    table = small.text.text_model.embeddings.token_embedding.weight
    plain = small.text(tokenize("a photo of cat on snow"))
    word = table[words_to_ids("cat")].expand(3, 1, 24)
    context = encode(small.text, "a photo of S* on snow", word)
    assert context.shape == (3, 77, 24)
    torch.testing.assert_close(context, plain.expand(3, -1, -1), rtol=0, atol=1e-6)
    two = encode(small.text, "a photo of S*", table[words_to_ids("snow cat")][None])
    torch.testing.assert_close(two, small.text(tokenize("a photo of snow cat")), rtol=0, atol=1e-6)


def test_rows_of_a_batch_have_their_own_word_and_gradients_reach_it(small):
    word = torch.randn(2, 1, 24, requires_grad=True)
    context = encode(small.text, "a photo of S* on snow", word)
    assert torch.equal(context[0, :4], context[1, :4]) and not torch.allclose(context[0, 4:], context[1, 4:])
    context[0, 10, 0].backward()
    assert word.grad[0].any() and not word.grad[1].any()


def test_gamma_scales_the_encoders_output_at_the_word_alone(small):
    word = torch.randn(1, 2, 24)
    full, less = (encode(small.text, "a photo of S* on snow", word, gamma) for gamma in (1.0, 0.8))
    expected = full.clone()
    expected[:, 4:6] = 0.8 * full[:, 4:6]
    assert torch.equal(less, expected) and torch.equal(scaled(full, (4, 5), 1.0), full)


def test_a_word_that_holds_its_position_is_given_none(small):
    """As the authors have it: token embeddings plus positions, then S* put in the place of a row."""
    word, embeddings = torch.randn(1, 1, 24), small.text.text_model.embeddings
    ids, (row,) = prompt_tokens("a photo of S* on snow")
    theirs = embeddings.token_embedding(ids)[None] + embeddings.position_embedding.weight
    theirs = torch.cat([theirs[:, :row], word, theirs[:, row + 1 :]], dim=1)
    ours = encode(small.text, "a photo of S* on snow", word, holds_position=True)
    torch.testing.assert_close(ours, small.text.encode_embeddings(theirs), rtol=0, atol=1e-5)
    positions = embeddings.position_embedding.weight
    assert torch.equal(without_position(word, positions, (row,)), word - positions[row])


def test_a_word_of_another_width_is_refused(small):
    with pytest.raises(ValueError, match="width 25 and the text encoder's words 24"):
        encode(small.text, "S*", torch.zeros(1, 1, 25))
