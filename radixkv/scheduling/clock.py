"""What the scheduler reads a clock for: deadlines that pass, and how long a new request would wait."""

from __future__ import annotations

import heapq
import time
from collections import deque

from radixkv.scheduling.request import Request

__all__ = ["Deadlines", "Pace", "now"]

now = time.perf_counter

_ENDS = 64
"""Requests that ended last, by which `Pace` goes."""


class Deadlines:
    """The requests with a deadline, the next first. A step asks once whether one has passed, whatever their number."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._limit = 64

    def add(self, request: Request) -> None:
        if request.deadline is None:
            return
        if len(self._heap) >= self._limit:  # those that are done meanwhile need not be kept until their time
            self._heap = [entry for entry in self._heap if not entry[2].done]
            heapq.heapify(self._heap)
            self._limit = max(64, 2 * len(self._heap))
        heapq.heappush(self._heap, (request.submitted + request.deadline, request.id, request))

    def passed(self) -> list[Request]:
        """The unfinished requests whose time is over; each is told of once."""
        late = []
        while self._heap and (self._heap[0][2].done or self._heap[0][0] <= now()):
            request = heapq.heappop(self._heap)[2]
            if not request.done:
                late.append(request)
        return late


class Pace:
    """How fast requests end, and so how long the queue takes."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=_ENDS)

    def ended(self) -> None:
        self._ends.append(now())

    def wait(self, ahead: int) -> float | None:
        """Seconds until `ahead` requests more have ended, at the pace of the last ones; None until two have."""
        if len(self._ends) < 2:
            return None
        return ahead * (now() - self._ends[0]) / len(self._ends)
