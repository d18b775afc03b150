"""Measure an index: questions made from its documents, each way of searching, and citations checked span by span."""

from pathlib import Path
from typing import Any

from modelwright.base.errors import DataError
from modelwright.base.progress import track
from modelwright.data.pipeline import load_dataset
from modelwright.data.synthetic import make_questions
from modelwright.rag.answer import ask
from modelwright.rag.index import Index, Mode
from modelwright.rag.metrics import check_citations, retrieval_scores

NUM_CITED_ANSWERS = 60  # answers whose citations are checked


def score_index(
    path: Path, *, data: Path | None = None, num_questions: int = 300, seed: int = 0, embedder: str | None = None
) -> dict[str, Any]:
    """Return recall and MRR of BM25, dense and fused search, and how many citations equal their source.

    Args:
        path: Folder of the index.
        data: Data set; only documents of its held-out part are asked about. None: all of the index.

    Raises:
        DataError: No question can be made from the documents.
    """
    index = Index.open(path, embedder=embedder)
    documents = index.documents
    if data is not None:
        held_out = {document.id for document in load_dataset(data)[1]}
        documents = [document for document in documents if document.id in held_out]
    questions = make_questions(documents, num_questions, seed=seed)
    if not questions:
        raise DataError(
            f"No question can be made from the {len(documents)} documents of {path} that may be asked about."
        )
    modes: tuple[Mode, ...] = ("bm25", "dense", "fused") if index.has_vectors else ("bm25",)
    found: dict[str, Any] = {}
    for mode in modes:
        hits = [index.search(question.text, 10, mode=mode) for question in track(questions, f"search, {mode}")]
        found[mode] = retrieval_scores(questions, hits)
    answers = [ask(index, question.text) for question in track(questions[:NUM_CITED_ANSWERS], "check citations")]
    return {"retrieval": found, "citations": check_citations(index, answers)}
