"""The same pieces of work on Ray Data: on this machine, or on a cluster that is already running.

Ray Data gets one row a task and maps the same `run_task` over them that local processes run; documents flow through
the files of the work folder as they do there, so the bytes that come out are the same. On a cluster the sources and
the output must lie on storage that all machines see under the same path, and modelwright must be installed on all.

A worker that dies ends its row only: the task comes back without an outcome and `finish_tasks` cuts it smaller. Ray
does not tell which document had been begun, so the cutting is in halves.
Not done: `document_seconds`; Ray ends no task for taking long.
"""

import logging
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from modelwright.base.errors import DataError, DeviceError, MissingExtraError, ModelwrightError
from modelwright.data.work import Job, Outcome, Task, explain, run_task
from modelwright.data.workers import Died


class RayEngine:
    """Tasks as rows of a Ray data set."""

    def __init__(self, num_workers: int | None, address: str | None = None):
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise MissingExtraError("ray", "ray", "The engine ray") from error
        self._ray = ray
        self._num_workers = num_workers
        self._was_started = False
        if not ray.is_initialized():
            self._start(address)

    def _start(self, address: str | None) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        try:
            if address:
                self._ray.init(address=address, **quiet)
            else:
                self._ray.init(num_cpus=self._num_workers, include_dashboard=False, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise DeviceError(
                f"Ray cannot be reached or started at {address or 'this machine'}: {explain(error)}. "
                "Expected a running cluster's address such as ray://host:10001 or host:6379, or none to start one here."
            ) from error
        self._was_started = True
        for name in ("ray.data", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._was_started:
            self._ray.shutdown()

    def run(self, tasks: Sequence[Task], job: Job) -> Iterator[tuple[Task, Outcome | Died]]:
        """Yield each task with what became of it, in the order in which they end."""
        if not tasks:
            return
        data = self._ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # a dead worker costs its own row; it comes back below
        # Ray Data keeps a budget of CPUs for each stage, which lets one task in where two would fit. So the number of
        # tasks is said outright, each counts as half a CPU, and nothing is reserved: tasks then run side by side.
        context.op_resource_reservation_enabled = False
        at_once = self._num_workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        held = self._ray.put(job)
        rows = [{"index": index, "task": pickle.dumps(task)} for index, task in enumerate(tasks)]
        done: set[int] = set()
        made = data.from_items(rows, override_num_blocks=len(rows)).map(
            _run_row,
            fn_kwargs={"job": held},
            num_cpus=0.5,
            compute=data.TaskPoolStrategy(size=at_once),
            ray_remote_args_fn=lambda: {"max_retries": 0},  # the engine's caller says what is tried again
        )
        for row in made.iter_rows():
            answer = pickle.loads(row["answer"])
            if isinstance(answer, ModelwrightError):
                raise answer
            done.add(row["index"])
            yield tasks[row["index"]], answer
        for index, task in enumerate(tasks):
            if index not in done:
                yield task, Died("the worker died (Ray lost the process that held it)")


_jobs: dict[str, Any] = {}  # of this process: the last one that it got, its steps with their models


def _fetch(job: Any) -> Any:
    """Return a job that came as a reference, read once by each process."""
    import ray

    if not isinstance(job, ray.ObjectRef):
        return job
    if job.hex() not in _jobs:
        _jobs.clear()
        _jobs[job.hex()] = ray.get(job)
    return _jobs[job.hex()]


def _run_row(row: dict[str, Any], job: Any) -> dict[str, Any]:
    """Do one task in a process of Ray's."""
    task: Task = pickle.loads(row["task"])
    try:
        answer: Any = run_task(task, _fetch(job))
    except ModelwrightError as error:
        answer = error
    except Exception as error:
        answer = DataError(f"A worker failed on piece {task.number}: {explain(error)}")
    return {"index": row["index"], "answer": pickle.dumps(answer)}
