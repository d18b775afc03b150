from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from modelwright.data.read import read_documents
from modelwright.data.reference import write_reference
from modelwright.data.synthetic import make_questions
from modelwright.rag.answer import Answer, Citation, ask
from modelwright.rag.embed import Embedder
from modelwright.rag.index import Hit, Index
from modelwright.rag.metrics import check_citations, first_rank, retrieval_scores

MODULES = "textwrap json shutil datetime collections csv fractions heapq glob tempfile calendar statistics".split()


@dataclass(frozen=True)
class Asked:
    document: str
    start: int
    end: int


def hit(doc: str, start: int, end: int) -> Hit:
    return Hit(doc, start, end, "", 1.0)


@pytest.mark.parametrize(
    ("span", "rank"), [((0, 5), 1), ((9, 11), 1), ((10, 20), 2), ((29, 90), 2), ((30, 40), None), ((5, 25), 1)]
)
def test_a_hit_counts_where_it_overlaps_the_span(span: tuple[int, int], rank: int | None):
    assert first_rank(Asked("a", *span), [hit("a", 0, 10), hit("a", 10, 30)]) == rank


def test_another_document_does_not_count():
    assert first_rank(Asked("a", 0, 5), [hit("b", 0, 5)]) is None


def test_recall_and_reciprocal_rank_by_hand():
    found = [hit("x", 0, 1)] * 10
    hits = [[hit("a", 0, 9), *found], [*found[:2], hit("a", 0, 9)], [*found[:6], hit("a", 0, 9)], found]
    scores = retrieval_scores([Asked("a", 0, 5)] * 4, hits)
    assert scores == {
        "recall_at_1": 0.25,
        "recall_at_5": 0.5,
        "recall_at_10": 0.75,
        "mrr": pytest.approx((1 + 1 / 3 + 1 / 7) / 4),
        "num_questions": 4,
    }


def test_no_questions_are_no_nan():
    assert retrieval_scores([], [])["mrr"] == 0


def test_a_forged_citation_is_counted_as_not_exact(lexical: Index):
    answer = ask(lexical, "What does textwrap.dedent do?")
    forged = [replace(answer.citations[0], start=answer.citations[0].start + 1), replace(answer.citations[0], quote="")]
    fake = Answer("", tuple(forged), "extractive", True)
    assert check_citations(lexical, [fake]) == {"checked": 2, "exact": 0}
    assert isinstance(forged[0], Citation)


@pytest.fixture(scope="module")
def library(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder: Path = tmp_path_factory.mktemp("library")
    write_reference(folder / "pages")
    documents = [d for d in read_documents(folder / "pages").documents if d.id.removesuffix(".md") in MODULES]
    return Index.build(documents, folder / "index", embedder=embedder)


def test_the_standard_library_is_found_and_chance_does_not_find_it(library: Index):
    questions = make_questions(library.documents, 120, seed=5)
    assert len(questions) >= 80
    all_scores = [library.scores(question.text) for question in questions]
    found = {
        mode: retrieval_scores(questions, [library.hits(getattr(s, mode), 10) for s in all_scores])
        for mode in ("bm25", "dense", "fused")
    }
    assert found["fused"]["recall_at_5"] >= max(0.9, found["bm25"]["recall_at_5"] - 0.01, found["dense"]["recall_at_5"])
    rng = np.random.default_rng(0)
    chance = [library.hits(rng.random(len(library.chunks)), 5) for _ in questions]
    assert retrieval_scores(questions, chance)["recall_at_5"] < 0.3


def test_answers_about_the_standard_library_quote_the_right_place(library: Index):
    questions = [q for q in make_questions(library.documents, 60, seed=6) if q.kind in ("what", "which", "arguments")]
    answers = [ask(library, question.text) for question in questions]
    right = [
        first_rank(q, [hit(c.doc, c.start, c.end) for c in a.citations])
        for q, a in zip(questions, answers, strict=True)
    ]
    assert np.mean([rank is not None for rank in right]) >= 0.8
    cited = check_citations(library, answers)
    assert cited["exact"] == cited["checked"] >= len(questions) // 2
