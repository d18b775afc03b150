"""Signs of life between the processes of a launch, so that one that dies is named and the others do not wait for it.

Each rank counts up a number of its own in the store that the ranks met through, and looks at those of the others. A
number that stands still for too long is a dead rank. The rank that notices ends with an error that says which; one
that is caught inside an exchange that will never end is ended by its thread. A rank that fails says why before it goes.
"""

import os
import sys
import threading
import time
from typing import Any

from modelwright.base import distributed
from modelwright.base.errors import DeviceError

BEATS = 8  # signs of life in the time after which a silent rank counts as dead
GRACE_SECONDS = 10.0  # for what a rank still has to do when another is dead: say so, close its files


class Pulse:
    """The signs of life of this rank, and a look at those of the others, in a thread."""

    _made = 0

    def __init__(self, dead_after_seconds: float):
        from torch.distributed.distributed_c10d import _get_default_store

        self.dead_after_seconds = dead_after_seconds
        self.rank, self.size = distributed.rank(), distributed.world_size()
        store = _get_default_store()
        self._store: Any = store.clone() if hasattr(store, "clone") else store
        Pulse._made += 1  # all ranks make theirs in the same order: one name for those that belong together
        self._name = f"pulse/{Pulse._made}"
        self.found: str | None = None  # what is wrong with another rank
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def close(self, last_words: str | None = None) -> None:
        """Stop; with last words, tell the others why this rank ends before its time."""
        self._stop.set()
        self._thread.join(2)
        key = f"{self._name}/end/{self.rank}"
        try:
            self._store.set(key, last_words or "")
            self._store.add(f"{self._name}/{self.rank}", 1_000_000)  # at its end: silence is no death from here on
        except Exception:  # the store has died with its rank: nobody is left to be told
            return

    def explain(self) -> DeviceError | None:
        """Wait until a dead rank is found; return the error that names it, or None where all are alive."""
        stop = time.monotonic() + self.dead_after_seconds * 1.5 + 2
        while self.found is None and time.monotonic() < stop:
            time.sleep(0.05)
        return DeviceError(self.found) if self.found is not None else None

    def _beat(self) -> None:
        pause = self.dead_after_seconds / BEATS
        seen: dict[int, tuple[int, float]] = {}
        while not self._stop.wait(pause):
            self.found = self._look(seen)
            if self.found is not None:
                break
        if self.found is None or self._stop.wait(GRACE_SECONDS):
            return
        print(f"error: {self.found}", file=sys.stderr, flush=True)
        os._exit(1)  # caught in an exchange that nobody will end

    def _look(self, seen: dict[int, tuple[int, float]]) -> str | None:
        """Give a sign of life and return what is wrong with another rank, if anything."""
        advice = "Nothing half-written is left; start all ranks again with --resume to go on from the last checkpoint."
        try:
            self._store.add(f"{self._name}/{self.rank}", 1)
            for rank in range(self.size):
                count = self._store.add(f"{self._name}/{rank}", 0)
                now = time.monotonic()
                if rank not in seen or seen[rank][0] != count:
                    seen[rank] = (count, now)
                if count >= 1_000_000:
                    said = self._store.get(f"{self._name}/end/{rank}").decode()
                    if said:
                        return f"Rank {rank} of {self.size} has failed: {said} This rank ends too. {advice}"
                elif now - seen[rank][1] > self.dead_after_seconds:
                    return (
                        f"Rank {rank} of {self.size} has died: no sign of life for {now - seen[rank][1]:.0f} s "
                        f"(allowed are {self.dead_after_seconds:g}, loop.parallel.dead_after_seconds). This rank ends "
                        f"too. {advice}"
                    )
        except Exception as error:
            return (
                f"Rank 0 of {self.size}, or the launcher that the ranks met through, has died "
                f"({type(error).__name__}). This rank ends too. {advice}"
            )
        return None
