"""Where sentences, list items and lines of code begin and end, as character spans of the text they stand in.

Nothing is rewritten: every span is a slice of the original, so that what is quoted is what was written. Made for
technical prose: `os.path.join`, version numbers, ``e.g.`` and signatures do not end a sentence, and code, tables and
list items keep their lines. Every rule is linear in the length of the text, whatever the text is.
"""

import re
import unicodedata

Span = tuple[int, int]

_ABBREVIATIONS = frozenset(
    "e.g i.e cf vs etc al fig figs eq no nos sec ch vol pp ed eds mr mrs ms dr prof st jr sr inc ltd co corp dept "
    "approx resp z.b d.h bzw usw ca u.s u.k a.m p.m ph.d".split()
)
# A run of terminators with closing quotes, then white space or the end. The lookbehind and the possessive quantifiers
# let the search start once a run: a million full stops cost one pass.
_END = re.compile(r"(?<![.!?…])[.!?…]++[\"')\]}”’»*_`]*+(?=\s|\Z)|(?<![。！？｡])[。！？｡]++[」』）”’]*+")
_LIST_ITEM = re.compile(r"[ \t]*(?:[-*+•][ \t]|\(?\d{1,3}[.)][ \t]|\(?[a-zA-Z][.)][ \t]|:\w[^:\n]{0,60}:[ \t]|@\w)")
_CODE_LINE = re.compile(r"[ \t]*(?:>>> |\.\.\. |\$ |\||```|~~~|#{1,6} )|\t| {4,}")
_WORD_BEFORE = re.compile(r"[\w.]{1,12}\Z")
_MAX_LOOK_BACK = 32


def split_sentences(text: str, start: int = 0, end: int | None = None) -> list[Span]:
    """Return the spans of the sentences, list items and code lines of ``text[start:end]``, in order, without overlap.

    White space between them belongs to none of them; every other character belongs to exactly one.

    >>> text = "Call os.path.join, e.g. twice. It returns a str."
    >>> [text[s:e] for s, e in split_sentences(text)]
    ['Call os.path.join, e.g. twice.', 'It returns a str.']
    """
    spans: list[Span] = []
    for block in split_blocks(text, start, len(text) if end is None else end):
        _sentences_of(text, block, spans)
    return spans


def split_blocks(text: str, start: int, end: int) -> list[Span]:
    """Return the spans of paragraphs, single list items and single code lines of ``text[start:end]``."""
    blocks: list[Span] = []
    open_at: int | None = None
    last = position = start
    is_verbatim = False
    while position < end:
        stop = text.find("\n", position, end)
        line_end = end if stop < 0 else stop
        first, final = trim(text, position, line_end)
        is_fence = text.startswith(("```", "~~~"), first)
        is_alone = first < final and (is_verbatim or is_fence or _CODE_LINE.match(text, position, line_end) is not None)
        is_verbatim ^= is_fence
        if first == final or is_alone or _LIST_ITEM.match(text, position, line_end):
            if open_at is not None:
                blocks.append((open_at, last))
            open_at = None
        if is_alone:
            blocks.append((first, final))
        elif first < final:
            open_at, last = (first if open_at is None else open_at), final
        position = line_end + 1
    if open_at is not None:
        blocks.append((open_at, last))
    return blocks


def _sentences_of(text: str, block: Span, spans: list[Span]) -> None:
    begin, end = block
    for found in _END.finditer(text, begin, end):
        if found.end() < end and not _ends_here(text, found.start(), found.end(), end):
            continue
        first, final = trim(text, begin, found.end())
        if first < final:
            spans.append((first, final))
        begin = found.end()
    first, final = trim(text, begin, end)
    if first < final:
        spans.append((first, final))


def _ends_here(text: str, mark: int, after: int, end: int) -> bool:
    """Tell whether the terminator at ``mark`` ends a sentence, given that something follows it."""
    if text[mark] != ".":
        return True
    following = text[after : min(end, after + _MAX_LOOK_BACK)].lstrip()
    if following and (following[0].islower() or following[0] in ",;:)]}"):
        return False
    word = _WORD_BEFORE.search(text, max(0, mark - _MAX_LOOK_BACK), mark)
    if word is None:
        return True
    before = word.group().lower().strip(".")
    is_initial = len(before) == 1 and before.isalpha() and word.group()[-1].isupper()
    return not (before in _ABBREVIATIONS or is_initial)


def trim(text: str, start: int, end: int) -> Span:
    """Return the span without the white space at its two ends."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def whole_character(text: str, cut: int, lowest: int) -> int:
    """Move ``cut`` back so that it parts no line end and no character from its accents, joiners or flag half."""
    place = cut
    while place > lowest and place < len(text) and cut - place < _MAX_LOOK_BACK:
        here, before = text[place], text[place - 1]
        is_joined = before == "\u200d" or here == "\u200d" or "\ufe00" <= here <= "\ufe0f" or "🏻" <= here <= "🏿"
        is_flag = "🇦" <= here <= "🇿" and "🇦" <= before <= "🇿"
        if not (is_joined or is_flag or unicodedata.combining(here) or (before == "\r" and here == "\n")):
            return place
        place -= 1
    return cut
