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

from bisect import insort
from collections.abc import Iterator, Sequence
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from radixkv.errors import InvalidArgument, LeaseError, PoolExhausted, QueueFull
from radixkv.namespaces import seen_by
from radixkv.scheduling.arguments import check_tokens, integer
from radixkv.scheduling.batch import Batch, batch_of
from radixkv.scheduling.clock import Deadlines, Pace, now
from radixkv.scheduling.drafts import accepted_tokens, add_drafts, take_back
from radixkv.scheduling.loading import Loading
from radixkv.scheduling.policy import Policy, check_keys, check_policy, longest_prefix_first
from radixkv.scheduling.request import Request, Status
from radixkv.scheduling.space import Pages, Space, common_prefix, lease_of

if TYPE_CHECKING:
    from radixkv.cache import Lease

__all__ = ["Scheduler"]


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
        engine: an `Engine`, or a host's own pages (see `Pages`). Where it has tiers, pages are fetched from them while
            requests wait; those whose pages are still to come are passed over.
        max_step_tokens: rows of a step at most. Longer prompts are computed over several steps.
        max_running: requests that run at once.
        window_left: how many keys before its own a row sees at most in any layer, if all have a window; else -1.
        policy: who comes first: "arrival", "priority" (a step of `Request.priority` overtakes a hundred requests), or a
            key function, asked once for each request; equal keys by arrival (see `radixkv.scheduling.policy`).
            "prefix" admits the longest cached prefix first, which overtakes an earlier request for each 16 tokens.
            Admission preempts nobody: an urgent request waits for pages like any other, but first in line.
        max_waiting: requests that wait at most; more are refused with QueueFull. None: any number.

    Raises:
        InvalidArgument: limits that cannot work.
    """

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a Scheduler cannot be pickled or copied: its requests hold leases on one pool. Make one in each "
            "process, and submit() there"
        )

    def __init__(
        self,
        engine: Pages,
        *,
        max_step_tokens: int = 2048,
        max_running: int = 256,
        window_left: int = -1,
        policy: Policy = "arrival",
        max_waiting: int | None = None,
    ) -> None:
        self._max_step_tokens = integer("max_step_tokens", max_step_tokens, 1)
        self._max_running = integer("max_running", max_running, 1)
        if self._max_running > self._max_step_tokens:
            raise InvalidArgument(
                f"max_running is {max_running}, max_step_tokens {max_step_tokens}: every running request needs a token "
                "a step, so give 1 <= max_running <= max_step_tokens"
            )
        window_left = integer("window_left", window_left, -1)
        self._max_waiting = None if max_waiting is None else integer("max_waiting", max_waiting, 1)
        self._key, self._policy = check_policy(policy), policy
        self.waiting: list[Request] = []
        """In order; only the scheduler changes it, and `running`. Followers that wait for their fork are in neither."""
        self.running: list[Request] = []
        self._cache = engine.cache
        self._space = Space(engine, window_left, self.running)
        self._loading = Loading(engine, self._space)
        self._deadlines, self._pace = Deadlines(), Pace()
        self._submitted = 0
        self._batch: Batch | None = None

    @property
    def unfinished(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.waiting or self.running)

    def estimated_wait(self) -> float | None:
        """Seconds that a request submitted now would wait for its place in the batch; None if nothing is known yet.

        0 where nobody waits and a place is free. Else those ahead take as long as the last 64 requests that ended.
        """
        if not self.waiting and len(self.running) < self._max_running:
            return 0.0
        return self._pace.wait(len(self.waiting) + 1)

    # ---- requests come and go ----

    def submit(self, *requests: Request) -> None:
        """Queue a request; it joins the batch in one of the next steps. May be called at any time.

        Several must have one prompt and namespace: it is computed once, for the first, and the others fork it.

        Raises InvalidArgument for requests that were submitted before or differ, or have a priority that the policy
        ignores; PoolExhausted for one that the whole pool could not hold; QueueFull where `max_waiting` wait;
        LeaseError for a closed cache. Then nothing was submitted.
        """
        if not requests:
            raise InvalidArgument("submit() without a request: give one, or several of one prompt")
        for request in requests:
            _check_type(request)
        first, twice = requests[0], len(set(requests)) < len(requests)
        for request in requests:
            if twice or request.owner is not None:
                raise InvalidArgument(f"request {request.id} was submitted before: make a new Request")
            if request.namespace != first.namespace or not np.array_equal(request.prompt, first.prompt):
                raise InvalidArgument("requests of one submission differ in prompt or namespace: submit them apart")
            if request.priority and self._policy in ("arrival", "prefix"):
                raise InvalidArgument(
                    f"priority is {request.priority}, but policy is {self._policy!r}, which ignores it: give "
                    "policy='priority'"
                )
        rooms = [self._space.room_for(request, self._max_step_tokens) for request in requests]
        if self._max_waiting is not None and len(self.waiting) >= self._max_waiting:
            raise QueueFull(
                f"{len(self.waiting)} requests wait, max_waiting is {self._max_waiting}: submit again later, or give "
                "a larger max_waiting"
            )
        self._cache.match(first.prompt[:1], first.namespace)  # a closed cache refuses here, not in every later step
        for number, request in enumerate(requests, self._submitted):
            request.id = number
            request.place = (self._key(request), number)
        if callable(self._policy):
            check_keys(requests, [*self.waiting, *self.running])
        time = now()
        for request, room in zip(requests, rooms, strict=True):
            request.owner, request.room, request.submitted = self, room, time
            request.prompt, request.siblings = first.prompt, requests
            self._deadlines.add(request)
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

    def fail(self, request: Request, error: Exception, *, commit: bool = True) -> None:
        """End `request` with status "error", even if its last token has come: its host could not use it.

        Without `commit` nothing more of what it has computed is published: for a model that computed nonsense.
        """
        self._check(request)
        if not isinstance(error, Exception):
            raise InvalidArgument(f"error is {shown(error)}: give an exception")
        request.error = error
        self._end(request, "error", commit=commit)

    # ---- a step ----

    def next(self) -> Batch | None:
        """The next step, or None if no request is unfinished. Ends those whose deadline has passed.

        Raises PoolExhausted, with the requests as they were, when the first request finds too few pages because leases
        or pins outside this scheduler hold them.
        """
        self._settle()
        for request in self.running:
            take_back(request, request.num_tokens)  # what nobody accepted
        for request in self._deadlines.passed():
            self._end(request, "deadline")
        while self.unfinished:  # again where all running requests leave, or all waiting ones wait for the tiers
            if requests := self._choose():
                self._batch = batch_of(requests)
                return self._batch
            self._loading.wait()
        return None

    def accept(self, tokens: Sequence[int | Sequence[int]]) -> None:
        """The step was run: append to each request in the batch's `drawing` its token.

        For a request with `drafts` that may be a list: those that are what its rows say, and the token after them.

        Those that got a stop token or their last one are done, and their pages released. Requests that were cancelled
        or failed meanwhile get none; any number may stand for theirs.

        Raises LeaseError without a batch or before its step was run, InvalidArgument for a wrong number of tokens,
        InvalidTokens for what is no token id. Then nothing has changed.
        """
        batch = self._batch
        if batch is None:
            raise LeaseError("accept() without a batch: call next(), run its step, and accept its tokens once")
        if len(tokens) != len(batch.drawing):
            raise InvalidArgument(f"{len(tokens)} tokens for {len(batch.drawing)} requests: give one for each drawing")
        values = _values(batch, tokens)
        if any(lease.num_written < lease.num_tokens for lease in batch.leases if not lease.released):
            raise LeaseError("accept() before the step: run all rows of the batch's leases first")
        self._settle()
        leaders: dict[int, Request] = {}  # whose row it is; its followers come after it
        taking = [self._takes(r, leaders.setdefault(row, r)) for r, row in zip(batch.drawing, batch.rows, strict=True)]
        for request, value, takes in zip(batch.drawing, values, taking, strict=True):
            if takes:
                self._append(request, value)

    def abandon(self) -> None:
        """The step of the last batch failed: release its leases without commit; its requests wait again."""
        batch, self._batch = self._batch, None
        for request, lease in zip(batch.requests, batch.leases, strict=True) if batch else ():
            if request.lease is lease:
                self._leave(request, commit=False, again=True)

    def apart(self) -> Iterator[Batch]:
        """The step of the last batch failed: hand it out again, one request at a time, to `accept` or to `fail`.

        So a request that makes the model fail does not take the others with it. What was written stays.
        """
        batch, self._batch = self._batch, None
        for request, lease in zip(batch.requests, batch.leases, strict=True) if batch else ():
            if request.lease is lease:
                self._batch = batch_of([request])
                yield self._batch
                self._settle()

    def _settle(self) -> None:
        """Count what the last batch's step has computed, and publish chunks of prompts."""
        batch, self._batch = self._batch, None
        for request, lease, before in zip(batch.requests, batch.leases, batch.written, strict=True) if batch else ():
            if request.lease is not lease:
                continue  # cancelled since
            count = lease.num_written - before
            request.stats.computed_tokens += count
            if count > 1 and lease.num_written <= request.room.shared and not request.drafts:
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

    def _append(self, request: Request, tokens: list[int]) -> None:
        """Its next tokens: guesses that were right, and one more. The lease keeps what was computed for them."""
        before = len(request.tokens)
        for token in tokens:
            request.accept(token)
            if request.done:
                break
        request.stats.drafted_tokens += len(request.drafts)
        request.stats.accepted_tokens += min(len(request.tokens) - before, len(tokens) - 1)
        take_back(request, request.num_tokens - 1)
        if request.done:
            self._end(request, request.status)

    # ---- which requests ----

    def _choose(self) -> list[Request]:
        """The requests of the next step, each with a lease that has room for its rows."""
        self._loading.look_ahead(self.waiting)
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
            budget = self._admit(chosen, budget)
        add_drafts(chosen, budget)
        return chosen

    def _admit(self, chosen: list[Request], budget: int) -> int:
        """Let waiting requests join, in order, as long as the budget and the pages last; returns what is left of it."""
        for request in self._line() if budget and self.waiting else ():
            if budget == 0 or len(self.running) >= self._max_running:
                return budget
            cached = self._space.cached(request)
            if self._loading.waits(request, cached):
                continue
            found = max(cached, self._loading.tokens(request))
            if self._worth_waiting(request, found):
                continue
            if not self._space.has_headroom(request, cached):
                return budget
            lease = self._space.acquire(request, found + budget)
            if lease is None:
                return budget
            self._start(request, lease)
            self._loading.fill(request, lease)
            chosen.append(request)
            budget = max(budget - (lease.num_tokens - lease.num_written), 0)
        return budget

    def _line(self) -> list[Request]:
        """The waiting requests in the order of admission."""
        if self._policy == "prefix" and len(self.running) < self._max_running:
            return longest_prefix_first(self.waiting, self._space.cached)
        return list(self.waiting)

    def _worth_waiting(self, request: Request, cached: int) -> bool:
        """Whether a running request is about to publish at least a page more of this prompt than is cached now."""
        longest = min(len(request.prompt), self._space.findable(request) - 1)
        if longest < cached + self._cache.page_size:
            return False
        seen = seen_by(request.namespace, self._cache.hierarchical)
        for other in self.running:
            published = min(len(other.prompt), other.room.shared)
            pending = lease_of(other).num_written < published and other.namespace in seen
            if pending and common_prefix(request.prompt, other.prompt[:published]) >= cached + self._cache.page_size:
                return True
        return False

    # ---- pages ----

    def _make_room(self, request: Request, end: int) -> bool:
        """Extend the lease to `end` tokens, preempting later requests as needed; False if it was preempted itself."""
        lease = lease_of(request)
        while lease.num_tokens < end:
            try:
                more = request.sequence(lease.num_tokens, end)
                lease.extend(more, prompt=lease.num_tokens < len(request.prompt))
            except PoolExhausted:
                if self._space.drop():
                    continue
                last = self.running[-1]
                if len(self.running) == 1 and self._space.would_recompute(request):
                    raise  # it would come to this point again and again
                self._leave(last, commit=True, again=True)
                last.stats.preemptions += 1
                if last is request:
                    return False
        return True

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
            and self._space.has_headroom(follower, len(leader.prompt))
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
        take_back(request, request.num_tokens)
        self.running.remove(request)
        lease, request.lease = lease_of(request), None
        if again:
            self._wait_again(request)
        lease.release(commit=commit, cold=request.cold and not again)

    def _wait_again(self, request: Request) -> None:
        request.status = "waiting"
        insort(self.waiting, request, key=_place)

    def _end(self, request: Request, status: Status, *, commit: bool = True) -> None:
        """Take a request out of wherever it is; a sibling takes over the forks that it had to make."""
        for leader in request.siblings:
            if request in leader.followers:
                leader.followers.remove(request)
        if request.followers:
            heir, *rest = request.followers
            heir.followers, request.followers = rest, []
            insort(self.waiting, heir, key=_place)
        if request in self.waiting:
            self.waiting.remove(request)
            self._loading.forget(request)
        elif request in self.running:
            self._leave(request, commit=commit)
            self._pace.ended()
        request.end(status)

    def _check(self, request: Request) -> None:
        _check_type(request)
        if request.owner is not self:
            raise InvalidArgument(f"request {request.id} was not submitted to this Scheduler: call the one it is of")


def _check_type(request: Request) -> None:
    if not isinstance(request, Request):
        raise InvalidArgument(f"{shown(request)} is no Request: give one, such as Request(prompt)")


def _values(batch: Batch, tokens: Sequence[int | Sequence[int]]) -> list[list[int]]:
    """The tokens that each request in `batch.drawing` is given."""
    if batch.logit_rows is not None:
        return [accepted_tokens(request, given) for request, given in zip(batch.drawing, tokens, strict=True)]
    return [[token] for token in check_tokens(tokens).tolist()] if batch.drawing else []


def _place(request: Request) -> Any:
    return request.place
