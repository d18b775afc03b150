"""Take out runs of sentences that stood before, in an earlier document or earlier in the same one.

C4 keeps one of any three-sentence span that occurs more than once. A run is given by its sentences, white space and
case apart; sentences of which one lies in a repeated run go, all others stay as they are. A sentence ends with a stop,
an exclamation or question mark, of western or Chinese kind, and what is left behind the last one is a sentence too.

Source: Raffel et al., "Exploring the Limits of Transfer Learning" (JMLR 2020), section 2.2 (their published code
compares single lines instead: that is `RepeatedPieces` with unit line).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document
from modelwright.data.dedup import find_repeated, mark_piece
from modelwright.data.filters import SENTENCE_END
from modelwright.data.step import Removal

Decision = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class RepeatedSentences:
    """Takes out runs of sentences that stood before. In mind during the decision: 24 bytes a sentence."""

    num_sentences: int = 3  # of a run

    def __post_init__(self) -> None:
        if self.num_sentences < 1:
            raise ConfigError(f"num_sentences is {self.num_sentences}; a run has at least 1 sentence.")

    def sign(self, document: Document) -> bytes:
        """Return the marks of all runs; they overlap."""
        sentences = cut_sentences(document.text)
        starts = range(len(sentences) - self.num_sentences + 1)
        return b"".join(mark_piece(" ".join(sentences[i : i + self.num_sentences])) for i in starts)

    def decide(self, signatures: Iterable[tuple[str, bytes]]) -> Mapping[str, Decision]:
        """Return for each document with repeated runs (number of the run, where it stood first)."""
        return find_repeated(signatures)

    def apply(self, document: Document, decision: Decision) -> Document | Removal:
        """Return the document without the sentences of repeated runs; a removal if nothing is left."""
        gone = {place + i for place, _ in decision for i in range(self.num_sentences)}
        kept = [sentence for i, sentence in enumerate(cut_sentences(document.text)) if i not in gone]
        text = "".join(kept).strip()
        if not text:
            return Removal(f"every run of {self.num_sentences} sentences stood before, the first in {decision[0][1]}")
        return replace(document, text=f"{text}\n")


def cut_sentences(text: str) -> list[str]:
    """Cut a text behind each end of a sentence; the pieces joined are the text.

    >>> cut_sentences("One. Is it two? Three")
    ['One.', ' Is it two?', ' Three']
    """
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    pieces = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    if len(pieces) > 1 and not pieces[-1].strip():
        rest = pieces.pop()
        pieces[-1] += rest
    return pieces
