import time

import pytest

from profusion.models.tokenizer import END, START, id_to_text, words_to_ids
from profusion.prompt import NounError, choose_spans, find_noun, form_to_write


def ends_word(token):
    return id_to_text(token).endswith("</w>")


def chunks(*texts, length=77):
    """Prompts as the host's tokenizer gives them: start, words, end, padding."""
    rows = []
    for text in texts:
        words = [(token, 1) for token in words_to_ids(text)]
        rows.append([(START, 0), *words, (END, 0), *[(END, 0)] * (length - len(words) - 2)])
    return rows


def find(noun, *texts):
    return find_noun(chunks(*texts), words_to_ids(noun), ends_word)


@pytest.mark.parametrize(
    ("noun", "text", "spans"),
    [
        ("ball", "a photo of a ball", [(5,)]),
        ("ball", "ball", [(1,)]),
        ("ball", "A Ball, a BALL.", [(2,), (5,)]),
        ("ball", "a ball's colour", [(2,)]),
        ("ball", "a ball-shaped ball", [(2,), (5,)]),
        ("ball", "footballs and balls", []),
        ("cat", "concatenated category", []),
        ("teddy bear", "a teddy bear and a bear", [(2, 3)]),
        ("ball", "", []),
    ],
)
def test_a_noun_is_found_as_whole_words(noun, text, spans):
    assert find(noun, text) == spans


def test_a_word_that_ends_with_the_noun_is_another_word():
    # "snow" + "ball</w>" as tokens: the end of a word, but not its start.
    snow, ball = next(token for token in range(49408) if id_to_text(token) == "snow"), words_to_ids("ball")[0]
    assert find_noun([[(START, 0), (snow, 1), (ball, 1), (END, 0)]], [ball], ends_word) == []


def test_a_word_that_starts_with_the_noun_is_another_word():
    tokens = words_to_ids("axolotls")
    assert len(tokens) > 1
    assert find_noun([[(token, 1) for token in tokens]], tokens[:1], ends_word) == []


def test_a_noun_of_several_tokens():
    assert len(words_to_ids("axolotl")) > 1
    (span,) = find("axolotl", "one axolotl here")
    assert span == tuple(range(2, 2 + len(words_to_ids("axolotl"))))


def test_rows_count_on_through_the_chunks():
    assert find("ball", "a red thing", "and a ball") == [(77 + 3,)]


def test_a_word_may_be_split_between_chunks():
    first, *rest = [(token, 1) for token in words_to_ids("axolotl")]
    split = [[(START, 0), first, (END, 0)], [(START, 0), *rest, (END, 0)]]
    assert find_noun(split, words_to_ids("axolotl"), ends_word) == [(1, *range(4, 4 + len(rest)))]


def test_embeddings_are_words_of_their_own():
    (ball,) = words_to_ids("ball")
    embedding = object()
    assert find_noun([[(START, 0), (embedding, 1), (ball, 2), (embedding, 3)]], [ball], ends_word) == [(2,)]


def test_occurrences_do_not_overlap():
    (ball,) = words_to_ids("ball")
    assert find_noun([[(ball, 1)] * 3], [ball, ball], ends_word) == [(0, 1)]


SPANS = [(2,), (5,), (9,)]


@pytest.mark.parametrize(
    ("occurrence", "chosen"),
    [("auto", SPANS), ("all", SPANS), ("first", [(2,)]), ("third", [(9,)]), ("last", [(9,)])],
)
def test_an_occurrence_is_chosen(occurrence, chosen):
    assert choose_spans(SPANS, occurrence) == chosen


def test_concepts_of_one_noun_take_turns():
    assert [choose_spans(SPANS, "auto", turn, 2) for turn in range(2)] == [[(2,)], [(5,)]]


def test_a_missing_occurrence_is_an_error():
    with pytest.raises(NounError, match="fourth.*there are 3"):
        choose_spans(SPANS, "fourth")
    with pytest.raises(NounError, match="number 4"):
        choose_spans(SPANS, "auto", 3, 4)
    with pytest.raises(ValueError, match="choose one of auto, all"):
        choose_spans(SPANS, "fifth")


@pytest.mark.parametrize(
    ("text", "noun", "form"),
    [
        ("a photo of two balls on grass", "ball", "balls"),
        ("a photo of a ball on grass", "balls", "ball"),
        ("two foxes", "fox", "foxes"),
        ("Two Puppies", "puppy", "Puppies"),
        ("three knives", "knife", "knives"),
        ("grey wolves", "wolf", "wolves"),
        ("five mice", "mouse", "mice"),
        ("a crowd of people", "person", "people"),
        ("a teddy-bear on a chair", "teddy bear", "teddy-bear"),
        ("a teddybear on a chair", "teddy bear", "teddybear"),
        ("two teddy-bears", "teddy bear", "teddy-bears"),
        ("a teddy bear", "teddy-bear", "teddy bear"),
        ("a teddy_bear", "teddy bear", "teddy_bear"),
    ],
)
def test_another_form_of_a_noun_is_named_with_the_one_to_write(text, noun, form):
    assert form_to_write(text, noun) == f"Write {noun!r} where it has {form!r}."


@pytest.mark.parametrize(
    ("text", "noun", "within"),
    [
        ("a football on grass", "ball", "football"),
        ("a photo of embedding:ball", "ball", "embedding:ball"),
        ("一只猫在草地上", "猫", "一只猫在草地上"),
    ],
)
def test_a_noun_that_is_part_of_a_longer_word_is_shown_there(text, noun, within):
    assert form_to_write(text, noun) == f"Write {noun!r} as a word of its own: it is only a part of {within!r}."


@pytest.mark.parametrize(
    ("text", "noun"),
    [("a", "ball"), ("teddy", "teddy bear"), (" ", "-ball"), ("-", "ball-"), ("teddy ", "teddy bear"), ("- ", "a b")],
)
def test_a_prompt_of_any_length_takes_time_by_its_length(text, noun):
    """Four times the text: what grew with its square took sixteen times as long."""

    def seconds(length):
        long, found = (text * length)[:length], []
        for _ in range(3):
            started = time.process_time()
            form_to_write(long, noun)
            form_to_write(f"x{long.strip() or 'x'}ball", noun)
            found.append(time.process_time() - started)
        return min(found)

    assert seconds(32_000) < 9 * seconds(8_000) + 0.005


@pytest.mark.parametrize(
    ("text", "noun"),
    [
        ("a dog", "cat"),
        ("a - b", "-"),
        ("a b", " _ "),
        ("", "cat"),
        ("a (b", "a (c"),
        ("grass", "glass"),
        ("x" * 9000, "cat"),
    ],
)
def test_where_nothing_is_like_it_nothing_is_advised(text, noun):
    assert form_to_write(text, noun) == ""
