"""The index: documents, their chunks, BM25 postings and sentence vectors in one folder.

    documents.jsonl  chunks.jsonl  bm25.npz  vectors.safetensors  failures.jsonl  manifest.json

Chunks are kept as spans alone, so what is quoted can only be what the document says. Nothing is unpickled, document
ids are keys and never paths, and every file is checked against the hash it was sealed with when the index is opened.
"""

import threading
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from modelwright.base.artifact import MANIFEST, new_artifact, read_manifest
from modelwright.base.config import build, to_dict
from modelwright.base.errors import CheckpointError, DataError, RequestError
from modelwright.base.files import hash_file, read_jsonl, write_jsonl
from modelwright.base.types import Document
from modelwright.data.read import Failure, document_row, load_documents, load_failures, read_documents, row_document
from modelwright.rag.bm25 import Bm25, Bm25Config
from modelwright.rag.chunk import Chunk, ChunkConfig, chunk_documents
from modelwright.rag.embed import Embedder
from modelwright.rag.fuse import FusionConfig, best, fuse

DOCUMENTS, CHUNKS, BM25, VECTORS, FAILURES = (
    "documents.jsonl",
    "chunks.jsonl",
    "bm25.npz",
    "vectors.safetensors",
    "failures.jsonl",
)
MAX_QUERY_CHARS = 8000
MAX_HITS = 1000
MAX_MARK = 10  # characters in front of a heading: the number signs and spaces
MAX_SHOWN_HEADING = 120  # characters of a heading that go in front of what stands under it

Mode = Literal["fused", "bm25", "dense"]


@dataclass(frozen=True)
class IndexConfig:
    """How an index is built."""

    has_vectors: bool = True  # False: BM25 alone, and no encoder is needed
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    bm25: Bm25Config = field(default_factory=Bm25Config)
    fusion: FusionConfig = field(default_factory=FusionConfig)


@dataclass(frozen=True)
class Hit:
    """A chunk that was found: ``text == document.text[start:end]``."""

    doc: str
    start: int
    end: int
    text: str
    score: float  # by the mode of the search; fused scores lie between 0 and 1
    heading: str = ""  # the chunk's own heading
    headings: tuple[str, ...] = ()  # the whole path, outermost first
    chunk: int = 0  # place in the index


@dataclass(frozen=True)
class Scores:
    """Every chunk's scores for one query, each of shape (chunks,)."""

    bm25: np.ndarray
    dense: np.ndarray | None  # cosine; None in an index without vectors
    fused: np.ndarray | None


class Index:
    """Passages that can be searched. Made by `Index.build`, read back by `Index.open`; safe to use from threads."""

    def __init__(
        self,
        path: Path,
        documents: Sequence[Document],
        chunks: Sequence[Chunk],
        bm25: Bm25,
        vectors: np.ndarray | None,
        config: IndexConfig,
    ):
        """Hold what `Index.open` has read and checked; callers use that."""
        self.path = path
        self.chunks = chunks
        self.bm25 = bm25
        self.config = config
        self._documents = {document.id: document for document in documents}
        self._vectors = vectors
        self._embedder: Embedder | None = None
        self._encoder: dict[str, Any] = {}
        self._source: str | Path | None = None
        self._lock = threading.Lock()

    @staticmethod
    def build(
        source: str | Path | Iterable[Document],
        out: str | Path,
        *,
        embedder: Embedder | str | Path | None = None,
        config: IndexConfig | None = None,
    ) -> "Index":
        """Build an index of a folder (or file, or documents artifact, or documents) at ``out`` and open it.

        Args:
            source: Where the documents are.
            out: The index's folder; an older index there is replaced when the new one is complete.
            embedder: The sentence encoder or where it is; None: the default one.
            config: Chunk, BM25 and fusion settings.

        Raises:
            DataError: There is nothing to index, or two documents share an id.
            MissingEmbedderError: No sentence encoder was given and none is installed.
        """
        config, out = config or IndexConfig(), Path(out)
        documents, failures, parents = _documents_of(source)
        chunks = chunk_documents(documents, config.chunk)
        if not chunks:
            raise DataError(f"None of the {len(documents)} documents has any text; expected at least one that has.")
        if config.has_vectors and not isinstance(embedder, Embedder):
            embedder = Embedder(embedder)
        encoder = {**embedder.describe(), "source": embedder.source} if isinstance(embedder, Embedder) else None
        settings = {**to_dict(config), "embedder": encoder if config.has_vectors else None}
        with new_artifact(out, "index", settings=settings, parents=parents) as (work, measured):
            write_jsonl(work / DOCUMENTS, map(document_row, documents))
            write_jsonl(work / CHUNKS, map(_chunk_row, chunks))
            write_jsonl(work / FAILURES, map(asdict, failures))
            bm25, _ = Bm25.build(((chunk.text, chunk.headings) for chunk in chunks), config.bm25)
            np.savez(work / BM25, **bm25.arrays())  # type: ignore[arg-type]
            if config.has_vectors:
                assert isinstance(embedder, Embedder)
                vectors = embedder.embed([passage_text(chunk) for chunk in chunks])
                save_file({"vectors": vectors.astype(np.float16)}, work / VECTORS)
            measured.update(num_documents=len(documents), num_chunks=len(chunks), num_failures=len(failures))
            measured["files"] = {file.name: hash_file(file) for file in sorted(work.iterdir())}
        return Index.open(out, embedder=embedder if config.has_vectors else None)

    @staticmethod
    def open(path: str | Path, *, embedder: Embedder | str | Path | None = None) -> "Index":
        """Open an index.

        Args:
            path: Its folder.
            embedder: The encoder for queries; None: the one it was built with, loaded when first needed.

        Raises:
            CheckpointError: A file is missing or damaged (the message names it), or the encoder is another one.
            DataError: The folder is not an index.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest.kind != "index":
            raise DataError(
                f"{path} is an artifact of kind {manifest.kind!r}; expected an index, as mw index makes it."
            )
        _check_files(path, manifest.measured.get("files"))
        settings = dict(manifest.settings)
        encoder = settings.pop("embedder", None)
        config = build(IndexConfig, settings)
        documents = [row_document(row, f"{path / DOCUMENTS}") for row in read_jsonl(path / DOCUMENTS)]
        chunks = _read_chunks(path / CHUNKS, {document.id: document for document in documents})
        bm25 = Bm25.from_arrays(_read_arrays(path / BM25), len(chunks))
        vectors = _read_vectors(path / VECTORS, len(chunks)) if encoder else None
        index = Index(path, documents, chunks, bm25, vectors, config)
        index._encoder = encoder or {}
        index._source = embedder if isinstance(embedder, (str, Path)) else index._encoder.get("source")
        if isinstance(embedder, Embedder):
            index._use(embedder)
        return index

    @property
    def documents(self) -> list[Document]:
        """All documents, in the order they were indexed."""
        return list(self._documents.values())

    @property
    def failures(self) -> list[Failure]:
        """What could not be read when the index was built."""
        return load_failures(self.path)

    @property
    def has_vectors(self) -> bool:
        """Tell whether dense and fused search are possible."""
        return self._vectors is not None

    @property
    def embedder(self) -> Embedder:
        """The encoder of the queries, loaded when it is first asked for."""
        with self._lock:
            if self._embedder is None:
                self._use(Embedder(self._source))
            assert self._embedder is not None
            return self._embedder

    def document(self, doc: str) -> Document:
        """Return the document with this id.

        Raises:
            RequestError: There is none (HTTP 404).
        """
        if doc not in self._documents:
            raise RequestError(
                f"The index has no document {doc!r}. Ask for one of the ids that a search returns.",
                code="not_found",
                param="doc",
                status=404,
            )
        return self._documents[doc]

    def search(self, query: str, k: int = 5, mode: Mode | None = None) -> list[Hit]:
        """Return the ``k`` best chunks for a query, best first; fewer when fewer have anything to do with it.

        Args:
            query: Some words, at most `MAX_QUERY_CHARS` characters.
            k: How many, 1 to `MAX_HITS`.
            mode: "fused", "bm25" or "dense"; None: fused where the index has vectors, else bm25.

        Raises:
            RequestError: The query is empty or too long, or ``k`` or ``mode`` cannot be.
        """
        mode = self._check(query, k, mode)
        return self.hits(getattr(self.scores(query, mode), mode), k)

    def hits(self, scores: np.ndarray, k: int) -> list[Hit]:
        """Return the ``k`` best chunks by the given scores, shape (chunks,)."""
        found = []
        for place in best(scores, k):
            c = self.chunks[place]
            heading = c.headings[-1] if c.headings else ""
            found.append(Hit(c.doc, c.start, c.end, c.text, float(scores[place]), heading, c.headings, int(place)))
        return found

    def scores(self, query: str, mode: Mode | None = None) -> Scores:
        """Return every chunk's scores for a query; a mode other than "fused" computes its own half alone."""
        mode = self._check(query, 1, mode)
        nothing = np.zeros(len(self.chunks), np.float32)
        bm25 = self.bm25.scores(query, len(self.chunks)) if mode != "dense" else nothing
        if mode == "bm25" or self._vectors is None:
            return Scores(bm25, None, None)
        dense = self._vectors @ self.embedder.embed([query], role="query")[0]
        if mode == "dense":
            return Scores(bm25, dense, None)
        coverage = self.bm25.coverage(query, int(np.argmax(bm25))) if bm25.any() else 0.0
        return Scores(bm25, dense, fuse(bm25, dense, self.config.fusion.share(coverage)))

    def _check(self, query: str, k: int, mode: Mode | None) -> Mode:
        check_query(query)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_HITS:
            raise RequestError(f"k is {k!r}; expected a whole number from 1 to {MAX_HITS}.", param="k")
        if mode not in (None, "fused", "bm25", "dense"):
            raise RequestError(f"mode is {mode!r}; expected fused, bm25 or dense.", param="mode")
        if mode in ("fused", "dense") and self._vectors is None:
            raise RequestError(f"mode is {mode!r}, but this index was built without vectors. Use bm25.", param="mode")
        return mode or ("bm25" if self._vectors is None else "fused")

    def _use(self, embedder: Embedder) -> None:
        expected = {name: value for name, value in self._encoder.items() if name != "source"}
        found = embedder.describe()
        if self._vectors is not None and found != expected:
            different = next(name for name in found if found[name] != expected.get(name))
            raise CheckpointError(
                f"{self.path} was built with another encoder: {different} is {str(found[different])[:16]} in "
                f"{embedder.folder}, but {str(expected.get(different))[:16]} in the index. Give the encoder it was "
                "built with, or build the index again."
            )
        self._embedder = embedder


def check_query(query: str) -> None:
    """Refuse a query that is no text, empty, too long, or not valid Unicode.

    Raises:
        RequestError: It is one of these.
    """
    if not isinstance(query, str) or not query.strip():
        raise RequestError("The query is empty; expected a question or some words.", param="query")
    if len(query) > MAX_QUERY_CHARS:
        raise RequestError(
            f"The query has {len(query)} characters; expected at most {MAX_QUERY_CHARS}. Shorten it.", param="query"
        )
    if not _is_encodable(query):
        raise RequestError("The query holds half a surrogate pair; expected valid Unicode text.", param="query")


def passage_text(chunk: Chunk) -> str:
    """Return what is encoded for a chunk: its text, behind its own heading where the text does not begin with it.

    The outer headings are left out: they cost a fifth more tokens and found no more.
    """
    if not chunk.headings or chunk.headings[-1] in chunk.text[: len(chunk.headings[-1]) + MAX_MARK]:
        return chunk.text
    return f"{chunk.headings[-1][:MAX_SHOWN_HEADING]}\n{chunk.text}"


def _documents_of(source: str | Path | Iterable[Document]) -> tuple[list[Document], list[Failure], list[Path]]:
    """Return the documents, what could not be read, and the artifacts that they come from."""
    failures: list[Failure] = []
    parents: list[Path] = []
    if not isinstance(source, (str, Path)):
        documents = list(source)
    elif (Path(source) / MANIFEST).is_file():
        documents, failures, parents = load_documents(Path(source)), load_failures(Path(source)), [Path(source)]
    else:
        result = read_documents(Path(source))
        documents, failures = result.documents, result.failures
    seen: set[str] = set()
    for document in documents:
        if not isinstance(document, Document):
            raise DataError(f"A {type(document).__name__} was given for a document; expected base.types.Document.")
        if document.id in seen or not document.id:
            raise DataError(f"Two documents have the id {document.id!r}; expected a different, non-empty id for each.")
        if not _is_encodable(document.id + document.text):
            raise DataError(f"{document.id!r} holds half a surrogate pair; expected valid Unicode. Clean it first.")
        seen.add(document.id)
    return documents, failures, parents


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _chunk_row(chunk: Chunk) -> dict[str, Any]:
    return {"doc": chunk.doc, "start": chunk.start, "end": chunk.end, "headings": list(chunk.headings)}


def _check_files(path: Path, files: Any) -> None:
    names = (DOCUMENTS, CHUNKS, BM25, FAILURES)
    if not isinstance(files, dict) or not set(names) <= set(files):
        raise CheckpointError(f"{path / MANIFEST} does not list the index's files. Build the index again.")
    for name in sorted(set(files) & {*names, VECTORS}):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the index needs it. Build the index again.")
        if (found := hash_file(file)) != files[name]:
            raise CheckpointError(
                f"{file} is damaged or was changed: SHA-256 {found[:12]}, the manifest says {str(files[name])[:12]}. "
                "Build the index again."
            )


def _read_chunks(file: Path, documents: dict[str, Document]) -> list[Chunk]:
    chunks = []
    for number, row in enumerate(read_jsonl(file), start=1):
        try:
            doc, start, end, headings = row["doc"], row["start"], row["end"], tuple(map(str, row["headings"]))
            text = documents[doc].text
            is_right = isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{file}, line {number}: not a chunk of a document ({error!r}).") from None
        if not is_right:
            raise CheckpointError(f"{file}, line {number}: the span {start}:{end} lies outside the document {doc!r}.")
        chunks.append(Chunk(doc, start, end, text[start:end], headings))
    return chunks


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Build the index again.") from error


def _read_vectors(file: Path, num_chunks: int) -> np.ndarray:
    try:
        vectors = load_file(file)["vectors"].astype(np.float32)
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}. Build the index again.") from error
    if vectors.ndim != 2 or len(vectors) != num_chunks:
        raise CheckpointError(
            f"{file} holds vectors of shape {vectors.shape}; expected one for each of {num_chunks} chunks."
        )
    return vectors
