"""Text that can be shown anywhere, names that every system takes, and one table of what went wrong."""

import errno
import html.parser
import struct

import pytest
import torch

from profusion import problems
from profusion.loop import TrainingError
from profusion.problems import OUT_OF_MEMORY, hidden_character, inert, known, printable, why, why_no_name

ATTACKS = (
    "<img src=x onerror=document.title='PWNED'>",
    "<script>1</script>",
    "</textarea><b>",
    "<!--",
    "<?x",
    "&lt;b&gt;",
    "&#60;b",
    "http://x.yz/a",
    "HTTPS://x.yz",
    "www.x.yz",
    "WWW.x.yz",
    "<" * 5 + "b>",
)


class Reader(html.parser.HTMLParser):
    """What a browser makes of a text: its tags, and the text that remains."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, _):
        self.tags.append(tag)

    handle_endtag = handle_comment = handle_decl = handle_pi = lambda self, tag: self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", ATTACKS)
def test_inert_text_is_no_html_and_looks_the_same(text):
    shown = inert(text)
    read = Reader(shown)
    assert read.tags == [] and read.text == shown, "a parser found a tag or an entity"
    assert shown.replace("\u2060", "") == text
    assert "://" not in shown and "www." not in shown.lower()
    assert inert("C:\\models\\cat_00001_.safetensors\n1,234 bytes") == "C:\\models\\cat_00001_.safetensors\n1,234 bytes"


@pytest.mark.parametrize("letter", ["\ud800", "\udcff", "\x00", "\x1b", "\x7f", "\x85", "\u2028", "\u202e", "\r"])
def test_what_no_log_can_hold_is_escaped(letter):
    text = f"cup{letter}\tcat\n"
    assert printable(text) == f"cup{ascii(letter)[1:-1]}\tcat\n"
    printable(text).encode()
    assert hidden_character(text) == (None if letter == "\r" else ascii(letter)[1:-1])


@pytest.mark.parametrize("text", ["cat", "猫", "Großes \"Tier\" \\ 'x'", "👩\u200d🚀", "می\u200cخواهم", "a\nb\tc", ""])
def test_ordinary_text_of_any_script_stays(text):
    assert printable(text) == text and hidden_character(text) is None


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "read-only"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "name is too long"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "No such file or directory"),
        (OSError("cannot identify image file"), "cannot identify image file"),
        (ValueError("embedded null byte"), "null character"),
        (MemoryError(), OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), OUT_OF_MEMORY),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (SyntaxError("not a TIFF file"), "SyntaxError: not a TIFF file"),
        (struct.error("unpack requires"), "error: unpack requires"),
        (TypeError("join() argument"), "TypeError: join"),
        (Exception(), "Exception"),
        (ValueError("x" * 5000), "x..."),
        (ValueError("a\ud800b\x00c"), r"a\ud800b\x00c"),
    ],
)
def test_every_failure_has_words(problem, words):
    said = why(problem)
    assert words in said and len(said) < 500 and "\n" not in said
    said.encode()


def test_an_encoding_that_fails_has_words():
    with pytest.raises(UnicodeEncodeError) as caught:
        "\ud800".encode()
    assert "no log can hold" in why(caught.value)


def test_real_want_of_memory_has_words():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert known(caught.value) == OUT_OF_MEMORY


@pytest.mark.parametrize(
    "name",
    [
        *'<>:"|?*',
        *("cat ", "cat.", ".."),
        *("a\nb", "a\tb", "\x00", "\ud800", "\u202egpj.exe"),
        *("con", "NUL.txt", "Com1", "lpt9.safetensors", "aux .x", "COM\u00b9", "CONIN$"),
    ],
)
def test_names_that_some_system_refuses_are_refused(name):
    assert why_no_name(name) is not None
    assert why_no_name(name).isprintable()


@pytest.mark.parametrize("name", ["cat", "console", "com10", "a.b", ".hidden", "猫 (2)", "O'Neill & co", "50%", "x~1"])
def test_other_names_are_not(name):
    assert why_no_name(name) is None


def test_a_device_that_ran_out_of_memory_is_known_by_what_raised_it():
    shortage, other = torch.cuda.OutOfMemoryError("Allocation on device"), RuntimeError("can't allocate memory")
    for first, found in ((shortage, shortage), (other, None)):
        told = TrainingError("lower batch_size")
        told.__cause__ = first
        kept = TrainingError("what was learned is kept")
        kept.__cause__ = told
        assert problems.shortage_in(first) is problems.shortage_in(kept) is found
    in_a_circle = ValueError("x")
    in_a_circle.__cause__ = in_a_circle
    assert problems.shortage_in(in_a_circle) is problems.shortage_in(None) is None


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch knows no AcceleratorError")
def test_an_accelerator_error_may_be_a_shortage():
    for text, number, is_one in (("out of memory", None, True), ("x", 2, True), ("x", 209, False), ("x", None, False)):
        problem = torch.AcceleratorError(text)
        if number is not None:
            problem.error_code = number
        assert (problems.shortage_in(problem) is problem) == is_one
