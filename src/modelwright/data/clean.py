"""Mend a text without changing what it says, and tell whether it is text at all.

Conservative on purpose: indentation, tabs, case and punctuation stay; compatibility forms stay (NFC, never NFKC);
mojibake is repaired only where a whole document shows it. Every step is linear in the length of the text, also for
one line of many megabytes.
"""

import re
import unicodedata
from dataclasses import dataclass, replace

from modelwright.base.types import Document

# Ligatures that fonts use for plain letters; a search for "file" must find them.
_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_MANY_BLANK_LINES = re.compile("\n{3,}")
# UTF-8 read as Windows-1252: a lead byte's letter and then continuation bytes' characters.
_CP1252_TAIL = (
    "\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014\u2018-\u201a\u201c-\u201e"
    "\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122"
)
_MOJIBAKE = re.compile(f"[\u00c2-\u00f4][{_CP1252_TAIL}]{{1,3}}")
_MIN_MOJIBAKE = 3
_WORD = re.compile(r"\S+")


def _removed_characters() -> dict[int, str | None]:
    table: dict[int, str | None] = dict.fromkeys(range(0x20))
    table.update(dict.fromkeys(range(0x7F, 0xA0)))
    del table[ord("\n")], table[ord("\t")]
    # Byte-order mark, zero-width space, word joiner, soft hyphen; the joiners U+200C and U+200D carry meaning and stay.
    table.update(dict.fromkeys((0xFEFF, 0x200B, 0x2060, 0x00AD)))
    # Direction overrides can make text read otherwise than it is stored. Source: "Trojan Source", CVE-2021-42574.
    table.update(dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
    table.update(dict.fromkeys([0xFFFE, 0xFFFF]))
    table.update({0xA0: " ", 0x2007: " ", 0x202F: " ", 0x3000: " ", **dict.fromkeys(range(0x2000, 0x2007), " ")})
    table.update(dict.fromkeys(range(0x2008, 0x200B), " "))
    table[0x200B] = None
    table.update(_LIGATURES)
    return table


_TABLE = _removed_characters()


def clean_text(text: str) -> str:
    r"""Return the text with one kind of line end and space, no control characters, and no blanks at line ends.

    >>> clean_text("\ufeffA  line \r\n\r\n\r\n\r\n\tof \x00text\x07 ")
    'A  line\n\n\tof text\n'
    """
    text = _LINE_ENDS.sub("\n", text)
    if not text.isascii():
        text = repair_mojibake(text)
    text = text.translate(_TABLE)
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    # Line by line: a pattern for blanks at line ends takes quadratic time on a long run of blanks.
    text = "\n".join([line.rstrip() for line in text.split("\n")])
    text = _MANY_BLANK_LINES.sub("\n\n", text).strip("\n")
    return f"{text}\n" if text else ""


def repair_mojibake(text: str) -> str:
    """Turn UTF-8 that was once read as Windows-1252 back, where a document shows it at least three times.

    >>> repair_mojibake("caf\u00c3\u00a9, na\u00c3\u00afve and \u00e2\u20ac\u0153so\u00e2\u20ac\u009d")
    'caf\u00e9, na\u00efve and \u201cso\u201d'
    """
    mended = {found: _undo(found) for found in set(_MOJIBAKE.findall(text))}
    mended = {found: right for found, right in mended.items() if right is not None}
    if sum(text.count(found) for found in mended) < _MIN_MOJIBAKE:
        return text  # a text *about* mojibake, or a chance pair of letters
    return _MOJIBAKE.sub(lambda m: mended.get(m[0]) or m[0], text)


def _undo(found: str) -> str | None:
    try:
        # Bytes that Windows-1252 leaves undefined come through as the same-numbered control character.
        data = b"".join(c.encode("latin-1") if ord(c) < 0x100 else c.encode("cp1252") for c in found)
        return data.decode("utf-8")
    except UnicodeError:
        return _undo_shorter(found)


def _undo_shorter(found: str) -> str | None:
    if len(found) <= 2:
        return None
    right = _undo(found[:-1])
    return None if right is None else right + found[-1]


def reject_reason(text: str, min_chars: int, max_word_chars: int, min_alnum_fraction: float) -> str:
    """Say why a cleaned text is no document to learn from; empty if it is one.

    >>> reject_reason("short", 10, 100, 0.3)
    'too short: 5 characters, at least 10'
    """
    length = len(text.strip())
    if not length:
        return "empty"
    if length < min_chars:
        return f"too short: {length} characters, at least {min_chars}"
    longest = max(found.end() - found.start() for found in _WORD.finditer(text))
    if longest > max_word_chars:
        return f"holds a run of {longest} characters without a blank, at most {max_word_chars}: data, not text"
    num_letters = sum(map(str.isalnum, text))
    if num_letters < min_alnum_fraction * length:
        return f"only {num_letters / length:.0%} letters and digits, at least {min_alnum_fraction:.0%}"
    return ""


@dataclass(frozen=True)
class Clean:
    """`clean_text` as a step."""

    def change(self, document: Document) -> Document:
        """Return the document with its text mended."""
        text = clean_text(document.text)
        return document if text == document.text else replace(document, text=text)


@dataclass(frozen=True)
class Readable:
    """`reject_reason` as a step: keeps what is text at all. The defaults are those of ``mw data``."""

    min_chars: int = 64  # shorter documents go
    max_word_chars: int = 10_000  # a longer run without a blank is data, not text
    min_alnum_fraction: float = 0.25  # letters and digits among all characters

    def reason(self, document: Document) -> str:
        """Say why the document is no text; empty if it is."""
        return reject_reason(document.text, self.min_chars, self.max_word_chars, self.min_alnum_fraction)
