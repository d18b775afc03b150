"""Chunks: pieces of a document that remember where they stand, character by character.

A chunk never crosses a heading, so that its heading path says what it is about; long sections are packed from whole
paragraphs, then sentences, then (a line without any) pieces of bounded length. ``document.text[start:end]`` is the
chunk's text, always: nothing is stripped, joined or normalised inside.

Not done: overlap between chunks (a passage would be cited twice) and cuts by meaning, whose gains are inconsistent
(Chroma, "Evaluating Chunking Strategies", 2024).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document
from modelwright.rag.sentence import Span, split_blocks, split_sentences, trim, whole_character

MAX_HEADING = 400  # characters of a heading kept in the path
_MARK = re.compile(r"^\ufeff? {0,3}(?:#{1,6}[ \t]|```|~~~)", re.MULTILINE)


@dataclass(frozen=True)
class ChunkConfig:
    """How documents are cut."""

    target_chars: int = 900  # packing stops before this length; about 200 tokens of English
    max_chars: int = 1200  # a section up to this length stays whole; no chunk is longer

    def __post_init__(self) -> None:
        if not 50 <= self.target_chars <= self.max_chars:
            raise ConfigError(
                f"chunk.target_chars is {self.target_chars} and chunk.max_chars is {self.max_chars}; "
                "expected 50 <= target_chars <= max_chars."
            )


@dataclass(frozen=True)
class Chunk:
    """A slice of one document: ``text == document.text[start:end]``."""

    doc: str
    start: int
    end: int
    text: str
    headings: tuple[str, ...] = ()  # from the document's outermost heading down to the chunk's own


@dataclass(frozen=True)
class _Section:
    start: int
    end: int
    body: int  # where the text behind the heading line begins
    level: int
    headings: tuple[str, ...]


def chunk_documents(documents: Iterable[Document], config: ChunkConfig | None = None) -> list[Chunk]:
    """Return the chunks of all documents, in their order."""
    return [chunk for document in documents for chunk in chunk_document(document, config)]


def chunk_document(document: Document, config: ChunkConfig | None = None) -> list[Chunk]:
    r"""Cut one document into chunks that hold every character of it but white space at their ends.

    >>> [c.text for c in chunk_document(Document("a.md", "# A\n\nOne.\n\n## B\n\nTwo."))]
    ['# A\n\nOne.', '## B\n\nTwo.']
    """
    config = config or ChunkConfig()
    text = document.text
    chunks = []
    for section in _joined(text, _sections(text)):
        for start, end in _pack(text, section, config):
            chunks.append(Chunk(document.id, start, end, text[start:end], section.headings))
    return chunks


def _sections(text: str) -> Iterator[_Section]:
    """Yield the stretch before the first heading and that of each heading, with the path that leads to it."""
    path: list[tuple[int, str]] = []
    start = body = level = 0
    for line_start, line_end, depth, heading in _headings(text):
        yield _Section(start, line_start, body, level, tuple(name for _, name in path))
        path = [entry for entry in path if entry[0] < depth] + [(depth, heading)]
        start, body, level = line_start, line_end, depth
    yield _Section(start, len(text), body, level, tuple(name for _, name in path))


def _headings(text: str) -> Iterator[tuple[int, int, int, str]]:
    """Yield (line start, line end, level, heading) of each ATX heading outside fenced code.

    A heading has a blank line or another heading before it: documentation is full of ``# comments`` within examples.
    Underlined headings are read as text, because reference documentation underlines words inside sections.
    """
    fence, heading_end = "", -1
    for found in _MARK.finditer(text):
        start, stop = found.start(), text.find("\n", found.end() - 1)
        line_end = len(text) if stop < 0 else stop
        bare = text[start : min(line_end, start + MAX_HEADING)].lstrip("\ufeff").strip()
        if fence:
            fence = "" if bare.startswith(fence) and not bare.strip(fence[0]) else fence
        elif not bare.startswith("#"):
            fence = bare[:3]
        elif heading_end == start - 1 or _is_after_gap(text, start):
            level = len(bare) - len(bare.lstrip("#"))
            heading_end = line_end
            if heading := bare[level:].strip():
                yield start, line_end, level, heading.rstrip("#").rstrip() or heading


def _is_after_gap(text: str, start: int) -> bool:
    """Tell whether the line that begins at ``start`` is the first one or has a blank line before it."""
    lowest = max(0, start - MAX_HEADING)
    line_before = text[lowest : max(start - 1, 0)].rpartition("\n")[2]
    return not line_before.strip("\ufeff \t\r\f\v")


def _joined(text: str, sections: Iterable[_Section]) -> Iterator[_Section]:
    """Join a heading that has nothing under it but a deeper heading with that one."""
    held: _Section | None = None
    for section in sections:
        first, final = trim(text, section.start, section.end)
        if first == final:
            continue
        if held is not None and section.level > held.level:
            section = _Section(held.start, section.end, section.body, section.level, section.headings)
        elif held is not None:
            yield held
        held = section
        if section.level == 0 or trim(text, section.body, section.end)[0] < final:
            yield section
            held = None
    if held is not None:
        yield held


def _pack(text: str, section: _Section, config: ChunkConfig) -> Iterator[Span]:
    """Yield the spans of one section's chunks."""
    start, end = trim(text, section.start, section.end)
    if end - start <= config.max_chars:
        yield start, end
        return
    spans: list[Span] = []
    for first, final in _units(text, start, end, config):
        if spans and final - spans[-1][0] <= config.target_chars:
            spans[-1] = (spans[-1][0], final)
        else:
            spans.append((first, final))
    # A short rest is worth little alone: it goes to its neighbour where that stays within the limit.
    if len(spans) > 1 and spans[-1][1] - spans[-1][0] < config.target_chars // 4:
        if spans[-1][1] - spans[-2][0] <= config.max_chars:
            spans[-2:] = [(spans[-2][0], spans[-1][1])]
    yield from spans


def _units(text: str, start: int, end: int, config: ChunkConfig) -> Iterator[Span]:
    """Yield the smallest stretches worth keeping whole: blocks that fit, else sentences that fit, else pieces."""
    for first, final in split_blocks(text, start, end):
        if final - first <= config.target_chars // 2:
            yield first, final
            continue
        for begin, stop in split_sentences(text, first, final):
            yield from _pieces(text, begin, stop, config.target_chars)


def _pieces(text: str, start: int, end: int, length: int) -> Iterator[Span]:
    """Cut a stretch without sentences at white space near ``length``, or within a word where there is none."""
    while end - start > length:
        middle, limit = start + length // 2, start + length
        cut = max(text.rfind(" ", middle, limit), text.rfind("\n", middle, limit))
        cut = cut if cut > 0 else whole_character(text, start + length, start + 1)
        first, final = trim(text, start, cut)
        if first < final:
            yield first, final
        start = cut
    first, final = trim(text, start, end)
    if first < final:
        yield first, final
