"""The whole life of a specialist, as steps that can be run again.

Each step makes one artifact below the run folder and leaves a row in ``steps.json``: its figures, its time, and a key
over its settings and the hashes of what it was made from. A step whose key and artifact still stand is not done
again, so a killed run goes on after the last finished step, and within training from the last checkpoint.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelwright.base.artifact import MANIFEST, read_manifest
from modelwright.base.device import peak_memory_bytes
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import hash_bytes, read_json, write_json
from modelwright.base.progress import Stopwatch, console


@dataclass(frozen=True)
class LifeConfig:
    """Where a life begins and how much it may cost."""

    docs: Path | None = None  # folder or file; None: the reference documentation of the running interpreter
    base: str | None = None  # model folder or hub id to fine-tune; None: pre-train one from the documents
    minutes: float = 4.0  # budget of pre-training and fine-tuning together
    out: Path = field(default_factory=lambda: Path("runs/quickstart"))
    embedder: str | None = None  # sentence encoder folder or hub id; None: the installed MiniLM package
    vocab_size: int = 4096
    num_questions: int = 300  # for measuring retrieval
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ConfigError(f"minutes is {self.minutes}; it must be above 0. The default is 4.")
        if self.vocab_size < 300:
            raise ConfigError(f"vocab_size is {self.vocab_size}; byte-level BPE needs at least 300.")


@dataclass(frozen=True)
class Step:
    """One step of a life."""

    name: str
    artifact: str  # folder below the run folder
    settings: Mapping[str, Any]  # what decides its outcome, beside its parents
    parents: tuple[str, ...]  # artifacts below the run folder that it is made from
    make: Callable[[], dict[str, Any]]  # makes the artifact and returns its figures
    tell: Callable[[Mapping[str, Any]], str]  # one line of what was made, from the figures


class Life:
    """A run folder with its finished steps."""

    def __init__(self, out: Path):
        self.out = Path(out)
        self._file = self.out / "steps.json"
        self.rows: dict[str, dict[str, Any]] = {}
        if self._file.is_file():
            try:
                self.rows = {row["name"]: row for row in read_json(self._file)}
            except (DataError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self._file} is damaged ({error}). Remove that file to do every step again; nothing else is lost."
                ) from error

    def figures(self, name: str) -> dict[str, Any]:
        """Return the figures of a finished step."""
        return self.rows[name]["figures"]

    def key(self, step: Step) -> str:
        """Return a hash over what decides the outcome of a step."""
        parents = [read_manifest(self.out / parent).hash for parent in step.parents]
        text = json.dumps([step.name, step.settings, parents], sort_keys=True, default=str)
        return hash_bytes(text.encode())

    def is_done(self, step: Step) -> bool:
        """Tell whether the step's artifact stands and was made from the same things."""
        row = self.rows.get(step.name)
        if row is None or not (self.out / step.artifact / MANIFEST).is_file():
            return False
        return row["key"] == self.key(step)

    def do(self, number: int, total: int, step: Step) -> bool:
        """Do the step unless it is done; print what it made. Return whether anything was done."""
        title = f"[bold]{number}/{total} {step.name}[/bold]"
        if self.is_done(step):
            row = self.rows[step.name]
            console.print(f"{title}  {step.tell(row['figures'])}  [dim](kept, took {row['seconds']:.1f} s)[/dim]")
            return False
        console.print(title)
        watch = Stopwatch()
        key = self.key(step)
        figures = step.make()
        self.rows[step.name] = {
            "name": step.name,
            "seconds": round(watch.seconds, 3),
            "artifact": str(self.out / step.artifact),
            "key": key,
            "figures": figures,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        write_json(self._file, list(self.rows.values()))
        console.print(f"  {step.tell(figures)}  [dim]{watch.seconds:.1f} s[/dim]")
        return True

    def summary(self) -> dict[str, Any]:
        """Return the part of the report that is about the steps themselves."""
        rows = list(self.rows.values())
        return {
            "steps": [{k: row[k] for k in ("name", "seconds", "artifact")} for row in rows],
            "total_seconds": round(sum(row["seconds"] for row in rows), 3),
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
        }
