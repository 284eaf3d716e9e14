"""Which requests run next, and on which pages: the waiting and the running requests of a `Generator`.

One rule orders everything: the older request first. Running requests get their tokens and pages in order of arrival,
waiting requests are admitted in order of arrival, and when pages run out the newest running request is preempted. It
gives its pages back, waits, and goes on later with the tokens and the random state it had; what is still cached then
is not computed again.

    submit ─► waiting ──acquire──► running ──stop token or length──► done
                 ▲                    │
                 └────── preempt ─────┘   PoolExhausted while a running request grows

Where every layer of the model has a sliding window, running requests first drop the pages behind it (see `window`).
Not before pages run out, because an answer that was dropped in part is not found again.
"""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

import numpy as np

from radixkv.errors import LeaseError, PoolExhausted

if TYPE_CHECKING:
    from radixkv.cache import Lease
    from radixkv.engine import Engine
    from radixkv.hf.request import Request, Status

__all__ = ["Schedule", "lease_of"]


def _arrival(request: Request) -> int:
    return request.id


def lease_of(request: Request) -> Lease:
    assert request.lease is not None, "only running requests hold a lease"
    return request.lease


class Schedule:
    """The requests of one generator that are not done, each in `waiting` or `running`, or among a sibling's followers.

    Whatever raises in between, every request stays in its place with its tokens.
    """

    def __init__(self, engine: Engine, window_left: int, max_step_tokens: int, max_running: int) -> None:
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._engine = engine
        self._window_left = window_left
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running

    def next_batch(self) -> list[Request]:
        """Choose the requests of the next step and give each a lease with room for its rows of this step."""
        batch: list[Request] = []
        budget = self._max_step_tokens
        before = len(self.running)
        for request in list(self.running):
            if budget == 0 or request.lease is None:
                break
            lease = request.lease
            if lease.num_written == request.num_tokens:  # the last step ended before this request's token was drawn
                self.leave(request, commit=True, again=True)
                continue
            rows = min(request.num_tokens - lease.num_written, budget, request.room.rows)
            rows = max(rows, lease.num_tokens - lease.num_written)  # more where the last step was interrupted
            if self._make_room(request, lease.num_written + rows):
                batch.append(request)
                budget = max(budget - rows, 0)
        if len(self.running) == before:
            self._admit(batch, budget)
        return batch

    def _make_room(self, request: Request, end: int) -> bool:
        """Extend the lease to `end` tokens, preempting newer requests as needed; False if it was preempted itself."""
        lease = lease_of(request)
        while lease.num_tokens < end:
            try:
                lease.extend(request.sequence(lease.num_tokens, end))
            except PoolExhausted:
                if self._drop():
                    continue
                newest = self.running[-1]
                if len(self.running) == 1 and self._would_recompute(request):
                    raise  # it would come to this point again and again
                self.leave(newest, commit=True, again=True)
                newest.stats.preemptions += 1
                if newest is request:
                    return False
        return True

    def _drop(self) -> bool:
        """Let running requests give back the pages behind the model's window; whether that freed any."""
        freed = 0
        for request in self.running if self._window_left >= 0 else ():
            pages = self._engine.drop(lease_of(request), self._window_left)
            request.dropped |= pages > 0
            freed += pages
        return freed > 0

    def _would_recompute(self, request: Request) -> bool:
        """Whether `request` would not find in the tree what it has computed, if it gave its lease back."""
        return request.dropped or request.num_tokens > request.room.shared

    def leave(self, request: Request, *, commit: bool, again: bool = False) -> None:
        """Release the lease of a running request; it waits `again` or is done."""
        self.running.remove(request)
        lease, request.lease = lease_of(request), None
        if again:
            self._wait_again(request)
        lease.release(commit=commit)

    def _wait_again(self, request: Request) -> None:
        request.status = "waiting"
        insort(self.waiting, request, key=_arrival)

    def end(self, request: Request, status: Status) -> None:
        """Take an unfinished request out of wherever it is; a sibling takes over the forks that it had to make."""
        request.status = status
        for leader in request.siblings:
            if request in leader.followers:
                leader.followers.remove(request)
        if request.followers:
            heir, *rest = request.followers
            heir.followers, request.followers = rest, []
            insort(self.waiting, heir, key=_arrival)
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self.leave(request, commit=True)

    def _admit(self, batch: list[Request], budget: int) -> None:
        """Let waiting requests join `batch`, oldest first, as long as the budget and the pages last."""
        for request in list(self.waiting):
            if budget == 0 or len(self.running) >= self._max_running:
                return
            cached = self._cached(request)
            if self._worth_waiting(request, cached):
                continue
            lease = self._acquire(request, cached + budget)
            if lease is None:
                return
            self._start(request, lease)
            batch.append(request)
            budget = max(budget - (lease.num_tokens - lease.num_written), 0)

    def _acquire(self, request: Request, end: int) -> Lease | None:
        """A lease on the first tokens of a waiting request, `end` at most; None until running ones leave more room."""
        if self.running and request.stats.preemptions and self._would_recompute(request):
            stats = self._engine.cache.stats()
            if stats.free + stats.evictable < request.room.needed(request.num_tokens, self._engine.page_size):
                return None  # preempted once more, it would have computed for nothing once more
        end = min(end, self._findable(request))
        while True:
            try:
                return self._engine.acquire(request.sequence(0, end), request.namespace)
            except PoolExhausted:
                if self._drop():
                    continue
                if self.running:
                    return None
                raise  # nothing runs here: leases or pins outside this generator hold the pages

    def _findable(self, request: Request) -> int:
        """The most tokens that a lease may begin with: what it finds of them in the tree it keeps to its end."""
        return max(min(request.num_tokens, request.room.shared), 1)

    def _cached(self, request: Request) -> int:
        """How many tokens of a waiting request a lease would find cached; one is always left to compute."""
        end = self._findable(request) - 1
        return self._engine.cache.match(request.sequence(0, end), request.namespace) if end else 0

    def _worth_waiting(self, request: Request, cached: int) -> bool:
        """Whether a running request is about to publish at least a page more of this prompt than is cached now."""
        longest = min(len(request.prompt), self._findable(request) - 1)
        if longest < cached + self._engine.page_size:
            return False
        for other in self.running:
            published = min(len(other.prompt), other.room.shared)
            pending = lease_of(other).num_written < published and other.namespace == request.namespace
            if pending and _common_prefix(request.prompt, other.prompt[:published]) >= cached + self._engine.page_size:
                return True
        return False

    def _start(self, request: Request, lease: Lease) -> None:
        """Move a request from waiting to running with `lease`."""
        self.waiting.remove(request)
        insort(self.running, request, key=_arrival)
        if request.stats.computed_tokens == 0 and not request.tokens:
            request.stats.cached_tokens = lease.num_cached
        request.lease, request.status, request.dropped = lease, "running", False

    def fork(self, request: Request, follower: Request) -> None:
        """Let `follower` run on a fork of the lease, or wait for a lease of its own.

        It waits where the batch or the pool is full, and where the lease cannot be forked: its namespace was cleared,
        or its prompt cannot be shared as a whole (behind a window).
        """
        follower.stats.cached_tokens = len(follower.prompt)
        if len(self.running) < self._max_running and len(request.prompt) <= request.room.shared:
            try:
                follower.lease = lease_of(request).fork()
            except (PoolExhausted, LeaseError):
                pass
            else:
                follower.status = "running"
                insort(self.running, follower, key=_arrival)
                return
        self._wait_again(follower)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two int32 arrays."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if different.size else length
