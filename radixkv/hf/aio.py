"""A generator for asyncio: it owns the thread that steps, and any number of tasks submit to it and read from it.

The thread and the tasks share no queue of tokens. A stream reads `request.tokens` from where it stopped, and is woken
once a step: a slow reader holds nobody up and costs nothing, and all streams of a loop together cost it one wake-up.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, cast

from radixkv.errors import InvalidArgument, LeaseError, PoolExhausted
from radixkv.hf.generator import EngineBusy, Generator
from radixkv.hf.request import Request, Tokens
from radixkv.scheduling.arguments import number

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from radixkv.engine import Engine

__all__ = ["AsyncGenerator", "Stream"]

_LOG = logging.getLogger("radixkv")

_BUSY = 0.001
"""Seconds until a step is tried again where another host of the engine is in one."""

T = TypeVar("T")


class AsyncGenerator:
    """A `Generator` in a thread of its own, for asyncio. Options are those of `Generator` and of its `submit`.

        async with AsyncGenerator(model, engine, tokenizer=tokenizer, max_waiting=100) as generator:
            async for token in generator.stream(prompt, max_new_tokens=100): ...
            async for piece in generator.text(prompt): ...
            request = await generator.generate(prompt, n=3)

    Calls may come from any thread and any event loop. A task that is cancelled while it waits, and a stream that is
    closed or dropped before its end, cancel their request: its pages are free after the step that is under way. Where
    `max_waiting` requests wait, new ones raise QueueFull.

    Raises what `Generator` raises. The engine is stepped by this generator alone: where leases or pins outside it hold
    so many pages that its first request cannot go on, that request ends with PoolExhausted.
    """

    def __init__(self, model: PreTrainedModel, engine: Engine | None = None, **options: Any) -> None:
        self._thread = _Thread(partial(Generator, model, engine, **options))
        self._generator = self._thread.made.result()
        self._finalizer = weakref.finalize(self, self._thread.end)  # also when the interpreter ends

    @property
    def engine(self) -> Engine:
        return self._generator.engine

    @property
    def waiting(self) -> int:
        """How many requests wait for a place."""
        return len(self._generator.waiting)

    @property
    def running(self) -> int:
        """How many requests are in the batch."""
        return len(self._generator.running)

    def estimated_wait(self) -> float | None:
        """Seconds that a request submitted now would wait for its place: see `Scheduler.estimated_wait`."""
        return self._generator.estimated_wait()

    def stream(self, prompt: Tokens, **options: Any) -> Stream[int]:
        """The tokens of a request as they come. It is submitted when first awaited: see `Stream`."""
        return Stream(self, lambda request: request.tokens, prompt, options)

    def text(self, prompt: Tokens, **options: Any) -> Stream[str]:
        """The text of a request as it comes, in pieces. Needs `tokenizer`."""
        if self._generator.tokenizer is None:
            raise InvalidArgument("text needs a tokenizer: make the AsyncGenerator with tokenizer=AutoTokenizer...")
        return Stream(self, lambda request: request.said.pieces if request.said else [], prompt, options)

    async def generate(self, prompt: Tokens, **options: Any) -> Request:
        """Wait for a request and all its siblings; raise what ended it, if it went wrong."""
        return await Stream[int](self, lambda request: request.tokens, prompt, options).end()

    async def close(self, grace: float = 0.0) -> None:
        """Take no more requests, give those under way `grace` seconds to end, cancel the rest, and end the thread.

        Also by leaving `async with`, without grace. Closing again does nothing.
        """
        seconds = number("grace", grace)
        if not seconds >= 0:
            raise InvalidArgument(f"grace is {grace}: give seconds, 0 or above; math.inf waits until all have ended")
        self._thread.check_caller()
        self._thread.stop(seconds)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncGenerator:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "an AsyncGenerator cannot be pickled or copied: it owns a thread and one pool. Make one in each process, "
            "and submit there"
        )

    def __repr__(self) -> str:
        return f"Async{self._generator!r}"


class Stream(AsyncIterator[T], Generic[T]):
    """What one request generates, for one task. Iterate over it once, in the event loop that began it.

    `await accepted()` first where a refusal (bad input, a full queue) must be known before anything else is done. At
    its end it raises what ended its request; `request.status` says why it ended otherwise. With `n` > 1 it is what the
    first of the siblings generates; who cancels, closes or drops it cancels those that have not ended.
    """

    def __init__(
        self, generator: AsyncGenerator, items: Callable[[Request], list[T]], prompt: Tokens, options: dict[str, Any]
    ) -> None:
        for name in {"on_token", "on_done"} & options.keys():
            raise InvalidArgument(f"{name} has no use here: iterate over the stream, or await generate()")
        self.request: Request | None = None
        self._generator, self._thread = generator, generator._thread  # which a generator that is dropped would end
        self._items, self._prompt, self._options = items, prompt, options
        self._reader: _Reader | None = None
        self._sent = 0

    async def accepted(self) -> Request:
        """Submit the request, if that is not done; raises what `Generator.submit` raises."""
        if self._reader is None:
            reader = _Reader(asyncio.get_running_loop())
            options = {**self._options, "on_token": reader.on_token, "on_done": reader.on_done}
            self._thread.call(partial(reader.submit, self._thread, self._prompt, options))
            self._reader = reader
        reader = self._reader
        await self._wait(lambda: reader.answered)
        if reader.refusal is not None:
            raise reader.refusal
        self.request = reader.request
        assert self.request is not None
        return self.request

    async def end(self) -> Request:
        """Wait for the request and all its siblings; raise what ended it, if it went wrong."""
        request = await self.accepted()
        siblings = cast("tuple[Request, ...]", request.siblings)
        await self._wait(lambda: all(sibling.ended for sibling in siblings))
        if request.error is not None:
            raise request.error
        return request

    def __aiter__(self) -> Stream[T]:
        return self

    async def __anext__(self) -> T:
        request = await self.accepted()
        items = self._items(request)
        await self._wait(lambda: request.ended or len(items) > self._sent)
        if len(items) > self._sent:
            self._sent += 1
            return items[self._sent - 1]
        if request.error is not None:
            raise request.error
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request, unless it is done. So `async with contextlib.aclosing(stream)` ends it in any case."""
        self._cancel()

    async def _wait(self, come: Callable[[], bool]) -> None:
        """Wait until `come()`; if this task is cancelled meanwhile, the request is, too."""
        assert self._reader is not None
        if self._reader.loop is not asyncio.get_running_loop():
            raise LeaseError("this stream was begun in another event loop: read it there, and pass on what it said")
        while True:
            self._reader.event.clear()
            if come():
                return
            try:
                await self._reader.event.wait()
            except BaseException:
                self._cancel()
                raise

    def _cancel(self) -> None:
        ended = self.request is not None and all(cast("Request", one).ended for one in self.request.siblings)
        if self._reader is not None and not ended:
            self._thread.cancel(self._reader)

    def __del__(self) -> None:
        if getattr(self, "_reader", None) is not None:
            self._cancel()


class _Reader:
    """What the step thread knows of a stream: its request, and whom to wake."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.event = loop, asyncio.Event()
        self.request: Request | None = None
        self.refusal: Exception | None = None
        self.answered = False
        self._changed: set[_Reader] = set()

    def submit(self, thread: _Thread, prompt: Tokens, options: dict[str, Any]) -> None:
        """In the step thread: the answer to `Stream.accepted`."""
        self._changed = thread.changed
        try:
            self.request = thread.generator.submit(prompt, **options)
        except Exception as error:
            self.refusal = error
        self.answered = True
        self._changed.add(self)

    def on_token(self, request: Request, token: int) -> None:
        self._changed.add(self)

    def on_done(self, request: Request) -> None:
        self._changed.add(self)


class _Thread(threading.Thread):
    """Makes a generator and steps it; in between it does what others ask for."""

    def __init__(self, make: Callable[[], Generator]) -> None:
        super().__init__(name="radixkv-steps", daemon=True)
        self.made: Future[Generator] = Future()
        self.generator: Generator
        self.changed: set[_Reader] = set()
        self._make = make
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # which a finalizer may put into
        self._lock = threading.RLock()
        self._closed = False
        self._until = math.inf
        self.start()

    # ---- from any thread ----

    def call(self, function: Callable[[], None]) -> None:
        """Let `function` be called between two steps."""
        self.check_caller()
        with self._lock:
            if self._closed:
                raise LeaseError("the generator is closed: make a new AsyncGenerator")
            if not self.is_alive():
                raise LeaseError(
                    "this process was forked and has no step thread: make an AsyncGenerator in each process"
                )
            self._calls.put(function)

    def check_caller(self) -> None:
        """Refuse what would wait for itself."""
        if threading.current_thread() is self:
            raise LeaseError(
                "called in the step thread, by a callback or a processor: return from it first, and call from a task"
            )

    def cancel(self, reader: _Reader) -> None:
        self._calls.put(partial(self._cancel, reader))

    def stop(self, grace: float = 0.0) -> None:
        """Take no new calls, cancel what is unfinished after `grace` seconds, and end."""
        with self._lock:
            self._closed = True
            self._until = min(self._until, time.monotonic() + grace)
        self._calls.put(lambda: None)  # wakes the thread

    def end(self) -> None:
        self.stop()
        if threading.current_thread() is not self:
            self.join()

    # ---- in this thread ----

    def run(self) -> None:
        try:
            self.generator = self._make()
        except BaseException as error:
            self._closed = True
            self.made.set_exception(error)
            return
        self.made.set_result(self.generator)
        try:
            self._loop()
        except BaseException as error:
            _LOG.critical("the step thread ends", exc_info=error)
            self._fail_all(error)
        self.stop()
        self.generator.close()
        while not self._calls.empty():
            self._calls.get()()
        self._wake()

    def _loop(self) -> None:
        while True:
            busy = self.generator.unfinished or not self._calls.empty()  # what was asked for before the end is done
            if self._closed and (not busy or time.monotonic() >= self._until):
                return
            try:
                self._calls.get(block=not busy)()
                while True:
                    self._calls.get_nowait()()
            except queue.Empty:
                pass
            self._step()
            self._wake()

    def _step(self) -> None:
        try:
            self.generator.step()
        except EngineBusy:
            time.sleep(_BUSY)
        except PoolExhausted as error:  # nothing here can free pages, so waiting might last forever
            first = [*self.generator.running, *self.generator.waiting][0]
            self.generator.fail(first, error)

    def _cancel(self, reader: _Reader) -> None:
        for sibling in reader.request.siblings if reader.request is not None else ():
            self.generator.cancel(cast("Request", sibling))

    def _fail_all(self, error: BaseException) -> None:
        cause = error if isinstance(error, Exception) else LeaseError(f"the step thread was ended by {error!r}")
        for request in [*self.generator.running, *self.generator.waiting]:
            for sibling in request.siblings:
                if not sibling.done:
                    self.generator.fail(cast("Request", sibling), cause)

    def _wake(self) -> None:
        """Wake the readers that something has come for: each loop once."""
        loops: dict[asyncio.AbstractEventLoop, list[_Reader]] = {}
        while self.changed:
            reader = self.changed.pop()
            loops.setdefault(reader.loop, []).append(reader)
        for loop, readers in loops.items():
            try:
                loop.call_soon_threadsafe(_set, readers)
            except RuntimeError:  # the loop is closed: nobody reads any more
                for reader in readers:
                    self._cancel(reader)


def _set(readers: list[_Reader]) -> None:
    for reader in readers:
        reader.event.set()
