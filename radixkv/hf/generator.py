"""The generation loop: continuous batching of any number of requests over one engine.

Every step runs one forward pass over a ragged batch in which prefills (in chunks, if long) and decodes are mixed.
Which requests those are is the `Scheduler`'s business.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast
from weakref import WeakValueDictionary

import numpy as np
import torch

from radixkv import scheduling
from radixkv.errors import InvalidArgument, InvalidLogits, LeaseError
from radixkv.hf.adapter import attach, forward, probe
from radixkv.hf.arguments import check_callback, check_content, check_engine, check_model, length_for
from radixkv.hf.config import placeholder_tokens, refuse_placeholders
from radixkv.hf.defaults import generation_defaults
from radixkv.hf.draft import Draft, Drafter, check_draft
from radixkv.hf.pictures import Content, Features, Placed, adding, inputs_of, place_pictures
from radixkv.hf.processors import Processor, check_processors
from radixkv.hf.request import Event, OnDone, OnLogits, OnToken, Request, Row, Tokens
from radixkv.hf.sampling import Draw, Sampler, Sampling, log_probability, sample
from radixkv.hf.text import Text, check_stop_strings, check_tokenizer
from radixkv.scheduling import Batch, Policy, Scheduler
from radixkv.scheduling.arguments import check_namespace, check_token_set, check_tokens, integer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from radixkv.engine import Engine

__all__ = ["Generator"]

_LOG = logging.getLogger("radixkv")

MAX_SAMPLES = 4096
"""Samples that one submission may ask for: so many are made at once, before any waits in the queue."""

T = TypeVar("T")


class EngineBusy(LeaseError):
    """Another step of the engine is open: nobody's request is at fault."""


class Generator:
    """Generates tokens for many requests with one model and one engine.

    `engine` defaults to `engine_for(model, capacity=0.5)`, half of the free memory. A step computes at most
    `max_step_tokens` tokens: longer prompts are computed over several steps, so that running requests keep their pace.
    At most `max_running` requests run at once. `max_length` bounds prompt plus generated tokens; by default it is what
    the model was built for. `policy` says who is served first, and `max_waiting` how many requests may wait: see
    `Scheduler`. With a `tokenizer`, requests have their `text`, and may have stop strings. The model is switched to the
    engine's attention and stays so.

    `draft="prompt-lookup"` guesses up to `draft_tokens` tokens a step and request from its own earlier text, and the
    step checks them: fewer steps where text repeats, and the same tokens. Guesses that are wrong cost rows, so fewer
    are made while they are. `draft` may be a function that is called with
    each request and returns its `Guesser`. See `radixkv.hf.draft`.

    A generator belongs to the thread that made it, as a connection does in SQLite: that thread runs the loop, and gets
    requests from others through a `queue.Queue` (`AsyncGenerator` does that). Requests may be read from any thread.
    Callbacks may call `submit`, `cancel` and `close`, but not step; hooks of the model or the cache and processors may
    call nothing while a step runs. Other calls raise LeaseError, and change nothing.

    What goes wrong with a request ends that request, with status "error" and the exception in `request.error`, and no
    other: what its callbacks or processors raise, logits that are NaN, and a model that raises. Then the step is
    repeated for each of its requests alone, once, and those that make it raise again end. All is logged to "radixkv".

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
        policy: Policy = "arrival",
        max_waiting: int | None = None,
        tokenizer: Any = None,
        draft: Draft | None = None,
        draft_tokens: int = 8,
    ) -> None:
        check_model(model)
        generation_defaults(model)  # what it cannot do is refused here, and not by the first request
        self.max_length = length_for(model, max_length)
        self.tokenizer = check_tokenizer(tokenizer)
        self._draft, self._draft_tokens = check_draft(draft), integer("draft_tokens", draft_tokens, 1)
        shape = probe(model)
        if engine is None:
            engine = shape.engine(model.device, capacity=0.5)
        check_engine(engine, shape, model.device)
        self._scheduler = Scheduler(
            engine,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            window_left=shape.window_left,
            policy=policy,
            max_waiting=max_waiting,
        )
        self.model = model
        self.engine = engine
        attach(model)
        self._vocabulary = int(cast("torch.Tensor", model.get_input_embeddings().weight).shape[0])
        self._placeholders = placeholder_tokens(model)
        self._features: WeakValueDictionary[bytes, Features] = WeakValueDictionary()
        self._outbox: deque[Event] = deque()
        self._failures: list[Exception] = []
        self._thread = threading.current_thread()
        self._stage: Literal["idle", "computing", "delivering"] = "idle"
        self._closed = False

    @property
    def waiting(self) -> Sequence[Request]:
        """The requests that wait for a place, the next first. Not to be changed."""
        return cast("list[Request]", self._scheduler.waiting)

    @property
    def running(self) -> Sequence[Request]:
        """The requests in the batch. Not to be changed."""
        return cast("list[Request]", self._scheduler.running)

    @property
    def unfinished(self) -> bool:
        """Whether any request is waiting or running, or anything is still to be told."""
        return self._scheduler.unfinished or bool(self._outbox)

    def estimated_wait(self) -> float | None:
        """Seconds that a request submitted now would wait for its place: see `Scheduler.estimated_wait`."""
        return self._scheduler.estimated_wait()

    def submit(
        self,
        prompt: Tokens,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        stop_tokens: Iterable[int] | None = None,
        stop_strings: Iterable[str] | None = None,
        processors: Iterable[Processor] = (),
        logprobs: int | None = None,
        n: int = 1,
        content: Content = (),
        namespace: str = "",
        priority: int = 0,
        deadline: float | None = None,
        cold: bool = False,
        on_token: OnToken | None = None,
        on_logits: OnLogits | None = None,
        on_done: OnDone | None = None,
    ) -> Request:
        """Queue a request; it joins the batch in one of the next steps. May be called at any time.

        What is None is what the model's generation config says, or greedy, 64 tokens, nothing. See `Sampling` for the
        temperature and what follows it. `stop_tokens` end the request when generated (they are its last token); by
        default the end-of-sequence tokens, `()` none. `stop_strings` end it when they appear in its text. `processors`
        change its scores before a token is drawn: transformers' LogitsProcessors, or any `Processor`. `logprobs=k`
        keeps how likely each token and the k likeliest were in `request.logprobs`.

        `n` > 1, at most `MAX_SAMPLES`, computes the prompt once and forks it: the result is the first of n requests,
        all in `.siblings`. The i-th draws exactly as a request of its own with `seed + i`. Processors are called for
        all of them in turn.

        `content` is what the model's processor made of the prompt and its pictures: `inputs = processor(images=...,
        text=..., return_tensors="pt")`, then `submit(inputs["input_ids"][0], content=inputs)`. Or a list with a mapping
        for each run of placeholders, of what the vision part takes for it, as `{"pixel_values": tensor}`. It runs once
        for each, and not at all where the tokens are cached. `radixkv.hf.pictures.FAMILIES` take it.

        `priority` goes by the generator's `policy`. `deadline` seconds after this call the request ends with what it
        has, with status "deadline". `cold` says that its session ends with it: the pages that it alone used are then
        the first to be evicted.

        `on_token(request, token)` is called at the end of the step that made the token, once for each; right before it
        `on_logits(request, logits)` with the `[vocabulary]` of the model for it: clone what is to be kept. Nothing
        is delivered after `cancel`. `on_done(request)` is called once, last, however the request ended. What they raise
        ends their request.

        Raises InvalidTokens for a bad prompt, InvalidArgument for bad options, PoolExhausted for a request that the
        whole pool could not hold, QueueFull where `max_waiting` wait, LeaseError after `close`. Then nothing was
        submitted.
        """
        self._check_call("submit")
        if self._closed:
            raise LeaseError("the generator is closed: make a new Generator")
        defaults = generation_defaults(self.model)
        array, placed = self._place(prompt, content)
        new_tokens = self._new_tokens(len(array), _given(max_new_tokens, defaults.max_new_tokens))
        sampling = Sampling(
            temperature=_given(temperature, defaults.temperature),
            top_k=_given(top_k, defaults.top_k),
            top_p=_given(top_p, defaults.top_p),
            seed=seed,
            min_p=_given(min_p, defaults.min_p),
            repetition_penalty=_given(repetition_penalty, defaults.repetition_penalty),
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
        )
        scorers = check_processors(processors)
        strings = check_stop_strings(_given(stop_strings, defaults.stop_strings), self.tokenizer)
        options: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "stop_tokens": self._stops(stop_tokens, defaults.stop_tokens),
            "namespace": check_namespace(namespace),
            "priority": priority,
            "deadline": _given(deadline, defaults.deadline),
            "cold": cold,
            "num_logprobs": None if logprobs is None else integer("logprobs", logprobs, 0, self._vocabulary),
            "spans": placed.spans,
            "positions": placed.positions,
            "outbox": self._outbox,
            "on_token": check_callback("on_token", on_token),
            "on_logits": check_callback("on_logits", on_logits),
            "on_done": check_callback("on_done", on_done),
        }
        requests = [
            Request(
                placed.tokens,
                sampler=Sampler(replace(sampling, seed=sampling.seed + i), array, new_tokens, scorers),
                said=Text(self.tokenizer, array, strings) if self.tokenizer is not None else None,
                **options,
            )
            for i in range(integer("n", n, 1, MAX_SAMPLES))
        ]
        if self._draft is not None:
            for request in requests:
                request.drafter = Drafter(request, self._draft(request), self._draft_tokens, self._vocabulary)
        self._scheduler.submit(*requests)
        return requests[0]

    def _place(self, prompt: Any, content: Any) -> tuple[np.ndarray, Placed]:
        """The tokens of a prompt, and the same with its pictures in their places."""
        if isinstance(prompt, scheduling.Request):
            raise InvalidArgument("prompt is a Request, which a Scheduler takes: give its tokens, and the rest by name")
        array = check_tokens(prompt, self._vocabulary)
        pictures = check_content(content)
        placed = place_pictures(self.model, array, pictures, self._features) if pictures else Placed(array)
        refuse_placeholders(placed.tokens, self._placeholders)
        return array, placed

    def _stops(self, given: Any, default: Any) -> frozenset[int]:
        if given is None:
            return check_token_set("generation_config.eos_token_id", default, self._vocabulary)
        return check_token_set("stop_tokens", given, self._vocabulary)

    def _new_tokens(self, prompt_tokens: int, max_new_tokens: Any) -> int:
        new_tokens = integer("max_new_tokens", max_new_tokens, 1)
        if self.max_length is not None and prompt_tokens + new_tokens > self.max_length:
            raise InvalidArgument(
                f"{prompt_tokens} prompt + {new_tokens} new tokens exceed max_length {self.max_length}: shorten the "
                "prompt or lower max_new_tokens"
            )
        return new_tokens

    def step(self) -> bool:
        """Run one forward pass over the batch, deliver its tokens, and say whether any request is unfinished.

        What goes wrong with a request ends that request (see the class) and does not leave `step`. Raises, with the
        requests as they were, PoolExhausted when the oldest request finds too few pages because leases or pins outside
        this generator hold them, and LeaseError when another step of the engine is open. A KeyboardInterrupt or another
        BaseException leaves `step`, too; no token is lost, and those not delivered yet are by the next `step`.
        """
        self._step()
        return self.unfinished

    def run(self) -> None:
        """Step until every request is done; then raise what ended requests meanwhile (of several, the first)."""
        errors = self._step()
        while self.unfinished:
            errors += self._step()
        if errors:
            raise errors[0]

    def stream(self, request: Request) -> Iterator[int]:
        """Yield the tokens of `request` as they come, stepping for all requests meanwhile.

        At its end raises `request.error`, if there is one.
        """
        self._check_call("stream")
        self._check_request(request)
        return self._follow(request, request.tokens)

    def text(self, request: Request) -> Iterator[str]:
        """Yield the text of `request` as it comes, in pieces, as `stream` does its tokens."""
        self._check_call("text")
        self._check_request(request)
        if request.said is None:
            raise InvalidArgument("text needs a tokenizer: make the Generator with tokenizer=AutoTokenizer...")
        return self._follow(request, request.said.pieces)

    def cancel(self, request: Request) -> bool:
        """End `request` and release its pages; what it has computed stays cached. False if it was done already.

        Its `on_token` is not called any more; its `on_done` is, before this returns unless a callback calls it.
        """
        self._check_call("cancel")
        self._check_request(request)
        cancelled = self._scheduler.cancel(request)
        self._deliver()
        return cancelled

    def fail(self, request: Request, error: Exception) -> None:
        """End `request` with `error`: what it was for has become impossible. As `cancel` otherwise."""
        self._check_call("fail")
        self._check_request(request)
        if not isinstance(error, Exception):
            raise InvalidArgument(f"error is {error!r:.80}: give an exception, such as RuntimeError('...')")
        self._fail(request, error, "the host")
        self._deliver()

    def close(self) -> None:
        """Cancel every unfinished request and take no new ones. Closing again does nothing. The engine stays open."""
        self._check_call("close")
        self._closed = True
        for request in [*self._scheduler.waiting, *self._scheduler.running]:
            for sibling in request.siblings:
                self._scheduler.cancel(sibling)
        self._deliver()

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
            kind = f"{type(request).__module__}.{type(request).__qualname__}"
            raise InvalidArgument(f"request is {request!r}, a {kind}: give a Request that submit() returned")
        if request.owner is not self._scheduler:
            raise InvalidArgument(f"request {request.id} is of another Generator: call the one that it came from")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a Generator cannot be pickled or copied: it belongs to one thread and one pool. Make one in each "
            "process, and submit() there"
        )

    def __repr__(self) -> str:
        name, running, waiting = type(self.model).__name__, len(self.running), len(self.waiting)
        return f"Generator({name}, {running} running, {waiting} waiting{', closed' if self._closed else ''})"

    # ---- one step ----

    def _step(self) -> list[Exception]:
        """`step`; returns what ended requests."""
        self._check_call("step")
        self._failures = []
        self._deliver()  # what an interrupted step has left
        self._stage = "computing"
        try:
            if batch := self._scheduler.next():
                self._run(batch)
        finally:
            self._stage = "idle"
        self._deliver()
        return self._failures

    def _follow(self, request: Request, items: list[T]) -> Iterator[T]:
        sent = 0
        while True:
            while sent < len(items):
                yield items[sent]
                sent += 1
            if request.error is not None:
                raise request.error
            if request.done:
                return
            self.step()

    def _run(self, batch: Batch) -> None:
        """The forward pass and the tokens of a batch; if the model raises, of each of its requests alone."""
        try:
            logits = self._compute(batch)
        except EngineBusy:
            raise
        except Exception as error:
            _LOG.warning("a step of %d requests raised, each is tried alone", len(batch.requests), exc_info=error)
            for alone in self._scheduler.apart():
                try:
                    logits = self._compute(alone)
                except EngineBusy:
                    raise
                except Exception as own:
                    self._fail(cast("Request", alone.requests[0]), own, "the model", commit=False)
                else:
                    self._advance(alone, logits)
        else:
            self._advance(batch, logits)

    def _compute(self, batch: Batch) -> torch.Tensor:
        """One forward pass: K and V of every row written, and the logits of each lease's last row."""
        entered = False
        try:
            with torch.inference_mode(), self.engine.step(batch.leases) as step:
                entered = True
                requests = cast("list[Request]", batch.requests)
                embeds, positions, added = inputs_of(self.model, step, requests)
                with adding(self.model, step, added):
                    return forward(self.model, step, self._rows(batch), embeds=embeds, positions=positions)
        except LeaseError as error:
            if entered:
                raise
            raise EngineBusy(
                f"{error}: another thread or loop is in a step of this engine. Give each Generator its own engine, or "
                "step both from one thread; nothing was lost, so step again later"
            ) from error
        except Exception:
            raise
        except BaseException:
            self._scheduler.abandon()
            raise

    def _rows(self, batch: Batch) -> torch.Tensor | None:
        """Which rows the logits are wanted of, where it is not the last one of each lease."""
        return torch.tensor(batch.logit_rows, device=self.engine.device) if batch.logit_rows is not None else None

    def _advance(self, batch: Batch, logits: torch.Tensor) -> None:
        """Draw the next tokens of the requests whose tokens are all computed."""
        drawing = cast("list[Request]", batch.drawing)
        pairs = zip(batch.rows, drawing, strict=True)
        draws = [Draw(row, request.sampler, len(request.tokens), request.drafts) for row, request in pairs]
        chosen: list[list[int]] = []
        for request, tokens, row in zip(drawing, sample(logits, draws), batch.rows, strict=True):
            if isinstance(tokens, Exception):
                self._fail(request, tokens, "a processor or the logits", commit=not isinstance(tokens, InvalidLogits))
                tokens = [0]  # it gets none
            elif request.on_logits is not None or request.num_logprobs is not None:
                request.rows = [_kept(request, logits[row + i], token) for i, token in enumerate(tokens)]
            chosen.append(tokens)
        self._scheduler.accept(chosen if batch.logit_rows is not None else [token for (token,) in chosen])

    def _deliver(self) -> None:
        """Call the callbacks, each token once, after all bookkeeping; what they raise ends their own request."""
        if self._stage == "delivering":
            return  # a callback called back: the loop below goes on after it
        self._stage = "delivering"
        try:
            while self._outbox:
                self._tell(self._outbox.popleft())
        finally:
            self._stage = "idle"

    def _tell(self, event: Event) -> None:
        request = event.request
        callback = "on_done"
        try:
            if event.token is None:
                if request.on_done is not None:
                    request.on_done(request)
            elif request.status not in ("cancelled", "error"):
                callback = "on_logits"
                if request.on_logits is not None and event.logits is not None:
                    request.on_logits(request, event.logits)
                callback = "on_token"
                if request.on_token is not None:
                    request.on_token(request, event.token)
        except Exception as error:
            self._fail(request, error, callback)

    def _fail(self, request: Request, error: Exception, what: str, *, commit: bool = True) -> None:
        _LOG.error("%s of request %d raised, which ends the request", what, request.id, exc_info=error)
        self._failures.append(error)
        self._scheduler.fail(request, error, commit=commit)


def _kept(request: Request, logits: torch.Tensor, token: int) -> Row:
    """What `request` wants to know of the row that its token was drawn from."""
    count = request.num_logprobs
    return Row(logits, None if count is None else log_probability(logits, token, count))


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
