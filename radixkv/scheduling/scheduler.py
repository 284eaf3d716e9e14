"""Which requests run next, and on which pages. Knows tokens and pages; no model, no tensors, no torch.

One order decides everything, by default that of arrival. Running requests get their tokens and pages in order, waiting
requests are admitted in order, and when pages run out the last running request is preempted. It gives its pages back,
waits, and goes on later with the tokens it had; what is still cached then is not computed again.

    submit ─► waiting ──acquire──► running ──stop token or length──► done
                 ▲                    │
                 └────── preempt ─────┘   PoolExhausted while a running request grows

A request joins running ones only where room is left for all of them to grow by `HEADROOM` tokens: else the next step or
the one after would preempt it again, and so on.

Where every layer of the model has a sliding window, running requests first drop the pages behind it (see `room`).
Not before pages run short, because an answer that was dropped in part is not found again.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from radixkv.errors import InvalidArgument, LeaseError, PoolExhausted
from radixkv.scheduling.arguments import check_tokens, integer
from radixkv.scheduling.request import Request, Status
from radixkv.scheduling.room import PoolShape, room_for

if TYPE_CHECKING:
    from radixkv.cache import Lease, PrefixCache

__all__ = ["Batch", "Pages", "Scheduler", "arrival"]

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


@dataclass(frozen=True)
class Batch:
    """One step: `leases` go to `Engine.step`, and then `accept` takes a token for each request in `drawing`."""

    requests: list[Request]
    leases: list[Lease]
    """One for each of `requests`, with the rows of this step unwritten."""
    drawing: list[Request]
    """The requests whose tokens are all computed after the step, and those that fork them."""
    rows: list[int]
    """For each of `drawing`, which lease's logits say its next token: `logits[row]`."""
    written: list[int] = field(repr=False)
    """How many tokens of each lease were written before the step."""


def arrival(request: Request) -> int:
    """First come, first served."""
    return request.id


def lease_of(request: Request) -> Lease:
    assert request.lease is not None, "only running requests hold a lease"
    return request.lease


class Scheduler:
    """Chooses the requests of each step, and gives each a lease with room for its rows.

        while batch := scheduler.next():
            with engine.step(batch.leases) as step:
                logits = forward(step)
            scheduler.accept(logits[batch.rows].argmax(1).tolist())

    What was not accepted is computed again in the next batch, so an exception in between loses nothing. Whatever
    raises, every request keeps its place and its tokens. Calls belong to one thread, as leases do, and none but
    `submit` may be made while a step is open.

    Args:
        engine: an `Engine`, or a host's own pages (see `Pages`).
        max_step_tokens: rows of a step at most. Longer prompts are computed over several steps.
        max_running: requests that run at once.
        window_left: how many keys before its own a row sees at most in any layer, if all have a window; else -1.
        order: a key that sorts requests; equal keys by arrival. Asked once, when a request is submitted, so that two
            requests never preempt each other in turn. The first in order is never preempted and gets what it needs; so
            that everybody is the first at some time, the keys of later requests must in the end exceed any earlier one:
            `lambda r: r.id - 100 * r.priority` lets priority overtake a hundred requests, `-r.priority` alone can
            starve. Admission preempts nobody: an urgent request waits for pages like any other, but first in line.

    Raises:
        InvalidArgument: limits that cannot work.
    """

    def __init__(
        self,
        engine: Pages,
        *,
        max_step_tokens: int = 2048,
        max_running: int = 256,
        window_left: int = -1,
        order: Callable[[Any], Any] = arrival,
    ) -> None:
        self._max_step_tokens = integer("max_step_tokens", max_step_tokens, 1)
        self._max_running = integer("max_running", max_running, 1)
        if self._max_running > self._max_step_tokens:
            raise InvalidArgument(
                f"max_running is {max_running}, max_step_tokens {max_step_tokens}: every running request needs a token "
                "a step, so give 1 <= max_running <= max_step_tokens"
            )
        self._window_left = integer("window_left", window_left, -1)
        self.waiting: list[Request] = []
        """In order; only the scheduler changes it, and `running`. Followers that wait for their fork are in neither."""
        self.running: list[Request] = []
        self._engine = engine
        self._cache = engine.cache
        self._order = order
        self._submitted = 0
        self._batch: Batch | None = None

    @property
    def unfinished(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.waiting or self.running)

    # ---- requests come and go ----

    def submit(self, *requests: Request) -> None:
        """Queue a request; it joins the batch in one of the next steps. May be called at any time.

        Several must have one prompt and namespace: it is computed once, for the first, and the others fork it.

        Raises InvalidArgument for requests that were submitted before or differ, PoolExhausted for one that the whole
        pool could not hold, LeaseError for a closed cache. Then nothing was submitted.
        """
        if not requests:
            raise InvalidArgument("submit() without a request: give one, or several of one prompt")
        first, twice = requests[0], len(set(requests)) < len(requests)
        for request in requests:
            if twice or request.owner is not None:
                raise InvalidArgument(f"request {request.id} was submitted before: make a new Request")
            if request.namespace != first.namespace or not np.array_equal(request.prompt, first.prompt):
                raise InvalidArgument("requests of one submission differ in prompt or namespace: submit them apart")
        unit = self._engine.drop_unit if self._window_left >= 0 else 1
        pool = PoolShape(self._cache.num_pages, self._cache.page_size, self._window_left, unit)
        rooms = [room_for(pool, self._max_step_tokens, len(r.prompt), r.max_new_tokens) for r in requests]
        self._cache.match(first.prompt[:1], first.namespace)  # a closed cache refuses here, not in every later step
        for number, request in enumerate(requests, self._submitted):
            request.id = number
            request.place = (self._order(request), number)
        now = time.perf_counter()
        for request, room in zip(requests, rooms, strict=True):
            request.owner, request.room, request.submitted = self, room, now
            request.prompt, request.siblings = first.prompt, requests
        self._submitted += len(requests)
        first.followers = list(requests[1:])
        insort(self.waiting, first, key=_place)

    def cancel(self, request: Request) -> bool:
        """End `request` and release its pages; what it has computed stays cached. False if it was done already."""
        self._check(request)
        if request.done:
            return False
        self._end(request, "cancelled")
        return True

    def fail(self, request: Request, error: Exception) -> None:
        """End `request` with status "error", even if its last token has come: its host could not use it."""
        self._check(request)
        request.error = error
        self._end(request, "error")

    # ---- a step ----

    def next(self) -> Batch | None:
        """The next step, or None if no request is unfinished.

        Raises PoolExhausted, with the requests as they were, when the first request finds too few pages because leases
        or pins outside this scheduler hold them.
        """
        self._settle()
        while self.unfinished:  # twice at most: where all running requests leave, a waiting one can start
            if requests := self._choose():
                self._batch = _batch_of(requests)
                return self._batch
        return None

    def accept(self, tokens: Sequence[int]) -> None:
        """The step was run: append to each request in the batch's `drawing` its token.

        Those that got a stop token or their last one are done, and their pages released. Requests that were cancelled
        meanwhile get none.

        Raises LeaseError without a batch or before its step was run, InvalidArgument for a wrong number of tokens,
        InvalidTokens for what is no token id. Then nothing has changed.
        """
        batch = self._batch
        if batch is None:
            raise LeaseError("accept() without a batch: call next(), run its step, and accept its tokens once")
        if len(tokens) != len(batch.drawing):
            raise InvalidArgument(f"{len(tokens)} tokens for {len(batch.drawing)} requests: give one for each drawing")
        values = check_tokens(tokens).tolist() if batch.drawing else []
        if any(lease.num_written < lease.num_tokens for lease in batch.leases if not lease.released):
            raise LeaseError("accept() before the step: run all rows of the batch's leases first")
        self._settle()
        taking = [self._takes(r, batch.requests[row]) for r, row in zip(batch.drawing, batch.rows, strict=True)]
        for request, token, takes in zip(batch.drawing, values, taking, strict=True):
            if takes:
                request.accept(token)
                if request.done:
                    self._end(request, request.status)

    def abandon(self) -> None:
        """The step of the last batch failed: release its leases without commit; its requests wait again."""
        batch, self._batch = self._batch, None
        for request, lease in zip(batch.requests, batch.leases, strict=True) if batch else ():
            if request.lease is lease:
                self._leave(request, commit=False, again=True)

    def _settle(self) -> None:
        """Count what the last batch's step has computed, and publish chunks of prompts."""
        batch, self._batch = self._batch, None
        for request, lease, before in zip(batch.requests, batch.leases, batch.written, strict=True) if batch else ():
            if request.lease is not lease:
                continue  # cancelled since
            count = lease.num_written - before
            request.stats.computed_tokens += count
            if count > 1 and lease.num_written <= request.room.shared:
                lease.commit()

    def _takes(self, request: Request, leader: Request) -> bool:
        """Whether `request` goes on with a token of `leader`'s row: `leader` itself, or a follower, which now forks."""
        if request is leader:
            return not request.done
        if request not in leader.followers:
            return False
        leader.followers.remove(request)
        self._fork(leader, request)
        return True

    # ---- which requests ----

    def _choose(self) -> list[Request]:
        """The requests of the next step, each with a lease that has room for its rows."""
        chosen: list[Request] = []
        budget = self._max_step_tokens
        before = len(self.running)
        for request in list(self.running):
            if budget == 0 or request.lease is None:
                break
            lease = request.lease
            if lease.num_written == request.num_tokens:  # the last step ended before this request's token was drawn
                self._leave(request, commit=True, again=True)
                continue
            rows = min(request.num_tokens - lease.num_written, budget, request.room.rows)
            rows = max(rows, lease.num_tokens - lease.num_written)  # more where the last step was interrupted
            if self._make_room(request, lease.num_written + rows):
                chosen.append(request)
                budget = max(budget - rows, 0)
        if len(self.running) == before:
            self._admit(chosen, budget)
        return chosen

    def _admit(self, chosen: list[Request], budget: int) -> None:
        """Let waiting requests join, in order, as long as the budget and the pages last."""
        for request in list(self.waiting):
            if budget == 0 or len(self.running) >= self._max_running:
                return
            cached = self._cached(request)
            if self._worth_waiting(request, cached):
                continue
            if not self._has_headroom(request, cached):
                return
            lease = self._acquire(request, cached + budget)
            if lease is None:
                return
            self._start(request, lease)
            chosen.append(request)
            budget = max(budget - (lease.num_tokens - lease.num_written), 0)

    def _cached(self, request: Request) -> int:
        """How many tokens of a waiting request a lease would find cached; one is always left to compute."""
        end = self._findable(request) - 1
        return self._cache.match(request.sequence(0, end), request.namespace) if end else 0

    def _findable(self, request: Request) -> int:
        """The most tokens that a lease may begin with: what it finds of them in the tree it keeps to its end."""
        return max(min(request.num_tokens, request.room.shared), 1)

    def _worth_waiting(self, request: Request, cached: int) -> bool:
        """Whether a running request is about to publish at least a page more of this prompt than is cached now."""
        longest = min(len(request.prompt), self._findable(request) - 1)
        if longest < cached + self._cache.page_size:
            return False
        for other in self.running:
            published = min(len(other.prompt), other.room.shared)
            pending = lease_of(other).num_written < published and other.namespace == request.namespace
            if pending and _common_prefix(request.prompt, other.prompt[:published]) >= cached + self._cache.page_size:
                return True
        return False

    # ---- pages ----

    def _has_headroom(self, request: Request, cached: int) -> bool:
        """Whether a waiting request and all running ones can grow by `HEADROOM` tokens on the pages there are."""
        if not self.running:
            return True
        needed = self._pages_ahead(request)
        while True:
            stats = self._cache.stats()
            spare = stats.free + stats.evictable - sum(map(self._pages_ahead, self.running))
            if needed <= spare or needed - self._held_already(request, cached) <= spare:
                return True
            if not self._drop():
                return False

    def _pages_ahead(self, request: Request) -> int:
        """Pages that it takes besides those it has until it has grown by `HEADROOM` tokens, or to its end."""
        size, room, lease = self._cache.page_size, request.room, request.lease
        if lease is None and request.stats.preemptions and self._would_recompute(request):
            return room.needed(request.num_tokens, size)  # preempted again, it would have computed for nothing again
        if room.pages > self._cache.num_pages:
            return 0  # it lives on what it drops behind its window
        pages = min(-(-(request.num_tokens + HEADROOM) // size), room.pages)
        held = -(-lease.num_tokens // size) - lease.num_dropped // size if lease is not None else 0
        return max(pages - held, 0)

    def _held_already(self, request: Request, cached: int) -> int:
        """Whole pages of the cached prefix of a waiting request that a running one holds: they cost nothing."""
        prefix = request.prompt[:cached]
        others = (other.prompt for other in self.running if other.namespace == request.namespace)
        return max((_common_prefix(prefix, prompt) for prompt in others), default=0) // self._cache.page_size

    def _acquire(self, request: Request, end: int) -> Lease | None:
        """A lease on the first tokens of a waiting request, `end` at most; None until running ones leave more room."""
        end = min(end, self._findable(request))
        while True:
            try:
                return self._cache.acquire(request.sequence(0, end), request.namespace)
            except PoolExhausted:
                if self._drop():
                    continue
                if self.running:
                    return None
                raise  # nothing runs here: leases or pins outside this scheduler hold the pages

    def _make_room(self, request: Request, end: int) -> bool:
        """Extend the lease to `end` tokens, preempting later requests as needed; False if it was preempted itself."""
        lease = lease_of(request)
        while lease.num_tokens < end:
            try:
                lease.extend(request.sequence(lease.num_tokens, end))
            except PoolExhausted:
                if self._drop():
                    continue
                last = self.running[-1]
                if len(self.running) == 1 and self._would_recompute(request):
                    raise  # it would come to this point again and again
                self._leave(last, commit=True, again=True)
                last.stats.preemptions += 1
                if last is request:
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

    # ---- from one state to another ----

    def _start(self, request: Request, lease: Lease) -> None:
        """Move a request from waiting to running with `lease`."""
        self.waiting.remove(request)
        insort(self.running, request, key=_place)
        if request.stats.computed_tokens == 0 and not request.tokens:
            request.stats.cached_tokens = lease.num_cached
        request.lease, request.status, request.dropped = lease, "running", False

    def _fork(self, leader: Request, follower: Request) -> None:
        """Let `follower` run on a fork of the lease, or wait for a lease of its own.

        It waits where the batch or the pool is full, and where the lease cannot be forked: its namespace was cleared,
        or its prompt cannot be shared as a whole (behind a window).
        """
        follower.stats.cached_tokens = len(follower.prompt)
        if (
            len(self.running) < self._max_running
            and len(leader.prompt) <= leader.room.shared
            and self._has_headroom(follower, len(leader.prompt))
        ):
            try:
                follower.lease = lease_of(leader).fork()
            except (PoolExhausted, LeaseError):
                pass
            else:
                follower.status = "running"
                insort(self.running, follower, key=_place)
                return
        self._wait_again(follower)

    def _leave(self, request: Request, *, commit: bool, again: bool = False) -> None:
        """Release the lease of a running request; it waits `again` or is done."""
        self.running.remove(request)
        lease, request.lease = lease_of(request), None
        if again:
            self._wait_again(request)
        lease.release(commit=commit)

    def _wait_again(self, request: Request) -> None:
        request.status = "waiting"
        insort(self.waiting, request, key=_place)

    def _end(self, request: Request, status: Status) -> None:
        """Take a request out of wherever it is; a sibling takes over the forks that it had to make."""
        request.status = status
        for leader in request.siblings:
            if request in leader.followers:
                leader.followers.remove(request)
        if request.followers:
            heir, *rest = request.followers
            heir.followers, request.followers = rest, []
            insort(self.waiting, heir, key=_place)
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self._leave(request, commit=True)

    def _check(self, request: Request) -> None:
        if request.owner is not self:
            raise InvalidArgument(f"request {request.id} was not submitted to this Scheduler: call the one it is of")


def _place(request: Request) -> Any:
    return request.place


def _batch_of(requests: list[Request]) -> Batch:
    """The step of these running requests, and who gets a token after it."""
    leases = [lease_of(request) for request in requests]
    drawing: list[Request] = []
    rows: list[int] = []
    for row, (request, lease) in enumerate(zip(requests, leases, strict=True)):
        if lease.num_tokens == request.num_tokens:
            both = [request, *request.followers]
            drawing += both
            rows += [row] * len(both)
    return Batch(requests, leases, drawing, rows, [lease.num_written for lease in leases])


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two int32 arrays."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if different.size else length
