"""Bring mapped weights into memory ahead of their use, in the order of the file, while the model is being built.

A mapped tensor costs nothing until it is used; then each 64 kB of it costs a page fault, and on a cold file a wait for
the disk. One thread that asks the system for the pages in order reads a file at the disk's full rate, and the first
forward pass runs behind it. Only for weights that are kept as they are, and only while they fit in half of the memory
that is free; elsewhere, or on a system without this call, pages come in when they are used.

Measured with benchmarks/load_time.py; see docs/weights.md.
"""

import ctypes
import os
import queue
import sys
import threading
from types import TracebackType

import torch

PIECE_BYTES = 32 << 20
MADV_POPULATE_READ = 22  # Linux 5.14: map pages and read them, one call for many


class Prefetch:
    """A thread that reads the storages it is given, one after the other. It ends when its owner and its work do."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[torch.UntypedStorage | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._left_bytes = _free_bytes() // 2

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._waiting.put(None)

    def add(self, storage: torch.UntypedStorage) -> None:
        """Read ``storage`` when those before it are read."""
        self._left_bytes -= storage.nbytes()
        if self._left_bytes < 0 or sys.platform != "linux":
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="prefetch weights", daemon=True)
            self._thread.start()
        self._waiting.put(storage)

    def _run(self) -> None:
        madvise = ctypes.CDLL(None, use_errno=True).madvise  # lets the interpreter go on meanwhile
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        while (storage := self._waiting.get()) is not None:
            for start in range(0, storage.nbytes(), PIECE_BYTES):
                size = min(PIECE_BYTES, storage.nbytes() - start)
                if madvise(storage.data_ptr() + start, size, MADV_POPULATE_READ):
                    return  # an old kernel, or memory is short


def _free_bytes() -> int:
    """Return the memory that can be had without swapping; 0 where that is not known."""
    try:
        with open("/proc/meminfo", encoding="ascii") as handle:
            return next(int(line.split()[1]) * 1024 for line in handle if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 0
