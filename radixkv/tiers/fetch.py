"""Fetch: a request's pages on their way from the tiers into RAM, while the request waits."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from radixkv.tiers.identity import Seen

if TYPE_CHECKING:
    from radixkv.tiers.tiers import Tiers

__all__ = ["Fetch"]


class Fetch:
    """Made by `Engine.fetch` or `Tiers.fetch`. When it is `ready`, acquire the request and `fill` its lease.

    A fetch that is dropped or cancelled lets go of its memory. Any thread may ask it.
    """

    def __init__(
        self,
        tiers: Tiers,
        tokens: npt.NDArray[np.int32],
        namespace: str,
        tag: bytes,
        seen: list[Seen],
        first: int,
        deadline: float,
    ) -> None:
        self.prompt, self.namespace, self.tag = tokens, namespace, tag
        self.seen, self.first = seen, first
        self.slots: list[int | None] = [None] * len(seen[0].keys)
        self.level = [len(seen) - 1] * len(self.slots)  # whose page it is, of those that it sees
        self.pending = 0  # jobs that may still bring pages
        self.asked: set[int] = set()  # the stores that were, by number
        self.planned = True  # load only what is expected to be faster than computing it
        self.sources: dict[str, int] = {}  #: tokens by where they came from
        self.restored: dict[str, int] = {}  #: of these, those that `Engine.fill` gave a lease
        self.where: list[str] = [""] * len(self.slots)
        self._tiers = tiers  # and not the loader alone: they stay open while something loads
        self._started = time.monotonic()
        self._ended = math.nan
        self._until = self._started + deadline
        self._done = threading.Event()

    @property
    def ready(self) -> bool:
        """All that is there has come, or was given up, or the deadline is past. Costs nothing to ask."""
        if not self._done.is_set() and time.monotonic() >= self._until:
            self._tiers.loader.settle(self, late=True)
        return self._done.is_set()

    @property
    def num_pages(self) -> int:
        """Pages, from `first` on, that are in RAM now without a gap."""
        slots = self.slots[self.first :]
        return next((i for i, slot in enumerate(slots) if slot is None), len(slots))

    @property
    def tokens(self) -> int:
        """Tokens, from the first one on, that the pool and this fetch hold now."""
        return (self.first + self.num_pages) * self._tiers.loader.page_size

    def key(self, i: int) -> bytes:
        """What the page that is loaded is called."""
        return self.seen[self.level[i]].keys[i]

    def parents(self, i: int) -> list[bytes]:
        """What the page before it may be called."""
        above = self.seen[: self.level[i] + 1]
        return [seen.keys[i - 1] if i else seen.tag for seen in above]

    def path(self, end: int) -> list[bytes]:
        """Its first pages: whose those are that the pool has is not known."""
        before = [seen.keys[i] for i in range(self.first) for seen in self.seen]
        return before + [self.key(i) for i in range(self.first, end)]

    def owner(self, i: int) -> str:
        """The namespace that had published a page."""
        return self.seen[self.level[i]].namespace

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is ready, at most to its deadline; whether it is."""
        left = max(0.0, self._until - time.monotonic())
        self._done.wait(left if timeout is None else min(left, timeout))
        return self.ready

    def cancel(self) -> None:
        """Let go of the memory. What is under way goes on, for others."""
        self._tiers.loader.settle(self, late=False)
        self._tiers.loader.let_go(self)

    def finish(self) -> None:
        self._ended = time.monotonic()
        self._done.set()

    @property
    def seconds(self) -> float:
        """How long it took, or takes so far."""
        return (self._ended if self._done.is_set() else time.monotonic()) - self._started

    def of(self, tiers: Tiers) -> bool:
        return self._tiers is tiers

    @property
    def finished(self) -> bool:
        return self._done.is_set()

    def __del__(self) -> None:
        if hasattr(self, "_done"):
            self._tiers.loader.abandon(self)
