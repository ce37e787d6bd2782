"""Find a class noun in the pieces that a tokenizer made of a prompt, whichever it is.

Tokenizers write the borders of words each in its own way: T5 and Gemma (SentencePiece) put "▁" before a word, Qwen and
Llama (byte-level BPE) "Ġ" for a blank, so that a noun is spelt otherwise at the start of a text than within it, and
CLIP "</w>" after a word. Turned into text again they are alike, and a noun is found in that as a person would: by its
letters, between what are no letters.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Sequence
from os.path import commonprefix

from .prompt import Span

WORD_START = "\u2581"
"""SentencePiece's blank: a vocabulary that has it is not written in bytes."""

_LETTER = r"[^\W\d_]"
# Han, kana, Thai, Lao, Khmer, Burmese: written without blanks, so that no border can be asked for.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BORDER = b"\0"  # what no noun goes across: a special token, padding, an embedding


def _byte_alphabet() -> dict[str, int]:
    """The character by which a byte-level vocabulary writes each byte (GPT-2, whose code this table is from)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class Pieces:
    """A tokenised prompt as the text that it is of, with the pieces that each letter comes from.

    pieces: what the vocabulary has for each token; None for a special token, padding or an embedding. template: the
    same of an empty prompt; what of it stands before and after the prompt is not the prompt's. in_bytes: whether the
    vocabulary is a byte-level one, CLIP's included.
    """

    def __init__(self, pieces: Sequence[str | None], template: Sequence[str | None] = (), *, in_bytes: bool):
        self._count = len(pieces)
        self._text, self._owners = _read(pieces, in_bytes)
        around, _ = _read(template, in_bytes)
        self._start = len(commonprefix([self._text, around]))
        after = commonprefix([self._text[self._start :][::-1], around[self._start :][::-1]])
        self._end = len(self._text) - len(after)

    def find(self, noun: str) -> list[Span]:
        """All places at which the prompt has a noun as a word: the indices of its pieces, in order."""
        if not noun.strip():
            return []
        found = _pattern(noun).finditer(self._text, self._start, self._end)
        return [
            tuple(sorted({one for owners in self._owners[slice(*match.span())] for one in owners})) for match in found
        ]

    @property
    def before(self) -> int:
        """How many pieces are the template's, before the prompt begins."""
        return min(self._owners[self._start]) if self._start < len(self._owners) else self._count


def _read(pieces: Sequence[str | None], in_bytes: bool) -> tuple[str, list[tuple[int, ...]]]:
    """The text of pieces, and for each of its characters the indices of the pieces that it is of."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, owners, pending = [], [], []
    for index, piece in enumerate(pieces):
        for byte in _BORDER if piece is None else _as_bytes(piece, in_bytes):
            pending.append(index)
            read = decoder.decode(bytes([byte]))
            text.append(read)
            owners.extend([tuple(dict.fromkeys(pending))] * len(read))
            if read:
                pending = []
    return "".join(text), owners


def _as_bytes(piece: str, in_bytes: bool) -> bytes:
    one = _BYTE.fullmatch(piece)
    if one:
        return bytes([int(one[1], 16)])
    ended = piece.endswith("</w>")
    piece = piece.removesuffix("</w>").replace(WORD_START, " ")
    if in_bytes and all(letter in _BYTES for letter in piece):
        read = bytes(_BYTES[letter] for letter in piece)
    else:
        read = piece.encode()
    return read + b" " * ended


def _pattern(noun: str) -> re.Pattern:
    """A noun as a word of its own: between what are no letters, as CLIP's tokenizer has it, whatever its case is."""
    forms = dict.fromkeys(unicodedata.normalize(form, noun) for form in ("NFC", "NFKC"))
    return re.compile("|".join(map(_bordered, forms)), re.IGNORECASE)


def _bordered(noun: str) -> str:
    words = noun.split()
    first, last = words[0][0], words[-1][-1]
    before = f"(?<!{_LETTER})" if _spaced(first) else ""
    after = f"(?!{_LETTER})" if _spaced(last) else ""
    return before + r"\s+".join(map(re.escape, words)) + after


def _spaced(letter: str) -> bool:
    """Whether a letter is of a script whose words have borders."""
    return letter.isalpha() and not _UNSPACED.match(letter)
