"""Run a pipeline: plan its passes, have its pieces done, decide between the passes, seal the result.

Everything on the way lies in ``OUT.work``: a folder for each pass, named by a hash of all that its content depends on
(input, settings of the steps so far, version), with a marker for each piece that is done. A run that was killed goes
on at the first piece without a marker; one whose settings changed keeps the passes before the change. Documents flow
through files of bounded size; only `CorpusStep.decide` and what it returns stand in memory for the whole corpus.

The sealed folder holds ``train.jsonl``, or ``train-00000.jsonl`` and on where it is large (Parquet where asked for;
``validation`` likewise where a fraction is held out), ``removed.jsonl``, ``aside.jsonl``, ``funnel.json`` and
``funnel.html``. Its content hash leaves the last two out, which hold seconds: for the same input and settings it is
the same for any number of workers and either engine.
"""

import contextlib
import fcntl
import json
import os
import pickle
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from modelwright.base.artifact import MANIFEST, new_artifact, read_manifest
from modelwright.base.config import to_dict
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import atomic_file, read_json, read_jsonl, write_json
from modelwright.base.progress import Stopwatch, bar
from modelwright.data.inputs import Aside, SourceFound, find_units
from modelwright.data.pipeline import place_of
from modelwright.data.plan import Pass, PipelineConfig, SourceConfig, make_key, plan_passes, step_key
from modelwright.data.report import Funnel, write_page
from modelwright.data.shards import Bundle, Slice, Unit, encode_row, write_shards
from modelwright.data.step import CorpusStep, name_uniquely
from modelwright.data.work import READ, Job, Outcome, Tally, Task, as_row, explain, from_row
from modelwright.data.workers import Engine, LocalEngine, finish_tasks

REMOVED, ASIDE, FUNNEL, PAGE = "removed.jsonl", "aside.jsonl", "funnel.json", "funnel.html"
_LOCK_SECONDS = 3.0


@dataclass(frozen=True)
class RunParams:
    """How a pipeline is run; none of it changes what comes out."""

    engine: str = "local"  # or "ray"
    num_workers: int | None = None  # None: as many as there are processors, here or in the cluster
    address: str | None = None  # of a Ray cluster; None: one is started on this machine
    is_strict: bool = False  # stop at the first thing that has to be set aside
    keeps_work: bool = False  # keep OUT.work, so that a run with other settings can use the passes before the change


@dataclass
class RunResult:
    """What a run made and what it could not use."""

    out: Path
    funnel: Funnel
    asides: list[dict[str, str]] = field(default_factory=list)
    was_done: bool = False  # an earlier run had made the same from the same


def run_pipeline(config: PipelineConfig, params: RunParams | None = None) -> RunResult:
    """Run a pipeline into an artifact of kind "dataset".

    Raises:
        ConfigError: The output folder holds something else, or the engine is unknown.
        DataError: A source is missing, a step cannot decide, or (strict) something cannot be used.
    """
    params = params or RunParams()
    _check_out(config)
    with contextlib.closing(make_engine(params, config)) as engine:
        return Run(config, params, engine).run()


def _check_out(config: PipelineConfig) -> None:
    out = config.out
    if out.exists() and not (out / MANIFEST).is_file() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"--out is {out}, which holds something that mw did not make. Name a new or empty folder.")
    paths = [_path_of(source) for source in config.source]
    inside = [path for path in paths if _is_below(path, out) or _is_below(out, path)]
    if inside:
        raise ConfigError(f"--out {out} and the source {inside[0]} lie in one another. Name a folder outside of it.")


def _path_of(source: SourceConfig) -> Path:
    return Path(source.path)


def _is_below(inner: Path, outer: Path) -> bool:
    return outer.resolve() in (inner.resolve(), *inner.resolve().parents)


def make_engine(params: RunParams, config: PipelineConfig) -> Any:
    """Return who does the work: processes of this machine or Ray."""
    if params.num_workers is not None and params.num_workers < 1:
        raise ConfigError(f"workers is {params.num_workers}; it must be at least 1.")
    num_workers = params.num_workers or _num_processors()
    if params.engine == "ray":
        from modelwright.data.ray_engine import RayEngine  # optional: Ray is an extra

        return RayEngine(params.num_workers if params.address else num_workers, params.address)
    if params.engine != "local":
        raise ConfigError(f"engine is {params.engine!r}; known: local, ray.")
    if params.address:
        raise ConfigError(f"--address {params.address} names a Ray cluster, but the engine is local. Add --engine ray.")
    return LocalEngine(num_workers, config.document_seconds)


def _num_processors() -> int:
    # Those that this process may use, where the system tells.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Run:
    """The state of one run.

    Args:
        config: What is done.
        params: How.
        engine: By whom.
        is_plain: Whether rows keep all their own fields (`data/single.py`).
    """

    def __init__(self, config: PipelineConfig, params: RunParams, engine: Engine, is_plain: bool = False):
        self.config, self.params, self.engine, self.is_plain = config, params, engine, is_plain
        # Absolute: a worker on another machine does not stand in our folder.
        self.work = config.out.absolute().with_name(config.out.name + ".work")
        self.funnel = Funnel([READ, *(named.name for named in config.steps)])
        self.asides: list[dict[str, str]] = []
        self.removed: list[Path] = []  # files of what each piece of each pass removed
        self.pieces: list[Slice] = []  # what came out of the last pass
        self.clock = Stopwatch()

    def run(self) -> RunResult:
        """Do what is left of the passes and seal what came out."""
        config = self.config
        units, found, asides = find_units(config.source, config.shard)
        self._note_unreadable(asides)
        key = self._first_key(found)
        passes = plan_passes(config.steps)
        final_key = self._key_of(key, passes)
        if (done := self._already_done(final_key)) is not None:
            return done
        with alone(self.work):
            self.do_all(passes, units, key)
            self._seal(found, final_key)
            if not self.params.keeps_work:
                shutil.rmtree(self.work, ignore_errors=True)
            _clear_leftovers(config.out)
        return RunResult(config.out, self.funnel, self.asides)

    def _note_unreadable(self, asides: Sequence[Aside]) -> None:
        rows = [{"id": aside.id, "position": aside.position, "step": READ, "reason": aside.reason} for aside in asides]
        self._check_strict(rows)
        self.asides += rows
        self.funnel.add({READ: Tally(documents_in=len(rows), documents_aside=len(rows))})

    def do_all(self, passes: Sequence[Pass], units: Sequence[Unit], key: str) -> None:
        """Do every piece of every pass that is not done yet; what came out is listed in ``pieces``."""
        pieces = self._read_bundles(units, key)
        previous = READ
        for index, run in enumerate(passes):
            key = self._next_key(key, run)
            decisions = self._decide(run, pieces, previous) if run.apply else {}
            pieces = self._do_pass(f"pass-{index}", run, pieces, key, decisions)
            previous = f"pass-{index}-{key}"
        self.pieces = pieces

    # Keys: what the content of a folder depends on.

    def _first_key(self, found: Sequence[SourceFound]) -> str:
        from modelwright import __version__

        config = self.config
        # Where it stands does not matter, what it holds does.
        sources = [[s.hash, to_dict(replace(c, path=""))] for s, c in zip(found, config.source, strict=True)]
        return make_key(
            __version__, json.dumps([sources, config.shard.documents, config.shard.bytes, config.max_line_bytes])
        )

    def _next_key(self, key: str, run: Pass) -> str:
        parts = [step_key(named) for named in (run.apply, *run.steps, run.sign) if named is not None]
        return make_key(key, *parts, "signs" if run.sign else "ends")

    def _key_of(self, key: str, passes: Sequence[Pass]) -> str:
        for run in passes:
            key = self._next_key(key, run)
        config = self.config
        return make_key(key, config.format, str(config.validation_fraction), str(config.shard.out_bytes))

    def _already_done(self, key: str) -> RunResult | None:
        out = self.config.out
        if not (out / MANIFEST).is_file() or read_manifest(out).measured.get("key") != key:
            return None
        asides = [json.loads(line) for line in (out / ASIDE).read_text(encoding="utf-8").splitlines()]
        self._check_strict(asides)
        return RunResult(out, Funnel.from_row(read_json(out / FUNNEL)), asides, was_done=True)

    # Passes.

    def _read_bundles(self, units: Sequence[Unit], key: str) -> list[Slice]:
        """Have files that are read whole turned into shards of rows; slices of JSON lines stay as they are."""
        tasks = [Task(i, unit, 0, len(unit)) for i, unit in enumerate(units) if isinstance(unit, Bundle)]
        folder = self.work / f"{READ}-{key}"
        outcomes = self._do_tasks(tasks, self._job(folder, Pass(())), READ) if tasks else {}
        pieces: list[Slice] = []
        for index, unit in enumerate(units):
            if isinstance(unit, Slice):
                pieces.append(unit)
            else:
                pieces += [_own_slice(folder / name, rows, unit.source) for name, rows in outcomes[index].documents]
        return pieces

    def _do_pass(
        self, name: str, run: Pass, pieces: Sequence[Slice], key: str, decisions: dict[int, str]
    ) -> list[Slice]:
        tasks = [Task(i, piece, 0, len(piece), decisions.get(i, "")) for i, piece in enumerate(pieces)]
        folder = self.work / f"{name}-{key}"
        outcomes = self._do_tasks(tasks, self._job(folder, run), name)
        made = []
        for index, piece in enumerate(pieces):
            ((file, rows),) = outcomes[index].documents
            made.append(_own_slice(folder / file, rows, piece.source))
            if outcomes[index].num_removed:
                self.removed.append(folder / f"{index:06}.removed")
        return made

    def _job(self, folder: Path, run: Pass) -> Job:
        folder.mkdir(exist_ok=True)
        config = self.config
        return Job(str(folder), run, config.source, config.shard, config.max_line_bytes, self.is_plain)

    def _do_tasks(self, tasks: Sequence[Task], job: Job, name: str) -> dict[int, Outcome]:
        folder = Path(job.folder)
        outcomes = {}
        for task in tasks:
            marker = folder / f"{task.number:06}.done"
            if marker.is_file():
                outcomes[task.number] = from_row(read_json(marker))
        left = [task for task in tasks if task.number not in outcomes]
        for outcome in outcomes.values():
            self._check_strict(outcome.asides)
        with bar(name, len(left)) as shown:
            for task, outcome in finish_tasks(self.engine, left, job):
                self._check_strict(outcome.asides)
                write_json(folder / f"{task.number:06}.done", as_row(outcome))
                outcomes[task.number] = outcome
                shown.advance()
        for number in sorted(outcomes):
            self.funnel.add(outcomes[number].tallies)
            self.asides += outcomes[number].asides
        return outcomes

    def _check_strict(self, asides: Sequence[dict[str, str]]) -> None:
        if asides and self.params.is_strict:
            first = asides[0]
            raise DataError(
                f"{first['position'] or first['id']} cannot be used (step {first['step']}): {first['reason']}. "
                "--strict stops at the first; mend it, or run without --strict to set it aside and go on."
            )

    # Decisions.

    def _decide(self, run: Pass, pieces: Sequence[Slice], previous: str) -> dict[int, str]:
        """Let the step that ended the pass before decide; leave what it said of each piece in a file beside it."""
        assert run.apply is not None and isinstance(run.apply.step, CorpusStep)
        folder = self.work / previous
        marker = folder / "decided.json"
        if not marker.is_file():
            watch = Stopwatch()
            try:
                decisions = run.apply.step.decide((name, sign) for _, _, name, sign in _signatures(pieces))
            except Exception as error:
                raise DataError(f"The step {run.apply.name} could not decide: {explain(error)}") from error
            numbers = _write_decisions(folder, pieces, decisions)
            write_json(marker, {"pieces": numbers, "seconds": watch.seconds})
        said = read_json(marker)
        self.funnel.add({run.apply.name: Tally(seconds=said["seconds"])})
        return {number: str(folder / f"{number:06}.decisions") for number in said["pieces"]}

    # The end.

    def _seal(self, found: Sequence[SourceFound], key: str) -> None:
        config = self.config
        settings = {
            "source": [asdict(source) for source in found],
            "steps": [{"step": named.name.split(" ")[0], **named.settings} for named in config.steps],
            "format": config.format,
            "validation_fraction": config.validation_fraction,
            "shard": to_dict(config.shard),
        }
        parents = [path for path in map(_path_of, config.source) if (path / MANIFEST).is_file()]
        with new_artifact(config.out, "dataset", settings=settings, parents=parents) as (folder, measured):
            counts = {}
            for part in ("train", "validation") if config.validation_fraction else ("train",):
                lines = _lines_of(self.pieces, part, config.validation_fraction)
                counts[part] = write_shards(lines, folder, part, config.shard.out_bytes, config.format)
            with atomic_file(folder / REMOVED, "wb") as handle:
                for path in self.removed:
                    with open(path, "rb") as source:
                        shutil.copyfileobj(source, handle)
            with atomic_file(folder / ASIDE, "wb") as handle:
                handle.writelines(encode_row(row) for row in self.asides)
            self.funnel.seconds = self.clock.seconds
            self.funnel.explain(read_jsonl(folder / REMOVED), self.asides)
            write_json(folder / FUNNEL, self.funnel.as_row())
            write_page(folder / PAGE, self.funnel, settings, self.asides)
            measured.update(self.funnel.measured(), key=key, **{f"num_{part}": n for part, n in counts.items()})


@contextlib.contextmanager
def alone(work: Path) -> Iterator[None]:
    """Hold the work folder; the hold ends with the process, however that ends."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as handle:
        # A process that a killed run was just starting holds it a moment longer.
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _is_locked(handle):
            if time.monotonic() > deadline:
                raise ConfigError(f"Another run is at work in {work}. Wait until it ends, or give another --out.")
            time.sleep(0.05)
        yield


def _is_locked(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _clear_leftovers(out: Path) -> None:
    """Remove half-sealed folders of runs that were killed while they sealed."""
    for pattern in (f".{out.name}.*.tmp", f".{out.name}.old.*"):
        for folder in out.parent.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _own_slice(path: Path, num_rows: int, source: int) -> Slice:
    return Slice(str(path), path.name, 0, path.stat().st_size, 1, num_rows, source, is_ours=True)


def _signatures(pieces: Sequence[Slice]) -> Iterator[tuple[int, int, str, Any]]:
    """Yield (piece, row, name, signature) in the order of the documents; the names are ids made unique."""
    held: list[Any] = []  # the one entry whose name is being made

    def ids() -> Iterator[str]:
        for number, piece in enumerate(pieces):
            with open(Path(piece.path).with_suffix(".signs"), "rb") as handle:
                for row in range(len(piece)):
                    name, signature = pickle.load(handle)
                    held[:] = number, row, signature
                    yield name

    for unique in name_uniquely(ids()):
        number, row, signature = held
        yield number, row, unique, signature


def _write_decisions(folder: Path, pieces: Sequence[Slice], decisions: Any) -> list[int]:
    """Write {row: decision} of each piece that has any, and return which have."""
    held: dict[int, Any] = {}
    numbers: list[int] = []
    current = 0

    def close() -> None:
        if held:
            with atomic_file(folder / f"{current:06}.decisions", "wb") as handle:
                pickle.dump(held, handle, protocol=pickle.HIGHEST_PROTOCOL)
            numbers.append(current)
            held.clear()

    for number, row, name, _ in _signatures(pieces):
        if number != current:
            close()
            current = number
        if name in decisions:
            held[row] = decisions[name]
    close()
    return numbers


def _lines_of(pieces: Sequence[Slice], part: str, validation_fraction: float) -> Iterator[bytes]:
    for piece in pieces:
        with open(piece.path, "rb") as handle:
            for line in handle:
                if validation_fraction:
                    is_held_out = place_of(json.loads(line)["id"]) < validation_fraction
                    if is_held_out != (part == "validation"):
                        continue
                yield line
