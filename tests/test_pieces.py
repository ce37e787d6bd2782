"""A noun is found in a tokenised prompt by its letters, whichever way the tokenizer writes words."""

import pytest

from profusion.pieces import Pieces


def found(pieces, noun="cat", in_bytes=False, template=()):
    return Pieces(pieces, template, in_bytes=in_bytes).find(noun)


def test_each_tokenizer_writes_words_its_own_way():
    assert found(["▁", "a", "▁cat", "▁on", None, None]) == [(2,)]
    assert found(["a", "Ġcat", "Ġ(", "cat", ":", "1", ".", "2", ")"], in_bytes=True) == [(1,), (3,)]
    assert found([None, "a</w>", "cat</w>", "cat", "nip</w>", None], in_bytes=True) == [(2,)]


def test_a_word_is_what_has_no_letters_around_it():
    assert found(["▁snow", "cat", "▁cat", "s", "▁Cat", "'", "s", "▁cat", "_", "2", "▁cat", "-", "like"]) == [
        (4,),
        (7,),
        (10,),
    ]
    assert found(["▁r", "2", "▁r", "22"], "r2") == [(0, 1), (2, 3)]


def test_a_noun_has_all_its_pieces_and_no_more():
    assert found(["Ġa", "Ġfire", "Ġhy", "dr", "ant", "Ġfire"], "fire hydrant", in_bytes=True) == [(1, 2, 3, 4)]
    assert found(["▁fire", "▁", "▁hydrant"], "Fire  Hydrant") == [(0, 1, 2)]
    assert found(["Ġfire", None, "Ġhydrant"], "fire hydrant", in_bytes=True) == []
    assert found(["▁cat"], " ") == []


def test_letters_may_be_parted_between_pieces():
    assert found(["Ġa", "Ġcaf", "Ã", "©", "Ġbar"], "café", in_bytes=True) == [(1, 2, 3)]  # é is the bytes C3 A9
    assert found(["▁caf", "<0xC3>", "<0xA9>"], "café") == [(0, 1, 2)]
    assert found(["▁caf", "é"], "café") == [(0, 1)]  # as NFC, whatever was typed
    assert found(["▁fish"], "ﬁsh") == [(0,)]  # as T5 reads a ligature


@pytest.mark.parametrize(("noun", "text"), [("猫", "草地上的猫在睡觉"), ("แมว", "รูปแมวบนหญ้า")])
def test_where_words_have_no_borders_none_is_asked_for(noun, text):
    assert found(list(text), noun) == [tuple(range(text.index(noun), text.index(noun) + len(noun)))]


def test_the_template_is_not_the_prompt():
    template = ["<|im_start|>", "user", "Ċ", "<|im_end|>", "Ċ", "<|im_start|>", "assistant"]
    prompt = [*template[:3], "user", "Ġassistant", *template[3:]]
    for noun, rows in (("user", (3,)), ("assistant", (4,))):
        assert found(prompt, noun, True, template) == [rows]
    assert Pieces(prompt, template, in_bytes=True).before == 3
    assert Pieces(template, template, in_bytes=True).before == 7
    assert Pieces([None, "a</w>", None, None], [None, None, None, None], in_bytes=True).before == 1
    padded = Pieces(["▁a", "▁cat", None, None], [None] * 4, in_bytes=False)
    assert (padded.find("cat"), padded.before) == ([(1,)], 0)
