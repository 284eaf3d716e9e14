"""Threads that run jobs in order, or nobody's: then whoever pumps runs them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

__all__ = ["Lane"]


class Lane:
    def __init__(self, name: str, threads: int) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_run, args=(self._jobs,), name=name, daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def __del__(self) -> None:
        for _ in getattr(self, "_threads", ()):  # they hold the queue only
            self._jobs.put(None)

    def put(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def pump(self) -> bool:
        """Run what waits, in this thread, if the lane has none of its own; whether there was anything."""
        if self._threads:
            return False
        ran = False
        while not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                job()
                ran = True
        return ran

    def close(self, seconds: float) -> bool:
        """Run out; whether all was done in time. A thread that hangs in a call is left behind."""
        until = time.monotonic() + seconds
        self.pump()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def _run(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # or its fetch would live on while this waits
