"""What a pipeline is made of: steps that judge, change or compare documents.

A step is a frozen dataclass; its fields are its settings, so a YAML file and the library spell it alike, and it can be
pickled to a worker process or a Ray actor. It has one of three shapes:

- a `Filter` judges a document by itself: ``reason(document)`` is empty to keep it, else says why it goes;
- a `Mapper` changes a document by itself: ``change(document)``;
- a `CorpusStep` needs to see all documents (duplicates): ``sign`` makes a small record of each, in any process;
  ``decide`` reads the records of all documents in their order, in one process; ``apply`` carries a decision out.

No step may depend on the order, number or identity of the workers: the same documents give the same output bytes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from modelwright.base.types import Document


@dataclass(frozen=True)
class Removal:
    """Why a document, or a piece of one, was taken out."""

    reason: str  # for people, with the figure and the threshold: "only 12 words, at least 50"
    start: int | None = None  # where it stood, if only a piece went; None: the whole document
    end: int | None = None


@runtime_checkable
class Filter(Protocol):
    """Judges a document by itself."""

    def reason(self, document: Document) -> str:
        """Say why the document is to go; empty to keep it."""
        ...


@runtime_checkable
class Mapper(Protocol):
    """Changes a document by itself; an empty text afterwards removes it with that reason."""

    def change(self, document: Document) -> Document:
        """Return the document as it is to go on."""
        ...


@runtime_checkable
class CorpusStep(Protocol):
    """Compares documents with each other, in two passes."""

    def sign(self, document: Document) -> Any:
        """Return what `decide` needs to know of the document: small and picklable (hashes, counts)."""
        ...

    def decide(self, signatures: Iterable[tuple[str, Any]]) -> Mapping[str, Any]:
        """From (id, signature) of all documents in their order to id -> decision; without one a document is kept."""
        ...

    def apply(self, document: Document, decision: Any) -> Document | Removal:
        """Carry the decision out."""
        ...


Step = Filter | Mapper | CorpusStep


def run_step(step: Step, documents: Sequence[Document]) -> list[Document | Removal]:
    """Run one step over documents in memory, as a pipeline does over files; what goes becomes a `Removal`."""
    if isinstance(step, Filter):
        return [Removal(why) if (why := step.reason(document)) else document for document in documents]
    if isinstance(step, Mapper):
        return [step.change(document) for document in documents]
    decisions = decide_all(step, documents)
    return [step.apply(d, decisions[i]) if i in decisions else d for i, d in enumerate(documents)]


def decide_all(step: CorpusStep, documents: Sequence[Document]) -> dict[int, Any]:
    """Return what a step that compares documents decides, by the places of the documents that it is about."""
    # Some steps sign many texts at once much faster than one by one.
    sign_all = getattr(step, "sign_all", None)
    signatures = sign_all(documents) if sign_all is not None else map(step.sign, documents)
    names = list(name_uniquely(document.id for document in documents))
    decisions = step.decide(zip(names, signatures, strict=True))
    return {place: decisions[name] for place, name in enumerate(names) if name in decisions}


def name_uniquely(ids: Iterable[str]) -> Iterator[str]:
    """Yield ids; of those that are equal the later ones get a number behind, so that a decision is about one of them.

    >>> list(name_uniquely(["a", "b", "a", "a"]))
    ['a', 'b', 'a#2', 'a#3']
    """
    seen: set[int] = set()
    times: dict[str, int] = {}
    for name in ids:
        unique = name
        while hash(unique) in seen:
            times[name] = times.get(name, 1) + 1
            unique = f"{name}#{times[name]}"
        seen.add(hash(unique))
        yield unique
