"""Whether to bring pages up or to compute them, from what both have taken so far."""

from __future__ import annotations

import threading

__all__ = ["Planner", "Rate"]

_WEIGHT = 0.3  # of what was seen last
_MARGIN = 1.2  # loading must be so much faster
_FORGET = 0.9  # each time that it was not asked, a store is thought so much faster: at some time it is asked again
_LEAST = 0.02  # seconds until a fetch is given up, at least
_UNKNOWN = 1.0  # and where nothing is known yet


class Rate:
    """Units a second, as last seen: an exponentially weighted mean of seconds a unit. None before the first."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def add(self, units: float, seconds: float) -> None:
        one = seconds / units
        self.seconds = one if self.seconds is None else self.seconds + _WEIGHT * (one - self.seconds)

    def forget(self) -> None:
        if self.seconds is not None:
            self.seconds *= _FORGET

    @property
    def per_second(self) -> float | None:
        return 1 / self.seconds if self.seconds else None


class Planner:
    """Compares what the model computes a second with what stores deliver. Where nothing is known, it says: try.

    A token of b bytes, computed at P tokens/s and delivered at B bytes/s, is worth a load if ``1.2 * b / B < 1 / P``. B
    is that of whole fetches: what a store takes to answer and what waits before it are in it.
    """

    def __init__(self, token_bytes: float) -> None:
        self._token_bytes = token_bytes
        self._lock = threading.Lock()
        self.compute = Rate()
        """Tokens."""
        self.load: dict[str, Rate] = {}
        """Bytes, by store."""

    def computed(self, tokens: int, seconds: float) -> None:
        """A step computed so many rows."""
        with self._lock:
            self.compute.add(tokens, seconds)

    def loaded(self, store: str, num_bytes: int, seconds: float) -> None:
        """A fetch had so many bytes of it, so long after it had asked."""
        with self._lock:
            self.load.setdefault(store, Rate()).add(num_bytes, seconds)

    def worth(self, store: str) -> bool:
        """Whether loading tokens of a store beats computing them."""
        with self._lock:
            rate, compute = self.load.get(store), self.compute.seconds
            if rate is None or rate.seconds is None or compute is None:
                return True
            if _MARGIN * self._token_bytes * rate.seconds < compute:
                return True
            rate.forget()
            return False

    def deadline(self, tokens: int) -> float:
        """Seconds that waiting for so many tokens may take: what computing them would."""
        with self._lock:
            compute = self.compute.seconds
        return _UNKNOWN if compute is None else max(_LEAST, tokens * compute)
