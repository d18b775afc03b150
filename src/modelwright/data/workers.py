"""Processes that do tasks side by side, and what happens when one of them dies.

A worker holds one task at a time, so a death (the out-of-memory killer, a segmentation fault in a parser) is known to
belong to that task, and by a shared counter to the document that it had begun. `finish_tasks` then tries the task
again, and if that fails too, cuts it around that document, or in halves where no counter is at hand, until the one
document is alone; it is set aside and everything else is done. The result is the same whoever dies and when.

Processes are started afresh (spawn), so that no lock or thread of the caller is inherited.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from modelwright.base.errors import DataError, DeviceError, ModelwrightError
from modelwright.data.inputs import position_of
from modelwright.data.work import Job, Outcome, Tally, Task, explain, join_outcomes, run_task

_POLL_SECONDS = 0.5
_NO_ROW = -1
_START_SECONDS = 120.0
_MAX_FALSE_STARTS = 3


@dataclass(frozen=True)
class Died:
    """A worker ended before its task did."""

    reason: str
    row: int | None = None  # the row that it had begun, where that is known


class Engine(Protocol):
    """Does tasks in any order, side by side."""

    def run(self, tasks: Sequence[Task], job: Job) -> Iterator[tuple[Task, Outcome | Died]]:
        """Yield each task with what became of it."""
        ...


def finish_tasks(engine: Engine, tasks: Sequence[Task], job: Job) -> Iterator[tuple[Task, Outcome]]:
    """Do all tasks, whoever dies over them, and yield each with its outcome as soon as it is known."""
    again: list[Task] = []
    for task, result in engine.run(tasks, job):
        if isinstance(result, Outcome):
            yield task, result
        else:
            again.append(task)
    for whole in sorted(again, key=lambda task: task.number):
        parts = sorted(_finish_parts(engine, whole, job), key=lambda part: part[0].start)
        is_whole = len(parts) == 1 and parts[0][1].documents
        yield whole, parts[0][1] if is_whole else join_outcomes(parts, whole, Path(job.folder))


def _finish_parts(engine: Engine, whole: Task, job: Job) -> Iterator[tuple[Task, Outcome]]:
    waiting = [whole]
    while waiting:
        died: list[tuple[Task, Died]] = []
        for task, result in engine.run(waiting, job):
            if isinstance(result, Outcome):
                yield task, result
            else:
                died.append((task, result))
        waiting = []
        for task, death in died:
            if task.stop - task.start == 1:
                yield task, _outcome_of_death(task, death)
            else:
                waiting += _cut(task, death.row)


def _cut(task: Task, row: int | None) -> list[Task]:
    """Cut a task so that the suspected row is alone; in halves when there is no suspect."""
    if row is None or not task.start <= row < task.stop:
        middle = (task.start + task.stop) // 2
        bounds = [task.start, middle, task.stop]
    else:
        bounds = sorted({task.start, row, row + 1, task.stop})
    return [replace(task, start=a, stop=b) for a, b in zip(bounds, bounds[1:], strict=False)]


def _outcome_of_death(task: Task, death: Died) -> Outcome:
    name, position, size = position_of(task.unit, task.start)
    tally = Tally(documents_aside=1, documents_in=1, bytes_in=size)
    row = {"id": name, "position": position, "step": WORKER, "reason": death.reason}
    return Outcome([], {WORKER: tally}, 0, [row])


WORKER = "worker"  # what the funnel calls the place where documents are lost to a death


_FALSE_STARTS = (
    "{} workers ended before they had begun a document ({}). Expected processes that start; "
    "give the run more memory, or fewer workers with --workers."
)


class LocalEngine:
    """Processes on this machine; they are kept from one pass to the next."""

    def __init__(self, num_workers: int, document_seconds: float | None = None):
        self._num_workers = num_workers
        self._document_seconds = document_seconds
        self._context = multiprocessing.get_context("spawn")
        self._idle: list[_Worker] = []

    def close(self) -> None:
        """End the processes."""
        for worker in self._idle:
            worker.stop()
        self._idle = []

    def run(self, tasks: Sequence[Task], job: Job) -> Iterator[tuple[Task, Outcome | Died]]:
        """Yield each task with what became of it, in the order in which they end."""
        waiting = deque(tasks)
        busy: list[_Worker] = []
        false_starts = 0
        try:
            while waiting or busy:
                while waiting and len(busy) < self._num_workers:
                    worker = self._idle.pop() if self._idle else _Worker(self._context)
                    worker.begin(waiting.popleft(), job)
                    busy.append(worker)
                wait([end for worker in busy for end in (worker.connection, worker.process.sentinel)], _POLL_SECONDS)
                for worker in list(busy):
                    result = worker.result(self._document_seconds)
                    if result is None:
                        continue
                    busy.remove(worker)
                    assert worker.task is not None
                    if isinstance(result, Died) and result.row is None:  # no document's fault
                        false_starts += 1
                        if false_starts >= _MAX_FALSE_STARTS:
                            raise DeviceError(_FALSE_STARTS.format(false_starts, result.reason))
                        waiting.appendleft(worker.task)
                        continue
                    if isinstance(result, Outcome):
                        self._idle.append(worker)
                    yield worker.task, result
        finally:
            for worker in busy:
                worker.kill()


class _Worker:
    """One process, seen from the side that hands out the tasks."""

    def __init__(self, context: Any):
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self._row = context.Array("q", [_NO_ROW, 0], lock=False)  # row begun, signs of life
        self.process = context.Process(target=_serve, args=(theirs, self._row), daemon=True)
        with _quiet_main():
            self.process.start()
        theirs.close()
        self.task: Task | None = None
        self._job: Job | None = None
        self._seen = (0, 0.0)

    def begin(self, task: Task, job: Job) -> None:
        """Hand a task over."""
        self._row[0] = _NO_ROW
        self._seen = (self._row[1], time.monotonic())
        with contextlib.suppress(OSError):  # it died while it was idle: `result` will see that
            self.connection.send((task, job if job is not self._job else None))
        self.task, self._job = task, job

    def result(self, document_seconds: float | None) -> Outcome | Died | None:
        """Return what became of its task, or None while it is at work."""
        try:
            if self.connection.poll():
                answer = self.connection.recv()
                if isinstance(answer, ModelwrightError):
                    raise answer
                return answer
        except (EOFError, OSError):
            pass
        if not self.process.is_alive():
            return self._died(_describe_exit(self.process.exitcode))
        beats = self._row[1]
        if beats != self._seen[0]:
            self._seen = (beats, time.monotonic())
        elif document_seconds is not None:
            # The start of a process and of its steps is no document's time; a busy machine takes many seconds for it.
            limit = max(document_seconds, _START_SECONDS) if self._row[0] == _NO_ROW else document_seconds
            if time.monotonic() - self._seen[1] > limit:
                self.kill()
                return self._died(f"it took longer than {limit:g} s (document_seconds)")
        return None

    def _died(self, reason: str) -> Died:
        self.process.join()
        self.connection.close()
        row = self._row[0]
        return Died(reason, None if row == _NO_ROW else row)

    def stop(self) -> None:
        """Let the process end; it is idle."""
        self.connection.close()
        self.process.join(5)
        self.kill()

    def kill(self) -> None:
        """End the process at once."""
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextlib.contextmanager
def _quiet_main() -> Iterator[None]:
    """Keep a new process from running the caller's script again: workers need nothing that stands in it."""
    # One worker is one processor: libraries that would start a thread for each are told so before they are loaded.
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    try:
        for name in kept:
            setattr(main, name, None)
        os.environ.update(dict.fromkeys(threads, "1"))
        yield
    finally:
        for variable, before in threads.items():
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before
        for name, value in kept.items():
            setattr(main, name, value)


def _describe_exit(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "the worker was killed (signal 9), as happens when memory runs out"
    if code is not None and code < 0:
        return f"the worker died of signal {-code} ({signal.Signals(-code).name})"
    return f"the worker ended by itself with status {code}"


def _serve(connection: Connection, row: Any) -> None:
    """Do tasks until there are none; the life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends us
    parent = os.getppid()
    job: Job | None = None

    def progress(index: int) -> None:
        row[0], row[1] = index, row[1] + 1
        if os.getppid() != parent:  # nobody waits for the answer any more
            os._exit(1)

    while True:
        try:
            task, given = connection.recv()
        except (EOFError, OSError):
            return
        job = given or job
        assert job is not None
        try:
            answer: Any = run_task(task, job, progress)
        except ModelwrightError as error:
            answer = error
        except Exception as error:
            answer = DataError(
                f"A worker failed on {position_of(task.unit, task.start)[1]} and after: {explain(error)}"
            )
        try:
            connection.send(answer)
        except OSError:
            return
