"""What one worker does with one piece of the corpus: read it, run the steps of a pass, write what came out.

A worker gets a `Task` and answers with an `Outcome`; everything between them lies in files, written under temporary
names and renamed. A step that raises sets its document aside with the reason and the place; nothing that is written
about a document that went holds personal data.
"""

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from modelwright.base.files import atomic_file
from modelwright.base.types import Document
from modelwright.data.inputs import Aside, Reading, read_unit
from modelwright.data.plan import NamedStep, Pass, SourceConfig
from modelwright.data.scrub import redact
from modelwright.data.shards import Bundle, ShardConfig, Slice, Unit, encode_document, encode_row
from modelwright.data.step import Filter, Mapper, Removal

READ = "read"
_MAX_REASON_CHARS = 300


@dataclass(frozen=True)
class Job:
    """What all tasks of a pass share."""

    folder: str
    run: Pass
    sources: tuple[SourceConfig, ...]
    shard: ShardConfig
    max_line_bytes: int
    is_plain: bool = False  # rows keep all their own fields, as the commands for single steps do


@dataclass(frozen=True)
class Task:
    """One piece of one pass; ``start`` and ``stop`` narrow it when a worker died on the whole."""

    number: int
    unit: Unit
    start: int
    stop: int
    decisions: str = ""  # file of {row: decision}; empty: every document is kept

    @property
    def stem(self) -> str:
        """The beginning of the names of its files."""
        is_whole = self.start == 0 and self.stop == len(self.unit)
        return f"{self.number:06}" if is_whole else f"{self.number:06}+{self.start}-{self.stop}"


@dataclass
class Tally:
    """What one step took in and let through, in one piece or in all."""

    documents_in: int = 0
    bytes_in: int = 0  # of UTF-8
    documents_removed: int = 0
    documents_aside: int = 0
    documents_changed: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    seconds: float = 0.0

    def add(self, other: "Tally") -> None:
        """Count another piece in."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Outcome:
    """What became of a task: files that hold documents, with how many, and the tallies of its steps."""

    documents: list[tuple[str, int]] = field(default_factory=list)  # (file name in the folder, number of rows)
    tallies: dict[str, Tally] = field(default_factory=dict)
    num_removed: int = 0
    asides: list[dict[str, str]] = field(default_factory=list)


def num_bytes(text: str) -> int:
    """Return the size of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def explain(error: BaseException) -> str:
    """Return an error as a reason: its kind and message, cut and without personal data."""
    return redact(f"{type(error).__name__}: {error}")[0][:_MAX_REASON_CHARS]


Progress = Callable[[int], None]


def run_task(task: Task, job: Job, progress: Progress = lambda row: None) -> Outcome:
    """Do one task and leave its files in the folder of the job.

    Args:
        task: The piece.
        job: What is done to it.
        progress: Told the index of each row before it is begun, and again while it goes on.
    """
    return _Worker(task, job, progress).run()


class _GoneError(Exception):
    """The document does not go on."""


class _Worker:
    """The state of one task."""

    def __init__(self, task: Task, job: Job, progress: Progress):
        self.task, self.job, self.progress = task, job, progress
        self.folder = Path(job.folder)
        self.outcome = Outcome()
        self.removed: IO[bytes] | None = None
        self.files = ExitStack()
        self.decisions: dict[int, Any] = {}
        if task.decisions:
            self.decisions = pickle.loads(Path(task.decisions).read_bytes())

    def run(self) -> Outcome:
        with self.files:
            if isinstance(self.task.unit, Bundle):
                self._read_bundle()
            else:
                self._run_slice()
        return self.outcome

    def _open(self, kind: str) -> IO[bytes]:
        return self.files.enter_context(atomic_file(self.folder / f"{self.task.stem}.{kind}", "wb"))

    def _documents(self) -> Iterator[tuple[int, Document]]:
        task, job = self.task, self.job
        how = Reading(job.sources[task.unit.source], job.max_line_bytes, job.is_plain)
        for row, found in read_unit(task.unit, task.start, task.stop, how, self.progress):
            tally = self._tally(READ)
            if isinstance(found, Aside):
                tally.documents_in += 1
                self._set_aside(READ, found.id, found.position, found.reason, tally)
            else:
                if not (isinstance(task.unit, Slice) and task.unit.is_ours):
                    size = num_bytes(found.text)
                    tally.documents_in, tally.bytes_in = tally.documents_in + 1, tally.bytes_in + size
                    tally.documents_out, tally.bytes_out = tally.documents_out + 1, tally.bytes_out + size
                yield row, found

    def _read_bundle(self) -> None:
        """Write the documents of whole files as shards, which the first pass then takes one by one."""
        handle, name, rows, size = None, "", 0, 0
        limit = self.job.shard
        for _, document in self._documents():
            line = self._encode(READ, document)
            if line is None:
                continue
            if handle is not None and (rows >= limit.documents or size + len(line) > limit.bytes):
                self.outcome.documents.append((name, rows))
                handle = None
                self.files.close()  # renames what was written
            if handle is None:
                name = f"{self.task.stem}.{len(self.outcome.documents):05}.docs"
                handle, rows, size = self.files.enter_context(atomic_file(self.folder / name, "wb")), 0, 0
            handle.write(line)
            rows, size = rows + 1, size + len(line)
        if handle is not None:
            self.outcome.documents.append((name, rows))

    def _run_slice(self) -> None:
        run = self.job.run
        kept = self._open("docs")
        signs = self._open("signs") if run.sign else None
        num_rows = 0
        for row, document in self._documents():
            try:
                changed = self._apply(row, document)
                for named in run.steps:
                    changed = self._step(named, changed)
                signature = self._sign(run.sign, changed) if run.sign else b""
                line = self._encode(READ if not run.steps else run.steps[-1].name, changed)
            except _GoneError:
                continue
            if line is None:
                continue
            kept.write(line)
            if signs is not None:
                signs.write(signature)
            num_rows += 1
        self.outcome.documents.append((f"{self.task.stem}.docs", num_rows))

    def _tally(self, name: str) -> Tally:
        return self.outcome.tallies.setdefault(name, Tally())

    def _apply(self, row: int, document: Document) -> Document:
        named = self.job.run.apply
        if named is None:
            return document

        def carry_out() -> Document | Removal:
            return named.step.apply(document, self.decisions[row]) if row in self.decisions else document  # type: ignore[union-attr]

        return self._count(named.name, document, carry_out)

    def _step(self, named: NamedStep, document: Document) -> Document:
        step = named.step
        if isinstance(step, Filter):
            return self._count(
                named.name, document, lambda: Removal(why) if (why := step.reason(document)) else document
            )
        assert isinstance(step, Mapper), named.name
        return self._count(named.name, document, lambda: step.change(document))

    def _count(self, name: str, document: Document, act: Callable[[], Document | Removal]) -> Document:
        """Run a step on a document and account for it."""
        tally, size = self._tally(name), num_bytes(document.text)
        tally.documents_in, tally.bytes_in = tally.documents_in + 1, tally.bytes_in + size
        begun = time.perf_counter()
        try:
            result = act()
        except Exception as error:
            self._set_aside(name, document.id, document.source, explain(error), tally)
            raise _GoneError from None
        finally:
            tally.seconds += time.perf_counter() - begun
        if isinstance(result, Document) and not result.text.strip():
            result = Removal("nothing is left of its text")
        if isinstance(result, Removal):
            tally.documents_removed += 1
            self._note_removed(name, document, result)
            raise _GoneError
        if result.text is not document.text and result.text != document.text:
            tally.documents_changed += 1
            size = num_bytes(result.text)
        tally.documents_out, tally.bytes_out = tally.documents_out + 1, tally.bytes_out + size
        return result

    def _sign(self, named: NamedStep, document: Document) -> bytes:
        tally = self._tally(named.name)
        begun = time.perf_counter()
        try:
            signature = named.step.sign(document)  # type: ignore[union-attr]
            return pickle.dumps((document.id, signature), protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            tally.documents_in, tally.bytes_in = tally.documents_in + 1, tally.bytes_in + num_bytes(document.text)
            self._set_aside(named.name, document.id, document.source, explain(error), tally)
            raise _GoneError from None
        finally:
            tally.seconds += time.perf_counter() - begun

    def _encode(self, name: str, document: Document) -> bytes | None:
        try:
            return encode_document(document)
        except (ValueError, TypeError) as error:
            tally = self._tally(name)
            tally.documents_out, tally.bytes_out = tally.documents_out - 1, tally.bytes_out - num_bytes(document.text)
            reason = f"cannot be written as JSON in UTF-8 ({explain(error)})"
            self._set_aside(name, document.id, document.source, reason, tally)
            return None

    def _note_removed(self, name: str, document: Document, removal: Removal) -> None:
        if self.removed is None:
            self.removed = self._open("removed")
        # Redacted here as well: a text removed before the redaction must not carry a secret into the report.
        row = {"id": document.id, "source": document.source, "step": name, "reason": redact(removal.reason)[0]}
        text = redact(document.text)[0].encode("utf-8", "replace").decode()
        self.removed.write(encode_row({**row, "text": text}))
        self.outcome.num_removed += 1

    def _set_aside(self, step: str, name: str, position: str, reason: str, tally: Tally) -> None:
        tally.documents_aside += 1
        row = {"id": name, "position": position, "step": step, "reason": reason}
        self.outcome.asides.append({k: v.encode("utf-8", "replace").decode() for k, v in row.items()})


def join_outcomes(parts: Sequence[tuple[Task, Outcome]], whole: Task, folder: Path) -> Outcome:
    """Put the parts of a task, which were done one by one, together as if it had been done at once."""
    joined = Outcome()
    for _, outcome in parts:
        for name, tally in outcome.tallies.items():
            joined.tallies.setdefault(name, Tally()).add(tally)
        joined.num_removed += outcome.num_removed
        joined.asides += outcome.asides
    kinds = ["removed"] if isinstance(whole.unit, Bundle) else ["docs", "signs", "removed"]
    for kind in kinds:
        pieces = [folder / f"{task.stem}.{kind}" for task, _ in parts]
        found = [piece for piece in pieces if piece.exists()]
        if found or kind == "docs":
            with atomic_file(folder / f"{whole.stem}.{kind}", "wb") as handle:
                for piece in found:
                    handle.write(piece.read_bytes())
        for piece in found:
            piece.unlink()
    if isinstance(whole.unit, Bundle):
        joined.documents = [entry for _, outcome in parts for entry in outcome.documents]
    else:
        num_rows = sum(count for _, outcome in parts for _, count in outcome.documents)
        joined.documents = [(f"{whole.stem}.docs", num_rows)]
    return joined


def as_row(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as plain values, for the marker that says the task is done."""
    return asdict(outcome)


def from_row(row: dict[str, Any]) -> Outcome:
    """Read an outcome back from its marker."""
    tallies = {name: Tally(**values) for name, values in row["tallies"].items()}
    documents = [(name, count) for name, count in row["documents"]]
    return replace(Outcome(**row), tallies=tallies, documents=documents)
