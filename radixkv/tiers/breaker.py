"""A breaker: a store that fails again and again is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Breaker"]

_FAILURES, _FIRST, _LONGEST = 3, 1.0, 60.0


class Breaker:
    """Open for a second after three failures in a row; each probe that fails doubles the time, up to a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._pause = _FIRST
        self._until = 0.0

    @property
    def state(self) -> str:
        """ "closed": calls pass; "open": none does; "probing": the next one tells."""
        if self._failures < _FAILURES:
            return "closed"
        return "open" if self._clock() < self._until else "probing"

    def allow(self) -> bool:
        """Whether a call may be made now. In the state "probing" one may."""
        if self.state == "probing":
            self._until = self._clock() + self._pause
            return True
        return self.state == "closed"

    def succeeded(self) -> None:
        self._failures, self._pause = 0, _FIRST

    def failed(self) -> None:
        self._failures += 1
        if self._failures > _FAILURES:
            self._pause = min(2 * self._pause, _LONGEST)
        if self._failures >= _FAILURES:
            self._until = self._clock() + self._pause
