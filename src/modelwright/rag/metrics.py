"""How good a search is, and whether citations say what their documents say.

A question counts as found at rank r when the r-th hit overlaps the span its answer stands in, in the right document.
Source: Voorhees 1999 (mean reciprocal rank). Not done: graded relevance.
"""

from collections.abc import Sequence
from typing import Protocol

from modelwright.rag.answer import Answer
from modelwright.rag.index import Hit, Index


class Answered(Protocol):
    """A question whose answer is known to stand at a span of a document."""

    @property
    def document(self) -> str:
        """Id of the document."""
        ...

    @property
    def start(self) -> int:
        """First character of the span."""
        ...

    @property
    def end(self) -> int:
        """One past the last character of the span."""
        ...


def first_rank(question: Answered, hits: Sequence[Hit]) -> int | None:
    """Return the rank, from 1, of the first hit that overlaps the answer's span; None when there is none."""
    for rank, hit in enumerate(hits, start=1):
        if hit.doc == question.document and hit.start < question.end and question.start < hit.end:
            return rank
    return None


def retrieval_scores(questions: Sequence[Answered], hits: Sequence[Sequence[Hit]]) -> dict[str, float]:
    """Return recall at 1, 5 and 10, the mean reciprocal rank (0 beyond the hits given) and the number of questions."""
    ranks = [first_rank(question, found) for question, found in zip(questions, hits, strict=True)]
    count = max(len(ranks), 1)
    scores: dict[str, float] = {
        f"recall_at_{k}": sum(rank is not None and rank <= k for rank in ranks) / count for k in (1, 5, 10)
    }
    scores["mrr"] = sum(1 / rank for rank in ranks if rank) / count
    scores["num_questions"] = len(ranks)
    return scores


def check_citations(index: Index, answers: Sequence[Answer]) -> dict[str, int]:
    """Compare every citation's quote with the span it names, character by character and byte by byte."""
    checked = exact = 0
    for answer in answers:
        for citation in answer.citations:
            checked += 1
            span = index.document(citation.doc).text[citation.start : citation.end]
            exact += bool(citation.quote) and span.encode() == citation.quote.encode()
    return {"checked": checked, "exact": exact}
