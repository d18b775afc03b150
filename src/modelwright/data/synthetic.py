"""Instruction pairs and retrieval questions made from documents by rule, with the span that answers each.

How they are made, in full:

- *what*: "What does json.dumps do?" from a heading with a name; the answer is the first sentences below it.
- *arguments*: "Which arguments does json.dumps take?"; the answer is the heading's name and signature.
- *which*: "Which function serializes obj to a JSON formatted str?" from the first sentence when it begins with a verb
  that is known, put into the third person, cut at its first aside; the name does not occur in it. Questions for
  retrieval swap some words for others of the same meaning, and name the class or module where the sentence alone
  ("Return the size.") would fit many places.
- *define*: "What is a widget?" from a sentence of the form "A widget is ..."; *section*: from a heading in prose;
  *topic*: a phrase from a sentence in prose (pairs only); *keywords*: the rarest words of a sentence, as people type
  into a search box (questions only).

An answer is always a quote: ``document.text[start:end]``. Nothing here is written by a model, so the questions are
plainer than those of people. Left out for retrieval: a question whose answer stands in more than one place, one whose
first sentence begins another section too, and one from a heading whose words all stand in another heading.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from modelwright.base.types import Document, Message
from modelwright.data.passages import Section, Span, opening, paragraphs, sections, sentences, summary
from modelwright.data.phrasing import (
    content_words,
    define_question,
    heading_question,
    imperative_phrase,
    key_phrase,
    paraphrase,
    verb_phrase,
)

TOPIC_CHARS = 300  # at least this far apart stand the sentences that a "topic" pair is made from
MAX_PARAGRAPHS = 2000  # of one document that are searched for definitions and key words

_DOES = ("What does {name} do?", "What is {name} for?", "Explain {name}.", "What is the purpose of {name}?")
_WHAT = {
    "function": _DOES,
    "method": _DOES,
    "class": ("What is the class {name} for?", "What is {name}?", "What does the class {name} do?", "Explain {name}."),
    "module": ("What is the module {name} for?", "What does the {name} module do?", "What is {name}?"),
    "attribute": ("What is {name}?", "What does {name} hold?", "Explain {name}."),
}
_ARGUMENTS = (
    "What are the arguments of {name}?",
    "Which arguments does {name} take?",
    "What is the signature of {name}?",
    "How do I call {name}?",
)
_WHICH = ("Which {kind} {phrase}?", "What {kind} {phrase}?", "Name the {kind} that {phrase}.")
_WHICH_IN = ("Which {kind} of {place} {phrase}?", "In {place}, which {kind} {phrase}?")
_HOW = ("How do I {phrase}?", "How can I {phrase} in Python?", "I want to {phrase}. What should I use?")
_TOPIC = ("What do the documents say about {phrase}?", "What is said about {phrase}?", "Tell me about {phrase}.")
# Shares of the kinds among the questions, as far as the documents give them.
_SHARES = {"what": 0.35, "which": 0.4, "arguments": 0.25, "define": 0.4, "section": 0.4, "keywords": 0.2}


@dataclass(frozen=True)
class Pair:
    """A question and its answer as a conversation; the answer is ``text[start:end]`` of the document."""

    id: str
    messages: tuple[Message, ...]
    document: str
    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Question:
    """A question and where its answer stands."""

    text: str
    document: str
    start: int
    end: int
    kind: str


def make_pairs(documents: Sequence[Document], seed: int = 0) -> list[Pair]:
    """Return instruction pairs from every section that gives some, in the order of the documents.

    The wording of a pair depends on the seed and its own place, so it stays when other documents come or go.
    """
    corpus = _Corpus(documents)
    pairs: list[Pair] = []
    asked: set[str] = set()
    for document in documents:
        for question in _training_questions(document, corpus, seed):
            if question.text in asked:
                continue  # the same question with another answer would teach contradiction
            asked.add(question.text)
            answer = document.text[question.start : question.end]
            messages = (Message("user", question.text), Message("assistant", answer))
            name = f"{document.id}:{question.start}:{question.kind}"
            pairs.append(Pair(name, messages, document.id, question.start, question.end, question.kind))
    return pairs


def make_questions(
    documents: Sequence[Document], num: int, seed: int = 0, *, corpus: Sequence[Document] | None = None
) -> list[Question]:
    """Return up to ``num`` questions about the documents for measuring retrieval, kinds and documents mixed.

    Args:
        documents: What is asked about, for instance the held-out ones.
        num: How many at most.
        seed: Chooses the questions and their wording.
        corpus: All documents that are searched; a question whose answer also stands elsewhere in them is dropped.
            None means the documents themselves.
    """
    known = _Corpus(corpus if corpus is not None else documents)
    by_kind: dict[str, list[Question]] = {}
    for document in documents:
        for question in _search_questions(document, known, seed):
            by_kind.setdefault(question.kind, []).append(question)
    rng = random.Random(f"{seed}:questions")
    for found in by_kind.values():
        found.sort(key=lambda question: (question.document, question.start, question.text))
        rng.shuffle(found)
    texts = {document.id: document.text for document in documents}
    chosen: list[Question] = []
    asked: set[str] = set()
    for question in _interleave(by_kind):
        if len(chosen) == num:
            break
        quote = texts[question.document][question.start : question.end]
        if question.text.casefold() in asked or not known.is_unique(quote):
            continue
        asked.add(question.text.casefold())
        chosen.append(question)
    return chosen


def _interleave(by_kind: dict[str, list[Question]]) -> Iterator[Question]:
    """Yield from each kind in proportion to its share until all are used up."""
    places = dict.fromkeys(by_kind, 0)
    while places:
        kind = min(places, key=lambda kind: ((places[kind] + 1) / _SHARES[kind], kind))
        yield by_kind[kind][places[kind]]
        places[kind] += 1
        if places[kind] == len(by_kind[kind]):
            del places[kind]


class _Corpus:
    """What is known of all documents together: which sentences are said once, and which words are rare."""

    def __init__(self, documents: Sequence[Document]):
        self._texts = [document.text for document in documents]
        self.num_sections = 0
        self._summaries: Counter[str] = Counter()
        self._frequency: Counter[str] = Counter()
        self._headings: dict[str, set[tuple[str, int]]] = {}  # word -> the places of headings that hold it
        for document in documents:
            for section in sections(document):
                for word in _heading_words(section.heading):
                    self._headings.setdefault(word, set()).add((document.id, section.head[0]))
                span = summary(document.text, section)
                if span is None:
                    continue
                self.num_sections += 1
                said = document.text[slice(*span)]
                self._summaries[_normal(said)] += 1
                self._frequency.update(set(content_words(said)))

    def is_said_once(self, said: str) -> bool:
        """Whether no other section begins with this sentence."""
        return self._summaries[_normal(said)] <= 1

    def is_only_heading(self, heading: str) -> bool:
        """Whether no other heading holds all words of this one ("Sequences" is also asked by "Sequence types")."""
        places = [self._headings.get(word, set()) for word in _heading_words(heading)]
        return bool(places) and len(set.intersection(*places)) == 1

    def is_unique(self, quote: str) -> bool:
        """Whether the quote stands in one place only."""
        return sum(text.count(quote) for text in self._texts) == 1

    def rank(self, word: str) -> int:
        """In how many summaries the word stands; rare words first."""
        return self._frequency[word]

    def num_rare(self, phrase: str) -> int:
        """How many words of the phrase stand in less than one of a hundred summaries (or in no more than three)."""
        limit = max(3, self.num_sections // 100)
        return sum(self._frequency[word] <= limit for word in set(content_words(phrase)))


def _heading_words(heading: str) -> set[str]:
    words = re.findall(r"[^\W\d_]+|\d+", heading.partition("(")[0].casefold())
    return {word.removesuffix("s") for word in words if word not in ("class", "the", "a", "an", "of", "and")}


def _normal(said: str) -> str:
    return " ".join(said.split()).casefold().rstrip(".")


def _training_questions(document: Document, corpus: _Corpus, seed: int) -> Iterator[Question]:
    for section in sections(document):
        rng = random.Random(f"{seed}:{document.id}:{section.head}")
        span = summary(document.text, section)
        if section.is_symbol:
            yield from _symbol_questions(document, section, span, corpus, rng)
        else:
            yield from _prose_questions(document, section, span, rng)
            yield from _topic_questions(document, section, rng)


def _symbol_questions(
    document: Document, section: Section, span: Span | None, corpus: _Corpus, rng: random.Random
) -> Iterator[Question]:
    name, heading = section.symbol, _call_span(section)
    if span is not None:
        answer = opening(document.text, span)
        for text in rng.sample(_WHAT[section.kind], 2):
            yield Question(text.format(name=name), document.id, *answer, "what")
    if section.signature.strip("()."):
        yield Question(rng.choice(_ARGUMENTS).format(name=name), document.id, *heading, "arguments")
    if span is None or not corpus.is_said_once(document.text[slice(*span)]):
        return
    phrase = verb_phrase(document.text[slice(*span)], name, section.kind)
    if phrase and corpus.num_rare(phrase):
        text = rng.choice(_WHICH).format(kind=section.kind, phrase=phrase)
        yield Question(text, document.id, *heading, "which")


def _call_span(section: Section) -> Span:
    """The span of name and signature within the heading."""
    start = section.head[0] + section.heading.index(section.symbol)
    return start, start + len(section.symbol) + len(section.signature)


def _prose_questions(document: Document, section: Section, span: Span | None, rng: random.Random) -> Iterator[Question]:
    if span is not None and section.head[1]:
        text = heading_question(section.heading, rng)
        if text:
            yield Question(text, document.id, *opening(document.text, span), "section")
    for start, end in _prose_sentences(document.text, section):
        text = define_question(document.text[start:end])
        if text:
            yield Question(text, document.id, start, end, "define")


def _topic_questions(document: Document, section: Section, rng: random.Random) -> Iterator[Question]:
    """Ask about a phrase of one sentence in each stretch of prose, so that texts without headings teach too."""
    asked_at = section.body[0] - TOPIC_CHARS
    for start, end in _prose_sentences(document.text, section):
        phrase = key_phrase(document.text[start:end]) if start - asked_at >= TOPIC_CHARS else ""
        if phrase:
            asked_at = start
            yield Question(rng.choice(_TOPIC).format(phrase=phrase), document.id, start, end, "topic")


def _prose_sentences(text: str, section: Section) -> Iterator[Span]:
    for number, paragraph in enumerate(paragraphs(text, section.body)):
        if number == MAX_PARAGRAPHS:
            return
        for start, end in sentences(text, paragraph):
            if 30 <= end - start <= 400:
                yield start, end


def _search_questions(document: Document, corpus: _Corpus, seed: int) -> Iterator[Question]:
    for section in sections(document):
        rng = random.Random(f"{seed}:{document.id}:{section.head}:search")
        span = summary(document.text, section)
        if section.is_symbol:
            if span is not None and corpus.is_said_once(document.text[slice(*span)]):
                yield from _symbol_searches(document, section, span, corpus, rng)
        else:
            is_clear = corpus.is_only_heading(section.heading)
            yield from _prose_questions(document, section, span if is_clear else None, rng)
            yield from _keyword_searches(document, section, corpus, rng)


def _symbol_searches(
    document: Document, section: Section, span: Span, corpus: _Corpus, rng: random.Random
) -> Iterator[Question]:
    name, said = section.symbol, document.text[slice(*span)]
    yield Question(rng.choice(_WHAT[section.kind]).format(name=name), document.id, *span, "what")
    if "," in section.signature:
        yield Question(rng.choice(_ARGUMENTS).format(name=name), document.id, *_call_span(section), "arguments")
    kind, place = section.kind, name.rpartition(".")[0]
    phrase, bare = verb_phrase(said, name, kind), imperative_phrase(said, name, kind)
    if not phrase or not corpus.num_rare(phrase):
        return
    if corpus.num_rare(phrase) >= 2:
        how = rng.choice(_HOW).format(phrase=paraphrase(bare, rng)) if bare else ""
        which = rng.choice(_WHICH).format(kind=kind, phrase=paraphrase(phrase, rng))
        yield Question(rng.choice([which, how or which]), document.id, *span, "which")
    elif place:
        text = rng.choice(_WHICH_IN).format(kind=kind, place=place, phrase=paraphrase(phrase, rng))
        yield Question(text, document.id, *span, "which")


def _keyword_searches(document: Document, section: Section, corpus: _Corpus, rng: random.Random) -> Iterator[Question]:
    spans = [span for span in _prose_sentences(document.text, section) if span[1] - span[0] >= 60]
    for start, end in rng.sample(spans, min(2, len(spans))):
        words = list(dict.fromkeys(content_words(document.text[start:end])))
        ranked = sorted(words, key=corpus.rank)[:5]
        if len(ranked) == 5:
            yield Question(" ".join(word for word in words if word in ranked), document.id, start, end, "keywords")
