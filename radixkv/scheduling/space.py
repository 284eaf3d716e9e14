"""Whether requests fit the pool, and their leases: headroom for the running ones, pages behind a sliding window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from radixkv.errors import PoolExhausted
from radixkv.namespaces import seen_by
from radixkv.scheduling.request import Request
from radixkv.scheduling.room import PoolShape, Room, room_for

if TYPE_CHECKING:
    from radixkv.cache import Lease, PrefixCache

__all__ = ["Pages", "Space", "common_prefix", "lease_of"]

HEADROOM = 64
"""Tokens by which every running request can grow before one of them must be preempted, as a request is admitted."""


class Pages(Protocol):
    """What a scheduler asks of an `Engine`. Without a window, only the cache."""

    @property
    def cache(self) -> PrefixCache:
        """Leases come from it."""

    @property
    def drop_unit(self) -> int:
        """Tokens: what `drop` rounds to."""

    def drop(self, lease: Lease, window_left: int) -> int:
        """`Engine.drop`."""


def lease_of(request: Request) -> Lease:
    assert request.lease is not None, "only running requests hold a lease"
    return request.lease


class Space:
    """The pool as one scheduler sees it. `running` is the scheduler's list of running requests, in order."""

    def __init__(self, engine: Pages, window_left: int, running: list[Request]) -> None:
        self._engine, self._cache, self._window_left, self._running = engine, engine.cache, window_left, running

    def room_for(self, request: Request, max_rows: int) -> Room:
        """What `request` may take of the pool; PoolExhausted if all that its namespace may have could not hold it."""
        most = self._cache._most_pages(request.namespace)
        unit = self._engine.drop_unit if self._window_left >= 0 else 1
        pool = PoolShape(most, self._cache.page_size, self._window_left, unit)
        try:
            return room_for(pool, max_rows, len(request.prompt), request.max_new_tokens)
        except PoolExhausted as error:
            stats = self._cache.stats()
            error.free, error.evictable = stats.free, stats.evictable
            if most < stats.num_pages:
                error.args = (f"{error}. By quotas these are all that namespace {request.namespace!r} may have",)
            raise

    def cached(self, request: Request) -> int:
        """How many tokens of a waiting request a lease would find cached; one is always left to compute."""
        end = self.findable(request) - 1
        return self._cache.match(request.sequence(0, end), request.namespace) if end else 0

    def findable(self, request: Request) -> int:
        """The most tokens that a lease may begin with: what it finds of them in the tree it keeps to its end."""
        return max(min(request.num_tokens, request.room.shared), 1)

    def has_headroom(self, request: Request, cached: int) -> bool:
        """Whether a waiting request and all running ones can grow by `HEADROOM` tokens on the pages there are."""
        if not self._running:
            return True
        needed = self._pages_ahead(request)
        while True:
            stats = self._cache.stats()
            spare = stats.free + stats.evictable - sum(map(self._pages_ahead, self._running))
            if needed <= spare or needed - self._held_already(request, cached) <= spare:
                return True
            if not self.drop():
                return False

    def _pages_ahead(self, request: Request) -> int:
        """Pages that it takes besides those it has until it has grown by `HEADROOM` tokens, or to its end."""
        size, room, lease = self._cache.page_size, request.room, request.lease
        if lease is None and request.stats.preemptions and self.would_recompute(request):
            return room.needed(request.num_tokens, size)  # preempted again, it would have computed for nothing again
        if room.pages > room.private:
            return 0  # it lives on what it drops behind its window
        pages = min(-(-(request.num_tokens + HEADROOM) // size), room.pages)
        held = -(-lease.num_tokens // size) - lease.num_dropped // size if lease is not None else 0
        return max(pages - held, 0)

    def _held_already(self, request: Request, cached: int) -> int:
        """Whole pages of the cached prefix of a waiting request that a running one holds: they cost nothing."""
        prefix, seen = request.prompt[:cached], seen_by(request.namespace, self._cache.hierarchical)
        others = (other.prompt for other in self._running if other.namespace in seen)
        return max((common_prefix(prefix, prompt) for prompt in others), default=0) // self._cache.page_size

    def acquire(self, request: Request, end: int) -> Lease | None:
        """A lease on the first tokens of a waiting request, `end` at most; None until running ones leave more room."""
        end = min(end, self.findable(request))
        while True:
            try:
                return self._cache.acquire(request.sequence(0, end), request.namespace)
            except PoolExhausted:
                if self.drop():
                    continue
                if self._running:
                    return None
                raise  # nothing runs here: leases or pins outside this scheduler hold the pages

    def drop(self) -> bool:
        """Let running requests give back the pages behind the model's window; whether that freed any."""
        freed = 0
        for request in self._running if self._window_left >= 0 else ():
            if request.drafts:
                continue  # how much of its lease stays is not known yet
            pages = self._engine.drop(lease_of(request), self._window_left)
            request.dropped |= pages > 0
            freed += pages
        return freed > 0

    def would_recompute(self, request: Request) -> bool:
        """Whether `request` would not find in the tree what it has computed, if it gave its lease back."""
        return request.dropped or request.num_tokens > request.room.shared


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two int32 arrays."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if different.size else length
