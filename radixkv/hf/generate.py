"""The generation loop: continuous batching of any number of requests over one engine.

Every step runs one forward pass over a ragged batch in which prefills (in chunks, if long) and decodes are mixed.
One rule orders everything: the older request first. Running requests get their tokens and pages in order of arrival,
waiting requests are admitted in order of arrival, and when pages run out the newest running request is preempted. It
gives its pages back, waits, and goes on later with the tokens and the random state it had; what is still cached then
is not computed again.

    submit ─► waiting ──acquire──► running ──stop token or length──► done
                 ▲                    │
                 └────── preempt ─────┘   PoolExhausted while a running request grows
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from radixkv.errors import InvalidArgument, PoolExhausted
from radixkv.hf.adapter import attach, engine_for, forward, length_limit
from radixkv.hf.request import OnToken, Request, Tokens, token_array
from radixkv.hf.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from radixkv.cache import Lease
    from radixkv.engine import Engine

__all__ = ["Generator"]


def _arrival(request: Request) -> int:
    return request.id


def _lease(request: Request) -> Lease:
    assert request.lease is not None, "only running requests hold a lease"
    return request.lease


class Generator:
    """Generates tokens for many requests with one model and one engine.

    `engine` defaults to `engine_for(model, capacity=0.5)`, half of the free memory. A step computes at most
    `max_step_tokens` tokens: longer prompts are computed over several steps, so that running requests keep their pace.
    At most `max_running` requests run at once. `max_length` bounds prompt plus generated tokens; by default it is what
    the model was built for.

    Not thread-safe: one thread calls all methods. The model is switched to the engine's attention and stays so.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        engine: Engine | None = None,
        *,
        max_step_tokens: int = 2048,
        max_running: int = 256,
        max_length: int | None = None,
    ) -> None:
        if not 1 <= max_running <= max_step_tokens:
            raise InvalidArgument(
                f"max_running is {max_running}, max_step_tokens {max_step_tokens}: every running request needs a token "
                "a step, so give 1 <= max_running <= max_step_tokens"
            )
        if model.training:
            raise InvalidArgument(
                "the model is in training mode, where dropout may change its answers: call model.eval()"
            )
        self.model = model
        self.engine = engine if engine is not None else engine_for(model, capacity=0.5)
        attach(model)
        self.max_step_tokens = max_step_tokens
        self.max_running = max_running
        self.max_length = max_length if max_length is not None else length_limit(model)
        self._vocabulary = int(cast("torch.Tensor", model.get_input_embeddings().weight).shape[0])
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._undelivered: deque[tuple[Request, int]] = deque()
        self._submitted = 0

    def submit(
        self,
        prompt: Tokens,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
        n: int = 1,
        namespace: str = "",
        on_token: OnToken | None = None,
    ) -> Request:
        """Queue a request; it joins the batch in one of the next steps. May be called at any time.

        `stop_tokens` end the request when generated (they are its last token); None means the end-of-sequence tokens
        of the model's generation config, `()` none. `n` > 1 computes the prompt once and forks it: the result is the
        first of n requests, all in `.siblings`, and the i-th draws exactly as a request of its own with `seed + i`.
        `on_token(request, token)` is called at the end of the step that made the token. Raises InvalidTokens for a bad
        prompt, InvalidArgument for bad options, PoolExhausted for a request that the whole pool could not hold.
        """
        array = token_array(prompt, self._vocabulary)
        if n < 1:
            raise InvalidArgument(f"n is {n}: give at least 1")
        self._check_size(len(array), max_new_tokens)
        stops = frozenset(_end_tokens(self.model) if stop_tokens is None else (int(token) for token in stop_tokens))
        samplers = [Sampler(Sampling(temperature, top_k, top_p, seed + i)) for i in range(n)]
        requests = tuple(
            Request(self._submitted + i, array, max_new_tokens, stops, namespace, sampler, on_token)
            for i, sampler in enumerate(samplers)
        )
        self._submitted += n
        for request in requests:
            request.siblings = requests
        requests[0].followers = list(requests[1:])
        self._waiting.append(requests[0])
        return requests[0]

    def step(self) -> bool:
        """Run one forward pass over the batch, deliver its tokens, and say whether any request is unfinished.

        If the model raises, the leases of the step are released without commit, its requests wait again and no token
        is lost: the error passes through, and `step` may be called again. Raises PoolExhausted, with the requests
        still waiting, when nothing runs and the oldest request finds too few pages because leases or pins outside
        this generator hold them.
        """
        batch = self._schedule()
        if batch:
            logits = self._compute(batch)
            for request, row in zip(batch, logits, strict=True):
                self._advance(request, row)
        self._deliver()
        return bool(self._waiting or self._running)

    def run(self) -> None:
        """Step until every request is done."""
        while self.step():
            pass

    def stream(self, request: Request) -> Iterator[int]:
        """Yield the tokens of `request` as they come, stepping for all requests meanwhile."""
        sent = 0
        while True:
            while sent < len(request.tokens):
                yield request.tokens[sent]
                sent += 1
            if request.done:
                return
            self.step()

    def cancel(self, request: Request) -> bool:
        """End `request` and release its pages; what it has computed stays cached. False if it was done already."""
        if request.done:
            return False
        if request in self._waiting:
            self._waiting.remove(request)
        elif request in self._running:
            self._leave(request, commit=True)
        for leader in request.siblings:
            if request in leader.followers:
                leader.followers.remove(request)
        if request.followers:
            heir, *rest = request.followers
            heir.followers, request.followers = rest, []
            insort(self._waiting, heir, key=_arrival)
        request.status = "cancelled"
        return True

    def close(self) -> None:
        """Cancel every unfinished request. The engine stays open."""
        for request in [*self._waiting, *self._running]:
            for sibling in request.siblings:
                self.cancel(sibling)

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- scheduling ----

    def _check_size(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Refuse what could never run."""
        if max_new_tokens < 1:
            raise InvalidArgument(f"max_new_tokens is {max_new_tokens}: give at least 1")
        total = prompt_tokens + max_new_tokens
        if self.max_length is not None and total > self.max_length:
            raise InvalidArgument(
                f"{prompt_tokens} prompt + {max_new_tokens} new tokens exceed max_length {self.max_length}"
            )
        # The last token is handed out, its K and V are never needed.
        pages = -(-(total - 1) // self.engine.page_size)
        if pages > self.engine.num_pages:
            raise PoolExhausted(
                f"{prompt_tokens} prompt + {max_new_tokens} new tokens need {pages} pages; the pool has "
                f"{self.engine.num_pages}: shorten the request or raise num_pages"
            )

    def _schedule(self) -> list[Request]:
        """Choose the requests of the next step and give each a lease with room for its rows of this step."""
        batch: list[Request] = []
        budget = self.max_step_tokens
        before = len(self._running)
        for request in list(self._running):
            if budget == 0 or request.lease is None:
                break
            lease = request.lease
            if lease.num_written == request.num_tokens:  # the last step ended before this request's token was drawn
                self._leave(request, commit=True)
                self._wait_again(request)
                continue
            rows = max(lease.num_tokens - lease.num_written, min(request.num_tokens - lease.num_written, budget))
            if self._make_room(request, lease.num_written + rows):
                batch.append(request)
                budget = max(budget - rows, 0)
        if len(self._running) == before:
            self._admit(batch, budget)
        return batch

    def _make_room(self, request: Request, end: int) -> bool:
        """Extend the lease to `end` tokens, preempting newer requests as needed; False if it was preempted itself."""
        lease = _lease(request)
        while lease.num_tokens < end:
            try:
                lease.extend(request.sequence(lease.num_tokens, end))
            except PoolExhausted:
                newest = self._running[-1]
                self._preempt(newest)
                if newest is request:
                    return False
        return True

    def _preempt(self, request: Request) -> None:
        """Take the pages of a running request back; what it has written stays cached as long as nobody needs room."""
        self._leave(request, commit=True)
        self._wait_again(request)
        request.stats.preemptions += 1

    def _leave(self, request: Request, *, commit: bool) -> None:
        """Release the lease of a running request."""
        self._running.remove(request)
        lease, request.lease = _lease(request), None
        lease.release(commit=commit)

    def _wait_again(self, request: Request) -> None:
        request.status = "waiting"
        insort(self._waiting, request, key=_arrival)

    def _admit(self, batch: list[Request], budget: int) -> None:
        """Let waiting requests join `batch`, oldest first, as long as the budget and the pages last."""
        for request in list(self._waiting):
            if budget == 0 or len(self._running) >= self.max_running:
                return
            cached = self._cached(request)
            if self._worth_waiting(request, cached):
                continue
            end = min(request.num_tokens, cached + budget)
            try:
                lease = self.engine.acquire(request.sequence(0, end), request.namespace)
            except PoolExhausted:
                if self._running:
                    return
                raise  # nothing runs here: leases or pins outside this generator hold the pages
            self._start(request, lease)
            batch.append(request)
            budget = max(budget - (lease.num_tokens - lease.num_written), 0)

    def _cached(self, request: Request) -> int:
        """How many tokens of a waiting request a lease would find cached; one is always left to compute."""
        if request.num_tokens == 1:
            return 0
        return self.engine.cache.match(request.sequence(0, request.num_tokens - 1), request.namespace)

    def _worth_waiting(self, request: Request, cached: int) -> bool:
        """Whether a running request is about to publish at least a page more of this prompt than is cached now."""
        longest = min(len(request.prompt), request.num_tokens - 1)
        if longest < cached + self.engine.page_size:
            return False
        for other in self._running:
            pending = _lease(other).num_written < len(other.prompt) and other.namespace == request.namespace
            if pending and _common_prefix(request.prompt, other.prompt) >= cached + self.engine.page_size:
                return True
        return False

    def _start(self, request: Request, lease: Lease) -> None:
        """Move a request from waiting to running with `lease`."""
        self._waiting.remove(request)
        insort(self._running, request, key=_arrival)
        if request.stats.computed_tokens == 0 and not request.tokens:
            request.stats.cached_tokens = lease.num_cached
        request.lease, request.status = lease, "running"

    # ---- one step ----

    def _compute(self, batch: list[Request]) -> torch.Tensor:
        """One forward pass: K and V of every row written, and the logits of each request's last row."""
        leases = [_lease(request) for request in batch]
        rows = [lease.num_tokens - lease.num_written for lease in leases]
        try:
            with torch.inference_mode(), self.engine.step(leases) as step:
                logits = forward(self.model, step)
        except BaseException:
            for request in batch:
                self._leave(request, commit=False)
                self._wait_again(request)
            raise
        for request, count in zip(batch, rows, strict=True):
            request.stats.computed_tokens += count
            if count > 1:
                _lease(request).commit()
        return logits

    def _advance(self, request: Request, logits: torch.Tensor) -> None:
        """Draw the next token of a request whose tokens are all computed, and those of its followers."""
        if _lease(request).num_written < request.num_tokens:
            return
        followers, request.followers = request.followers, []
        for follower in followers:
            self._fork(request, follower)
        for drawing in (request, *followers):
            drawing.accept(drawing.sampler(logits))
            self._undelivered.append((drawing, drawing.tokens[-1]))
            if drawing.done:
                self._retire(drawing)

    def _fork(self, request: Request, follower: Request) -> None:
        """Let `follower` run on a fork of the lease, or wait for a lease of its own where the batch or pool is full."""
        follower.stats.cached_tokens = len(follower.prompt)
        if len(self._running) < self.max_running:
            try:
                follower.lease = _lease(request).fork()
            except PoolExhausted:
                self._wait_again(follower)
            else:
                follower.status = "running"
                insort(self._running, follower, key=_arrival)
        else:
            self._wait_again(follower)

    def _retire(self, request: Request) -> None:
        """Let go of the pages or the place in the queue of a request that is done."""
        if request.lease is not None:
            self._leave(request, commit=True)
        else:
            self._waiting.remove(request)

    def _deliver(self) -> None:
        """Call the callbacks, each token once, after all bookkeeping: a callback may submit, cancel or raise."""
        while self._undelivered:
            request, token = self._undelivered.popleft()
            if request.on_token is not None:
                request.on_token(request, token)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two int32 arrays."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if different.size else length


def _end_tokens(model: PreTrainedModel) -> list[int]:
    """The end-of-sequence tokens of the model's generation config."""
    config = getattr(model, "generation_config", None)
    tokens = getattr(config, "eos_token_id", None)
    if tokens is None:
        return []
    return [int(tokens)] if isinstance(tokens, int) else [int(token) for token in tokens]
