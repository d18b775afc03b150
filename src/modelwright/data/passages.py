"""The parts of a document: sections under headings, the sentence that says what a section is about, and its symbol.

Everything is a span of the document's text. A heading such as ``## json.dumps(obj, *, indent=None)`` gives a section a
*symbol* (the name) and a *signature*; that is how reference documentation is told from prose.
"""

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from modelwright.base.types import Document

Span = tuple[int, int]

_HEADING = re.compile(r"^\ufeff?(#{1,6})[ \t]+([^\n]{1,1000}?)(?:[ \t]+#+)?[ \t\r]*$", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]{0,3}(```|~~~)", re.MULTILINE)
_SYMBOL = re.compile(r"(?:class |def |function |method )?`?(?P<name>[A-Za-z_]\w*(?:\.\w+)*)(?P<signature>\(.*\))?`?")
_PARAGRAPH = re.compile(r"[^\n]+(?:\n[ \t]*[^\s][^\n]*)*")
_SENTENCE_END = re.compile(r"[.!?][\"')\]`]{0,3}(?=\s+[A-Z0-9\"'(`*_\[]|\s*\Z)")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|resp|approx|No|Mr|Mrs|Dr|Fig|pp?)|\b[A-Z])\.\Z")
_CALL_ECHO = re.compile(r"[\w.\[\]=, ]*[\w.]+ ?\([^\n]*\)(?: *(?:->|--?|=>|:)+ *[^\n]*)?:?\Z")
# Code, tables, quotes of other tools, directives and underlines do not say what a section is about.
_NOT_PROSE = re.compile(
    r"\s*(?:>>>|\.\.\.? |\||[-*+] |\d+[.)] |!\[|<|:\w+:|@|\$ |```|~~~|[=\-~^*_]{3,}|---)|[ ]{4,}|\t"
)
_BLANKS = re.compile(r"\s*")
MIN_SENTENCE_CHARS, MAX_SENTENCE_CHARS = 20, 400


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it until the next heading. All numbers are offsets into the document's text."""

    document: str
    heading: str  # without its marks; the document's title for text before the first heading
    head: Span  # of the heading's text; empty where there is none
    body: Span
    symbol: str = ""  # "json.dumps"
    signature: str = ""  # "(obj, *, indent=None)"
    kind: str = ""  # of the symbol: "module", "class", "method", "function" or "attribute"; empty for prose

    @property
    def is_symbol(self) -> bool:
        """Whether this describes a piece of a program."""
        return bool(self.kind)


def sections(document: Document) -> list[Section]:
    """Return the sections of a document in order; a text without headings is one section."""
    text = document.text
    headings = list(_headings(text))
    names = [heading for heading, _, _ in headings]
    module = _module_name(names)
    classes = {name.split("(")[0].removeprefix("class ") for name in names if name.startswith("class ")}
    first = headings[0][1][0] if headings else len(text)
    before = text.rfind("\n", 0, first) + 1 if headings else len(text)
    found = []
    if text[:before].strip():
        found.append(Section(document.id, document.title, (0, 0), (0, before)))
    for number, (heading, head, line_end) in enumerate(headings):
        stop = text.rfind("\n", 0, headings[number + 1][1][0]) + 1 if number + 1 < len(headings) else len(text)
        found.append(Section(document.id, heading, head, (line_end, stop), *_symbol(heading, module, classes)))
    return found


def _headings(text: str) -> Iterator[tuple[str, Span, int]]:
    """Yield (heading, its span, end of its line) outside fenced code."""
    fences = [found.start() for found in _FENCE.finditer(text)]
    for found in _HEADING.finditer(text):
        is_code = bisect.bisect_left(fences, found.start()) % 2 == 1
        if not is_code:
            yield found[2], found.span(2), found.end()


def _module_name(headings: list[str]) -> str:
    """The first heading, if it is a dotted name or the beginning of a later heading's name."""
    if not headings or not re.fullmatch(r"[A-Za-z_]\w*(?:\.\w+)*", headings[0]):
        return ""
    prefixes = (f"{headings[0]}.", f"class {headings[0]}.")
    is_module = "." in headings[0] or any(heading.startswith(prefixes) for heading in headings[1:])
    return headings[0] if is_module else ""


def _symbol(heading: str, module: str, classes: set[str]) -> tuple[str, str, str]:
    """The name, signature and kind of what a heading describes; empty for prose."""
    found = _SYMBOL.fullmatch(heading)
    if not found:
        return "", "", ""
    name, signature = found["name"], found["signature"] or ""
    if heading == module:
        return name, "", "module"
    if heading.startswith("class "):
        return name, signature, "class"
    if not signature:
        return (name, "", "attribute") if module and name.startswith(f"{module}.") else ("", "", "")
    return name, signature, "method" if name.rpartition(".")[0] in classes else "function"


def paragraphs(text: str, body: Span) -> Iterator[Span]:
    """Yield the paragraphs of prose in ``text[body]``: no code, tables, lists or directives."""
    is_fenced = False
    for found in _PARAGRAPH.finditer(text, *body):
        num_fences = len(_FENCE.findall(found[0]))
        if not is_fenced and not num_fences and found[0].strip() and not _NOT_PROSE.match(found[0]):
            yield found.start() + len(found[0]) - len(found[0].lstrip()), found.end()
        is_fenced ^= num_fences % 2 == 1


def sentences(text: str, paragraph: Span) -> list[Span]:
    """Return the sentences of a paragraph; the last may lack its full stop."""
    found, start = [], paragraph[0]
    for end in _SENTENCE_END.finditer(text, *paragraph):
        if _ABBREVIATION.search(text, max(start, end.start() - 12), end.start() + 1):
            continue
        found.append((start, end.end()))
        blanks = _BLANKS.match(text, end.end(), paragraph[1])
        start = blanks.end() if blanks else end.end()
    if start < paragraph[1]:
        found.append((start, paragraph[1]))
    return found


def summary(text: str, section: Section) -> Span | None:
    """Return the first sentence that says what the section is about, or None.

    A paragraph that only repeats the call (``fill(text) -> str``, as C functions do) is passed over.
    """
    for number, paragraph in enumerate(paragraphs(text, section.body)):
        if number >= 3:
            return None
        lines = text[slice(*paragraph)]
        if section.is_symbol and _CALL_ECHO.match(lines.partition("\n")[0][:400]):
            if "\n" not in lines:
                continue
            first_line = lines.index("\n") + 1
            rest = lines[first_line:]
            paragraph = (paragraph[0] + first_line + len(rest) - len(rest.lstrip()), paragraph[1])
        start, end = sentences(text, paragraph)[0]
        if not MIN_SENTENCE_CHARS <= end - start <= MAX_SENTENCE_CHARS:
            return None
        return start, end
    return None


def opening(text: str, first: Span, max_chars: int = MAX_SENTENCE_CHARS) -> Span:
    """Return the span from a first sentence on, with as many of the paragraph's next sentences as fit."""
    rest = _PARAGRAPH.match(text, first[0])
    assert rest is not None
    end = first[1]
    for _, stop in sentences(text, (first[0], rest.end())):
        if stop - first[0] > max_chars:
            break
        end = max(end, stop)
    return first[0], end
