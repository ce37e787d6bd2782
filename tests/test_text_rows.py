"""Numbers of rows and tokens say which row is whose, or nothing is said."""

import pytest

from profusion.infusion import UnsupportedModelError
from profusion.text_rows import Encoder, first_rows, rows_of_nouns

CLIP = Encoder(77, is_clip=True)


@pytest.mark.parametrize(
    ("encoders", "rows", "first"),
    [
        ({"t5xxl": Encoder(256)}, 256, {"t5xxl": 0}),
        ({"l": CLIP, "t5xxl": Encoder(256)}, 256, {"t5xxl": 0}),  # Flux: of CLIP it has the pooled text alone
        ({"l": CLIP, "t5xxl": Encoder(77)}, 77, {"t5xxl": 0}),
        ({"g": CLIP, "l": CLIP, "t5xxl": Encoder(77)}, 154, {"g": 0, "l": 0, "t5xxl": 77}),
        ({"g": Encoder(154, is_clip=True), "l": CLIP, "t5xxl": Encoder(200)}, 277, {"g": 0, "l": 0, "t5xxl": 77}),
        ({"g": CLIP, "l": CLIP}, 77, {"g": 0, "l": 0}),
        ({"qwen3_4b": Encoder(20, 3)}, 20, {"qwen3_4b": 0}),  # Z-Image keeps its template
        ({"qwen25_7b": Encoder(50, 34)}, 16, {"qwen25_7b": -34}),  # Qwen-Image does not
        ({"qwen25_7b": Encoder(50, 34), "l": CLIP}, 16, {"qwen25_7b": -34}),
    ],
)
def test_each_family_has_its_rows(encoders, rows, first):
    assert first_rows(encoders, rows) == first


@pytest.mark.parametrize(
    ("encoders", "rows"),
    [
        ({"t5xxl": Encoder(128), "llama": Encoder(128)}, 128),
        ({"t5xxl": Encoder(128)}, 256),
        ({"t5xxl": Encoder(128)}, 127),  # what was cut is no template's
        ({"qwen25_7b": Encoder(50, 34)}, 15),
        ({"l": CLIP}, 154),
    ],
)
def test_what_numbers_do_not_say_is_refused(encoders, rows):
    with pytest.raises(UnsupportedModelError, match=f"makes {rows} rows .* nobody can tell"):
        first_rows(encoders, rows)


def test_a_noun_that_stands_twice_has_all_its_rows():
    found = {"g": [(2,), (9, 10)], "l": [(2,), (9, 10)], "t5xxl": [(3,), (8,)]}
    first = {"g": 0, "l": 0, "t5xxl": 77}
    assert rows_of_nouns(found, first, "cat", "") == [(2, 80), (9, 10, 85)]
    assert rows_of_nouns({**found, "l": []}, {"t5xxl": -3}, "cat", "") == [(0,), (5,)]
    with pytest.raises(ValueError, match="encoders l, t5xxl disagree on where 'cat' is in the prompt 'a cat'"):
        rows_of_nouns({"l": [(2,)], "t5xxl": []}, {"l": 0, "t5xxl": 77}, "cat", "a cat")
