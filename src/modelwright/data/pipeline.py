"""From documents as read to documents to learn from: clean, redact, filter, remove duplicates, split.

The stages are steps that a pipeline file can name too (`data.step`), run in memory over the documents of one folder.
Every stage is counted in a funnel and every removed document is kept with its reason (its text redacted, like
everything that is written here). The split goes by a hash of each document's id: a document stays on its side when
others are added or removed.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from modelwright.base.artifact import new_artifact, read_manifest
from modelwright.base.config import to_dict
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import write_json, write_jsonl
from modelwright.base.progress import Bar, bar, human_bytes
from modelwright.base.types import Document
from modelwright.data.clean import Clean, Readable
from modelwright.data.dedup import ExactDuplicates, NearDuplicates, RepeatedPieces
from modelwright.data.read import document_row, load_documents
from modelwright.data.scrub import KINDS, Scrub, redact
from modelwright.data.shards import find_shards, read_shards
from modelwright.data.step import Removal, decide_all, run_step

TRAIN, VALIDATION = "train.jsonl", "validation.jsonl"
REMOVED, REDACTED, FUNNEL = "removed.jsonl", "redacted.jsonl", "funnel.json"
_MIN_SPLIT_CHARS = 2000


@dataclass(frozen=True)
class PrepareConfig:
    """What counts as a document to learn from."""

    min_chars: int = 64  # shorter documents are removed
    max_word_chars: int = 10_000  # a longer run without a blank is data, not text
    min_alnum_fraction: float = 0.25  # letters and digits among all characters
    redact: tuple[str, ...] = KINDS  # kinds of personal data replaced; empty means off
    near_duplicate_similarity: float | None = 0.8  # Jaccard similarity of word 5-grams; None means off
    min_paragraph_chars: int | None = 80  # repeated paragraphs of at least this length are removed; None means off
    validation_fraction: float = 0.1  # of documents, and so about of bytes

    def __post_init__(self) -> None:
        unknown = sorted(set(self.redact) - set(KINDS))
        similarity = self.near_duplicate_similarity
        if unknown:
            raise ConfigError(f"redact holds {unknown[0]!r}; known: {', '.join(KINDS)}.")
        if similarity is not None and not 0 < similarity <= 1:
            raise ConfigError(f"near_duplicate_similarity is {similarity}; it must be above 0 and at most 1, or none.")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction}; it must be from 0 to below 1.")


@dataclass(frozen=True)
class Removed:
    """A document, or a paragraph of one, that was taken out, and why. Its text is redacted."""

    id: str
    stage: str
    reason: str
    text: str


@dataclass(frozen=True)
class Redaction:
    """Where something was replaced in a cleaned document; the span is that before the replacement."""

    id: str
    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class FunnelRow:
    """What one stage took in and let through."""

    stage: str
    documents_in: int
    bytes_in: int  # of UTF-8
    documents_removed: int
    documents_out: int
    bytes_out: int
    note: str = ""


@dataclass(frozen=True)
class Prepared:
    """Documents to learn from and to measure on, and the account of all others."""

    train: list[Document]
    validation: list[Document]
    removed: list[Removed]
    funnel: list[FunnelRow]
    redactions: list[Redaction] = field(default_factory=list)


def prepare(documents: Sequence[Document], config: PrepareConfig | None = None) -> Prepared:
    """Run all stages over the documents.

    Raises:
        DataError: No document is left; the message says which stage removed how many.
    """
    run = _Run(list(documents), config or PrepareConfig())
    stages: dict[str, Callable[[], str]] = {
        "clean": run.clean,
        "redact": run.redact,
        "filter": run.filter,
        "exact duplicates": run.drop_copies,
        "near duplicates": run.drop_near_copies,
        "repeated paragraphs": run.drop_paragraphs,
    }
    with bar("prepare", len(stages)) as shown:
        run.shown = shown
        for name, stage in stages.items():
            shown.describe(name)
            run.count(name, stage)
            shown.advance()
    if not run.documents:
        raise DataError(_nothing_left(documents, run.funnel))
    train, validation = split(run.documents, run.config.validation_fraction)
    return Prepared(train, validation, run.removed, run.funnel, run.redactions)


class _Run:
    """The state that the stages pass on."""

    def __init__(self, documents: list[Document], config: PrepareConfig):
        self.documents = documents
        self.config = config
        self.removed: list[Removed] = []
        self.redactions: list[Redaction] = []
        self.funnel: list[FunnelRow] = []
        self.shown = Bar(None, None)

    def count(self, name: str, stage: Callable[[], str]) -> None:
        num_in, bytes_in = len(self.documents), num_bytes(self.documents)
        note = stage()
        num_out = len(self.documents)
        row = FunnelRow(name, num_in, bytes_in, num_in - num_out, num_out, num_bytes(self.documents), note)
        self.funnel.append(row)

    def _take(self, stage: str, results: Sequence[Document | Removal]) -> None:
        """Go on with what a step has left of the documents, and note what it removed."""
        for document, result in zip(self.documents, results, strict=True):
            if isinstance(result, Removal):
                self._note(document.id, stage, result.reason, document.text)
        self.documents = [result for result in results if isinstance(result, Document)]

    def _note(self, name: str, stage: str, reason: str, text: str) -> None:
        # Redacted here as well: a text removed before the redaction must not carry a secret into the report.
        self.removed.append(Removed(name, stage, reason, redact(text)[0]))

    def clean(self) -> str:
        before = [document.text for document in self.documents]
        self._take("clean", run_step(Clean(), self.documents))
        num_changed = sum(a != d.text for a, d in zip(before, self.documents, strict=True))
        return f"{num_changed} changed"

    def redact(self) -> str:
        scrub = Scrub(kinds=self.config.redact)
        results = []
        for document in self.documents:
            changed, findings = scrub.change_and_tell(document)
            results.append(changed)
            self.redactions.extend(Redaction(document.id, f.start, f.end, f.kind) for f in findings)
        self._take("redact", results)
        counts = Counter(redaction.kind for redaction in self.redactions)
        return ", ".join(f"{counts[kind]} {kind}" for kind in self.config.redact)

    def filter(self) -> str:
        c = self.config
        self._take("filter", run_step(Readable(c.min_chars, c.max_word_chars, c.min_alnum_fraction), self.documents))
        return ""

    def drop_copies(self) -> str:
        self._take("exact duplicates", run_step(ExactDuplicates(), self.documents))
        return ""

    def drop_near_copies(self) -> str:
        threshold = self.config.near_duplicate_similarity
        if threshold is None:
            return "off"
        self._take("near duplicates", run_step(NearDuplicates(threshold), self.documents))
        return ""

    def drop_paragraphs(self) -> str:
        min_chars = self.config.min_paragraph_chars
        if min_chars is None:
            return "off"
        stage, step, num_taken = "repeated paragraphs", RepeatedPieces("paragraph", min_chars), 0
        results: list[Document | Removal] = list(self.documents)
        for place, decision in decide_all(step, self.documents).items():
            document = self.documents[place]
            for text, source in step.taken(document, decision):
                self._note(document.id, stage, f"paragraph stands in {source}", text)
                num_taken += 1
            results[place] = step.apply(document, decision)
        self._take(stage, results)
        return f"{num_taken} paragraphs"


def num_bytes(documents: Sequence[Document]) -> int:
    """Return the size of all texts in UTF-8."""
    return sum(len(document.text.encode()) for document in documents)


def _nothing_left(documents: Sequence[Document], funnel: list[FunnelRow]) -> str:
    lost = ", ".join(f"{row.stage} removed {row.documents_removed}" for row in funnel if row.documents_removed)
    return (
        f"Of {len(documents)} documents ({human_bytes(num_bytes(documents))}) none is left to learn from"
        f"{': ' + lost if lost else ''}. Expected at least one text of some sentences; give other documents, "
        "or loosen the settings of prepare (min_chars, max_word_chars, min_alnum_fraction)."
    )


def split(documents: Sequence[Document], validation_fraction: float = 0.1) -> tuple[list[Document], list[Document]]:
    """Part documents into (train, validation), each in the order given.

    A document is for validation when the hash of its id falls below the fraction, whatever else is there. Of two or
    more documents each side gets at least one, and validation at most half of the bytes where sizes allow. A single
    document is cut at a paragraph near its end, and the last part is called ``<id>#end``.
    """
    if validation_fraction == 0:
        return list(documents), []
    if len(documents) == 1:
        return _cut(documents[0], validation_fraction)
    places = {document.id: place_of(document.id) for document in documents}
    chosen = {name for name, place in places.items() if place < validation_fraction}
    half = num_bytes(documents) / 2
    sizes = {document.id: num_bytes([document]) for document in documents}
    for name in sorted(chosen, key=lambda name: -places[name]):
        if sum(sizes[n] for n in chosen) > half:
            chosen.discard(name)
    if not chosen and documents:
        small = [name for name in places if sizes[name] <= half] or [min(sizes, key=lambda name: sizes[name])]
        chosen = {min(small, key=lambda name: places[name])}
    return [d for d in documents if d.id not in chosen], [d for d in documents if d.id in chosen]


def place_of(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone; below the fraction a document is for validation."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _cut(document: Document, validation_fraction: float) -> tuple[list[Document], list[Document]]:
    text = document.text
    at = text.find("\n\n", int(len(text) * (1 - validation_fraction)))
    at = at if at >= 0 else text.rfind("\n\n")
    if len(text) < _MIN_SPLIT_CHARS or at < len(text) / 2:
        return [document], []
    end = replace(document, id=f"{document.id}#end", text=text[at + 2 :])
    return [replace(document, text=text[: at + 1])], [end]


def prepare_artifact(documents_dir: Path, out: Path, config: PrepareConfig | None = None) -> Prepared:
    """Prepare a documents artifact into an artifact of kind "dataset" and return what was made."""
    config = config or PrepareConfig()
    prepared = prepare(load_documents(documents_dir), config)
    with new_artifact(Path(out), "dataset", settings=to_dict(config), parents=[documents_dir]) as (work, measured):
        write_jsonl(work / TRAIN, map(document_row, prepared.train))
        write_jsonl(work / VALIDATION, map(document_row, prepared.validation))
        write_jsonl(work / REMOVED, map(asdict, prepared.removed))
        write_jsonl(work / REDACTED, map(asdict, prepared.redactions))
        write_json(work / FUNNEL, [asdict(row) for row in prepared.funnel])
        measured["num_train"], measured["train_bytes"] = len(prepared.train), num_bytes(prepared.train)
        measured["num_validation"] = len(prepared.validation)
        measured["validation_bytes"] = num_bytes(prepared.validation)
        measured["num_removed"] = sum(row.documents_removed for row in prepared.funnel)
        measured["num_redactions"] = len(prepared.redactions)
    return prepared


def load_dataset(path: Path) -> tuple[list[Document], list[Document]]:
    """Read (train, validation) back from a dataset artifact.

    Raises:
        DataError: The folder is not a dataset artifact, or a line in it is damaged.
    """
    manifest = read_manifest(path)
    if manifest.kind != "dataset":
        raise DataError(f"{path} is an artifact of kind {manifest.kind!r}; expected a dataset, as mw data makes it.")
    if not find_shards(path, "train"):
        raise DataError(f"{path} holds no {TRAIN} and no shards of it. It may be damaged; make it again.")
    return list(read_shards(path, "train")), list(read_shards(path, "validation"))
