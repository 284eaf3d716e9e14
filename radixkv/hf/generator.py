"""The generation loop: continuous batching of any number of requests over one engine.

Every step runs one forward pass over a ragged batch in which prefills (in chunks, if long) and decodes are mixed.
Which requests those are is the `Scheduler`'s business.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from radixkv.errors import InvalidArgument, LeaseError
from radixkv.hf.adapter import attach, forward, probe
from radixkv.hf.arguments import check_callback, check_engine, check_model, end_tokens, length_for
from radixkv.hf.config import placeholder_tokens, refuse_placeholders
from radixkv.hf.request import OnLogits, OnToken, Request, Tokens
from radixkv.hf.sampling import Draw, Sampler, Sampling, sample
from radixkv.scheduling import Batch, Scheduler, arrival
from radixkv.scheduling.arguments import check_namespace, check_token_set, check_tokens, integer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from radixkv.engine import Engine

__all__ = ["Generator"]

_LOG = logging.getLogger("radixkv")


class Generator:
    """Generates tokens for many requests with one model and one engine.

    `engine` defaults to `engine_for(model, capacity=0.5)`, half of the free memory. A step computes at most
    `max_step_tokens` tokens: longer prompts are computed over several steps, so that running requests keep their pace.
    At most `max_running` requests run at once. `max_length` bounds prompt plus generated tokens; by default it is what
    the model was built for. `order` is a key that sorts requests, the first to be served first: see `Scheduler`. The
    model is switched to the engine's attention and stays so.

    A generator belongs to the thread that made it, as a connection does in SQLite: that thread runs the loop, and gets
    requests from others through a `queue.Queue`. Requests may be read from any thread. `on_token` and `on_logits` may
    call `submit`, `cancel` and `close`, but not step; hooks of the model or the cache may call nothing while a step
    runs. Other calls raise LeaseError, and change nothing.

    Raises InvalidArgument for what is no model or engine, an engine made for other layers, heads, dtype or device, and
    for limits that cannot work; and what `probe` raises for the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        engine: Engine | None = None,
        *,
        max_step_tokens: int = 2048,
        max_running: int = 256,
        max_length: int | None = None,
        order: Callable[[Request], Any] = arrival,
    ) -> None:
        check_model(model)
        self.max_length = length_for(model, max_length)
        shape = probe(model)
        if engine is None:
            engine = shape.engine(model.device, capacity=0.5)
        check_engine(engine, shape, model.device)
        self._scheduler = Scheduler(
            engine,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            window_left=shape.window_left,
            order=order,
        )
        self.model = model
        self.engine = engine
        attach(model)
        self._vocabulary = int(cast("torch.Tensor", model.get_input_embeddings().weight).shape[0])
        self._placeholders = placeholder_tokens(model)
        self._undelivered: deque[tuple[Request, int, torch.Tensor | None]] = deque()
        self._thread = threading.current_thread()
        self._stage: Literal["idle", "computing", "delivering"] = "idle"
        self._closed = False

    def submit(
        self,
        prompt: Tokens,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_tokens: Iterable[int] | None = None,
        n: int = 1,
        namespace: str = "",
        on_token: OnToken | None = None,
        on_logits: OnLogits | None = None,
    ) -> Request:
        """Queue a request; it joins the batch in one of the next steps. May be called at any time.

        `stop_tokens` end the request when generated (they are its last token); None means the end-of-sequence tokens
        of the model's generation config, `()` none. `n` > 1 computes the prompt once and forks it: the result is the
        first of n requests, all in `.siblings`, and the i-th draws exactly as a request of its own with `seed + i`.

        `on_token(request, token)` is called at the end of the step that made the token, once for each. If it raises,
        its own request ends there, with status "error" and the exception in `request.error`; other requests go on.
        `on_logits(request, logits)` is called right before it, with the `[vocabulary]` that the token was drawn from,
        and the same holds; clone what is to be kept.

        Raises InvalidTokens for a bad prompt, InvalidArgument for bad options, PoolExhausted for a request that the
        whole pool could not hold, LeaseError after `close`. Then nothing was submitted.
        """
        self._check_call("submit")
        if self._closed:
            raise LeaseError("the generator is closed: make a new Generator")
        array = check_tokens(prompt, self._vocabulary)
        refuse_placeholders(array, self._placeholders)
        new_tokens = integer("max_new_tokens", max_new_tokens, 1)
        if self.max_length is not None and len(array) + new_tokens > self.max_length:
            raise InvalidArgument(
                f"{len(array)} prompt + {new_tokens} new tokens exceed max_length {self.max_length}: shorten the "
                "prompt or lower max_new_tokens"
            )
        count = integer("n", n, 1)
        sampling = Sampling(temperature, top_k, top_p, seed)
        samplers = [Sampler(replace(sampling, seed=sampling.seed + i)) for i in range(count)]
        if stop_tokens is None:
            stops = end_tokens(self.model)
        else:
            stops = check_token_set("stop_tokens", stop_tokens, self._vocabulary)
        requests = [
            Request(
                array,
                new_tokens,
                stops,
                check_namespace(namespace),
                sampler=sampler,
                on_token=check_callback("on_token", on_token),
                on_logits=check_callback("on_logits", on_logits),
            )
            for sampler in samplers
        ]
        self._scheduler.submit(*requests)
        return requests[0]

    def step(self) -> bool:
        """Run one forward pass over the batch, deliver its tokens, and say whether any request is unfinished.

        If the model raises, the leases of the step are released without commit, its requests wait again and no token
        is lost: the error passes through, and `step` may be called again. Raises PoolExhausted, with the requests
        as they were, when the oldest request finds too few pages because leases or pins outside this generator hold
        them.

        What `on_token` raises ends its request (see `submit`), is logged to "radixkv" and does not leave `step`. A
        KeyboardInterrupt or another BaseException does: tokens that were not delivered yet are by the next `step`.
        """
        self._step()
        return self._scheduler.unfinished

    def run(self) -> None:
        """Step until every request is done; then raise what `on_token` raised meanwhile (of several, the first)."""
        errors = self._step()
        while self._scheduler.unfinished:
            errors += self._step()
        if errors:
            raise errors[0]

    def stream(self, request: Request) -> Iterator[int]:
        """Yield the tokens of `request` as they come, stepping for all requests meanwhile.

        At its end raises `request.error`, if there is one.
        """
        self._check_call("stream")
        self._check_request(request)
        return self._stream(request)

    def cancel(self, request: Request) -> bool:
        """End `request` and release its pages; what it has computed stays cached. False if it was done already.

        Its `on_token` is not called any more.
        """
        self._check_call("cancel")
        self._check_request(request)
        return self._scheduler.cancel(request)

    def close(self) -> None:
        """Cancel every unfinished request and take no new ones. Closing again does nothing. The engine stays open."""
        self._check_call("close")
        self._closed = True
        for request in [*self._scheduler.waiting, *self._scheduler.running]:
            for sibling in request.siblings:
                self._scheduler.cancel(sibling)

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- who may call ----

    def _check_call(self, call: str) -> None:
        """Refuse calls from another thread, whose leases these are not, and calls from the middle of a step."""
        thread = threading.current_thread()
        if thread is not self._thread:
            raise LeaseError(
                f"{call}() was called in thread {thread.name!r}, but this Generator belongs to thread "
                f"{self._thread.name!r}, which made it: let one thread make it and run its loop, and pass requests to "
                "that thread through a queue.Queue"
            )
        if self._stage == "computing" or (self._stage == "delivering" and call == "step"):
            raise LeaseError(f"{call}() was called from inside step(), by a callback or a hook: return from it first")

    def _check_request(self, request: Request) -> None:
        if not isinstance(request, Request):
            raise InvalidArgument(f"request is {request!r}: give a Request that submit() returned")
        if request.owner is not self._scheduler:
            raise InvalidArgument(f"request {request.id} is of another Generator: call the one that it came from")

    # ---- one step ----

    def _step(self) -> list[Exception]:
        """`step`, with what callbacks raised."""
        self._check_call("step")
        try:
            errors = self._deliver()  # what an interrupted step has left
            self._stage = "computing"
            if batch := self._scheduler.next():
                self._advance(batch, self._compute(batch))
            errors += self._deliver()
        finally:
            self._stage = "idle"
        return errors

    def _stream(self, request: Request) -> Iterator[int]:
        sent = 0
        while True:
            while sent < len(request.tokens):
                yield request.tokens[sent]
                sent += 1
            if request.error is not None:
                raise request.error
            if request.done:
                return
            self.step()

    def _compute(self, batch: Batch) -> torch.Tensor:
        """One forward pass: K and V of every row written, and the logits of each lease's last row."""
        try:
            with torch.inference_mode(), self.engine.step(batch.leases) as step:
                return forward(self.model, step)
        except BaseException:
            self._scheduler.abandon()
            raise

    def _advance(self, batch: Batch, logits: torch.Tensor) -> None:
        """Draw the next tokens of the requests whose tokens are all computed."""
        drawing = cast("list[Request]", batch.drawing)
        pairs = zip(batch.rows, drawing, strict=True)
        tokens = sample(logits, [Draw(row, request.sampler, len(request.tokens)) for row, request in pairs])
        self._scheduler.accept(tokens)
        for request, token, row in zip(drawing, tokens, batch.rows, strict=True):
            self._undelivered.append((request, token, logits[row] if request.on_logits is not None else None))

    def _deliver(self) -> list[Exception]:
        """Call the callbacks, each token once, after all bookkeeping; what they raise ends their own request."""
        self._stage = "delivering"
        errors = []
        while self._undelivered:
            request, token, logits = self._undelivered.popleft()
            if request.status in ("cancelled", "error"):
                continue
            callback = "on_logits"
            try:
                if request.on_logits is not None and logits is not None:
                    request.on_logits(request, logits)
                callback = "on_token"
                if request.on_token is not None:
                    request.on_token(request, token)
            except Exception as error:
                _LOG.error("%s of request %d raised, which ends the request", callback, request.id, exc_info=error)
                errors.append(error)
                self._scheduler.fail(request, error)
        return errors
