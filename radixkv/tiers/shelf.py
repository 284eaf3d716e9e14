"""Shelf: a store, with what is known of it and the threads that wait for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from radixkv.tiers.breaker import Breaker
from radixkv.tiers.lane import Lane
from radixkv.tiers.planner import Planner
from radixkv.tiers.store import Store

__all__ = ["GRACE", "Shelf"]

GRACE = 0.5
"""Seconds that threads get to end, where none hangs."""


class Shelf:
    """Args: threads: that read from the store; 0: whoever pumps its lanes."""

    def __init__(self, store: Store, threads: int) -> None:
        self.store = store
        self.reads = Lane(f"radixkv-{store.name}", threads)
        self.writes = Lane(f"radixkv-{store.name}-write", min(1, threads))
        self.breaker = Breaker()
        self.counts = dict.fromkeys(("read", "written", "refused", "failed", "corrupt"), 0)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Whatever the store raises is a failure that is counted."""
        try:
            yield
        except Exception:
            self.counts["failed"] += 1
            self.breaker.failed()
        else:
            self.breaker.succeeded()

    def has(self, key: bytes) -> bool:
        try:
            return key in self.store
        except Exception:
            return False

    def pump(self) -> bool:
        """Run what waits, if the lanes have no threads; whether there was anything."""
        return self.reads.pump() | self.writes.pump()

    def stats(self, planner: Planner) -> dict[str, Any]:
        rate = planner.load.get(self.store.name)
        speed = None if rate is None else rate.per_second
        return {**self.counts, "breaker": self.breaker.state, "load_bytes_per_second": speed}

    def close(self, until: float) -> None:
        """Run out, to that moment of time.monotonic(). A store in which a call hangs is left as it is."""
        ended = [lane.close(max(GRACE, until - time.monotonic())) for lane in (self.writes, self.reads)]
        if all(ended):
            with contextlib.suppress(Exception):
                self.store.close()
