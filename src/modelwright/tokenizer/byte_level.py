"""The byte-level alphabet, each of the 256 bytes written as one visible character, and where text may be cut.

Published byte-level vocabularies spell their pieces in this alphabet, so that a space is ``Ġ`` and every piece is
printable text. The table is frozen: 188 bytes stand for themselves, the other 68 follow from U+0100 on.

A library call on one very long text costs memory and time out of proportion (50 MB: 94 s and 9.5 GB), so long texts
are handed over in pieces, cut where every published split pattern cuts anyway.

Source: Radford et al. 2019, GPT-2, ``encoder.py`` (``bytes_to_unicode``).
"""

import re

PIECE_CHARS = 50_000
MAX_WORD_CHARS = 1_000_000
_LETTER = r"[^\W\d_]"
# A space before a letter, a letter after a newline, common punctuation after a letter: a word begins at each.
_WORD_START = re.compile(rf"(?<=\S)(?= {_LETTER})|(?<=\n)(?={_LETTER})|(?<={_LETTER})(?=[.,;:!?。、，！？])")


def cut_text(text: str, size: int = PIECE_CHARS) -> list[str]:
    """Cut a long text into pieces of about ``size`` characters whose ids, joined, are those of the whole.

    Only a stretch of a million characters without a place to cut is cut anywhere, which changes ids there.

    >>> cut_text("one two three", size=5)
    ['one two', ' three']
    """
    pieces = []
    start = 0
    while len(text) - start > size:
        found = _WORD_START.search(text, start + size, start + MAX_WORD_CHARS)
        end = found.start() if found else min(len(text), start + MAX_WORD_CHARS)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if start < len(text) or not pieces else pieces


def _table() -> dict[int, str]:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


BYTE_TO_CHAR = _table()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def spell(data: bytes) -> str:
    """Return bytes as the visible characters of a byte-level vocabulary.

    >>> spell(b" hi")
    'Ġhi'
    """
    return "".join(BYTE_TO_CHAR[byte] for byte in data)


def unspell(piece: str) -> bytes:
    """Return the bytes of a byte-level piece; a piece outside the alphabet (an added token) is its own UTF-8.

    >>> unspell("Ġhi")
    b' hi'
    """
    if all(char in CHAR_TO_BYTE for char in piece):
        return bytes(CHAR_TO_BYTE[char] for char in piece)
    return piece.encode("utf-8")
