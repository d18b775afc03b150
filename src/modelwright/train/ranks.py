"""Processes on this machine that are brought together for a function, and stay for the next one.

For checks at toy size: starting a process costs seconds, meeting in a group costs milliseconds. The processes compute
on the CPU, one thread each. Training itself is started by torchrun or Ray.
"""

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from modelwright.base.errors import DeviceError

MAX_WAIT = timedelta(seconds=40)


class RankPool:
    """Some processes, started when they are first needed."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._count = 0

    def call(self, num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function of a module in ``num_ranks`` processes that form a group; return what each returned.

        Raises:
            DeviceError: One of them failed; the message has its traceback.
        """
        self._grow(num_ranks)
        self._count += 1
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, link) in enumerate(self._workers[:num_ranks]):
                link.send((rank, num_ranks, f"file://{folder}/meet", function, args))
            found = [self._receive(rank) for rank in range(num_ranks)]
        failed = [(rank, value) for rank, (is_good, value) in enumerate(found) if not is_good]
        if failed:
            rank, said = failed[0]
            self.close()
            raise DeviceError(f"Rank {rank} of {num_ranks} failed; expected a result. It said:\n{said}")
        return [value for _, value in found]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        process, link = self._workers[rank]
        try:
            return link.recv()  # type: ignore[no-any-return]
        except EOFError:
            process.join(5)
            return False, f"nothing: the process ended with code {process.exitcode}"

    def _grow(self, num: int) -> None:
        context = multiprocessing.get_context("spawn")
        if not self._workers:
            atexit.register(self.close)
        while len(self._workers) < num:
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, mine))

    def close(self) -> None:
        """End the processes."""
        for process, link in self._workers:
            link.close()
            process.join(2)
            if process.is_alive():
                process.kill()
        self._workers = []


def _serve(link: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while True:
        try:
            rank, num_ranks, meeting, function, args = link.recv()
        except (EOFError, OSError):
            return
        try:
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks, timeout=MAX_WAIT)
            value = (True, function(*args))
        except BaseException:  # the caller is told, whatever it was
            value = (False, traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        link.send(value)


POOL = RankPool()
