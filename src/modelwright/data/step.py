"""What a pipeline is made of: steps that judge, change or compare documents.

A step is a frozen dataclass; its fields are its settings, so a YAML file and the library spell it alike, and it can be
pickled to a worker process or a Ray actor. It has one of three shapes:

- a `Filter` judges a document by itself: ``reason(document)`` is empty to keep it, else says why it goes;
- a `Mapper` changes a document by itself: ``change(document)``;
- a `CorpusStep` needs to see all documents (duplicates): ``sign`` makes a small record of each, in any process;
  ``decide`` reads the records of all documents in their order, in one process; ``apply`` carries a decision out.

No step may depend on the order, number or identity of the workers: the same documents give the same output bytes.
"""

from collections.abc import Iterable, Mapping
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
