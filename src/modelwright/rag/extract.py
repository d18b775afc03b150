"""The sentences that support a question best, and whether they support it enough.

Support of a sentence = its likeness to the question by the sentence encoder (read together with the heading it stands
under) + the question's words that it or its heading holds + the rank of its passage + a little for leading sentences,
where documentation says what a thing is. All weights are plain numbers below, found on development questions.
"""

import re
from dataclasses import dataclass

import numpy as np

from modelwright.rag.bm25 import query_terms, terms_of, words_of
from modelwright.rag.index import MAX_SHOWN_HEADING, Hit, Index, Scores
from modelwright.rag.sentence import Span, split_sentences

MAX_QUOTES = 3
MAX_SENTENCES = 40  # of one passage that are weighed
MAX_QUOTE_CHARS = 600  # a quote grows no longer than this
# Support of a whole answer: likeness + COVERAGE * the part of the question that one of the best passages holds.
# Refused of answerable / answered of unanswerable questions, when these were chosen: reference questions 1 % / 2 %
# (300 of NQ-open and 200 of XQuAD as unanswerable), XQuAD 8 % / 2 %, COVID-QA 2 % / 1 %; without vectors, by the part
# held alone: 11 % / 8 % (XQuAD), 5 % / 3 % (COVID-QA). Development questions; no separate test set yet.
COVERAGE, LEAST_SUPPORT, LEAST_COVERAGE = 0.5, 0.65, 0.45
LIKENESS, WORDS, RANK, LEAD = 1.0, 0.5, 1.0, 0.15  # weights of the four parts
NEAR = 0.9  # a further quote needs this share of the best one's support
GROW = 0.85  # a neighbouring sentence needs this share of the best one's support

_ASKS_FOR_FORM = re.compile(r"(?i)\b(argument|parameter|signature|keyword|how (do|can|should) (i|you|we) call)s?\b")
_HEADING_LINE = re.compile(r" {0,3}#{1,6}[ \t]+")


@dataclass(frozen=True)
class Quote:
    """A span of a document to be quoted."""

    doc: str
    start: int
    end: int
    text: str
    label: str  # the heading it stands under, or "" where question or quote name it
    support: float


@dataclass(frozen=True)
class _Candidate:
    hit: int
    place: int  # among the sentences of its passage
    start: int  # in the document
    end: int
    is_heading: bool
    is_lead: bool


def extract(index: Index, question: str, k: int) -> tuple[list[Quote], list[Hit]]:
    """Return the quotes that answer a question, best first, and the passages they were taken from.

    No quotes: the documents do not support an answer.
    """
    scores = index.scores(question)
    hits = index.hits(scores.bm25 if scores.fused is None else scores.fused, k)
    if not hits or not is_supported(index, question, scores, hits):
        return [], hits
    candidates = [c for number, hit in enumerate(hits) for c in _candidates(number, hit)]
    support = _support(index, question, hits, candidates)
    return _choose(question, hits, candidates, support), hits


def is_supported(index: Index, question: str, scores: Scores, hits: list[Hit]) -> bool:
    """Tell whether the best passages have enough to do with the question to be quoted."""
    return support_of(index, question, scores, hits) >= 0


def support_of(index: Index, question: str, scores: Scores, hits: list[Hit]) -> float:
    """Return how far the passages support the question; below 0 they do not."""
    coverage = max(index.bm25.coverage(question, hit.chunk) for hit in hits[:3])
    if scores.dense is None:
        return coverage - LEAST_COVERAGE
    likeness = max(float(scores.dense[hit.chunk]) for hit in hits[:3])
    return likeness + COVERAGE * coverage - LEAST_SUPPORT


def _candidates(number: int, hit: Hit) -> list[_Candidate]:
    """Return the sentences of one passage; a heading is one of them, without its number signs."""
    found: list[_Candidate] = []
    is_lead = True
    for place, (start, end) in enumerate(split_sentences(hit.text)[:MAX_SENTENCES]):
        mark = _HEADING_LINE.match(hit.text, start, end)
        if mark is None:
            found.append(_Candidate(number, place, hit.start + start, hit.start + end, False, is_lead))
            is_lead = False
        else:
            found.append(_Candidate(number, place, hit.start + mark.end(), hit.start + end, True, False))
    return found


def _support(index: Index, question: str, hits: list[Hit], candidates: list[_Candidate]) -> np.ndarray:
    """Return the support of every candidate, shape (candidates,)."""
    idf = {term: index.bm25.idf(term) for term in query_terms(question)}
    total = sum(idf.values()) or 1.0
    texts = [_text(hits, c) for c in candidates]
    support = np.zeros(len(candidates))
    for row, (c, text) in enumerate(zip(candidates, texts, strict=True)):
        held = {term for word in words_of(f"{hits[c.hit].heading} {text}") for term in terms_of(word)}
        words = sum(weight for term, weight in idf.items() if term in held) / total
        rank = hits[c.hit].score / hits[0].score
        support[row] = WORDS * words + RANK * rank + LEAD * c.is_lead
        if c.is_heading:
            support[row] += LEAD if _ASKS_FOR_FORM.search(question) else -2 * LEAD
    if index.has_vectors:
        embedder = index.embedder
        shown = [f"{hits[c.hit].heading[:MAX_SHOWN_HEADING]}: {t}" for c, t in zip(candidates, texts, strict=True)]
        support += LIKENESS * embedder.embed(shown) @ embedder.embed([question], role="query")[0]
    return support


def _text(hits: list[Hit], candidate: _Candidate) -> str:
    hit = hits[candidate.hit]
    return hit.text[candidate.start - hit.start : candidate.end - hit.start]


def _choose(question: str, hits: list[Hit], candidates: list[_Candidate], support: np.ndarray) -> list[Quote]:
    """Return quotes from the best-supported candidates, one a passage, each grown by its neighbours."""
    asked = {term for word in words_of(question) for term in terms_of(word)}
    quotes: list[Quote] = []
    used: set[int] = set()
    for row in np.argsort(-support, kind="stable"):
        c = candidates[row]
        if len(quotes) == MAX_QUOTES or support[row] < NEAR * support.max():
            break
        if c.hit in used:
            continue
        used.add(c.hit)
        hit = hits[c.hit]
        start, end = _grown(hit, candidates, support, int(row))
        text = hit.text[start - hit.start : end - hit.start]
        name = hit.heading.split("(")[0]
        is_named = not name or c.is_heading or {t for w in words_of(name) for t in terms_of(w)} <= asked
        quotes.append(Quote(hit.doc, start, end, text, "" if is_named else hit.heading, float(support[row])))
    return quotes


def _grown(hit: Hit, candidates: list[_Candidate], support: np.ndarray, row: int) -> Span:
    """Return the span of a sentence with the neighbours in its paragraph that are supported nearly as well."""
    first = last = row
    while last + 1 < len(candidates) and _joins(hit, candidates, support, last, last + 1, row):
        last += 1
    while first and _joins(hit, candidates, support, first - 1, first, row):
        first -= 1
    return candidates[first].start, candidates[last].end


def _joins(hit: Hit, candidates: list[_Candidate], support: np.ndarray, one: int, other: int, best: int) -> bool:
    """Tell whether two neighbouring candidates belong into one quote around the best one."""
    a, b, added = candidates[one], candidates[other], other if other > best else one
    if a.hit != b.hit or a.is_heading or b.is_heading or support[added] < GROW * support[best]:
        return False
    gap = hit.text[a.end - hit.start : b.start - hit.start]
    length = max(b.end, candidates[best].end) - min(a.start, candidates[best].start)
    return gap.count("\n") <= 1 and length <= MAX_QUOTE_CHARS
