"""Replay: serve the requests of a trace one at a time from a cache of a given size, and count what it saves.

A request acquires its input, is extended by the output tokens the trace has, and is released; its whole path stays
resident while it is served. A request longer than the cache keeps its first pages. The last input token is never a hit.

With `hints` the last request of each session says that it is the last (``lease.release(cold=True)``), as a host would
that knows when a session ends.

Two ways to count:

* **token-exact** (the default): what the cache does. Hits are ``lease.num_cached``.
* **page-aligned**: what a cache of whole pages would do, comparable with published figures and with
  :func:`radixkv.traces.curve.capacity_curve`. Only full pages of input + output are inserted, and hits are full pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from radixkv.errors import InvalidArgument
from radixkv.traces.request import TraceRequest

if TYPE_CHECKING:
    from radixkv.cache import PrefixCache

__all__ = ["Progress", "ReplayResult", "replay", "session_ends"]

Progress = Callable[[int], None]
"""Called with the number of requests done, after each."""


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay counted. Lengths are in tokens, sizes in pages of ``page_size`` tokens, times in seconds."""

    requests: int
    input_tokens: int
    output_tokens: int
    hit_tokens: int
    evicted_pages: int
    capacity_pages: int
    page_size: int
    page_aligned: bool
    truncated_requests: int
    seconds: float
    cache_seconds: float
    hints: bool = False

    @property
    def hit_rate(self) -> float:
        """Hit input tokens as a share of all input tokens, 0 to 1."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The counters, sizes and times as one JSON object; ``mode`` is ``token-exact`` or ``page-aligned``."""
        return {
            "mode": "page-aligned" if self.page_aligned else "token-exact",
            "requests": self.requests,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "hit_tokens": self.hit_tokens,
            "hit_rate": self.hit_rate,
            "evicted_pages": self.evicted_pages,
            "capacity_pages": self.capacity_pages,
            "capacity_tokens": self.capacity_pages * self.page_size,
            "page_size": self.page_size,
            "truncated_requests": self.truncated_requests,
            "hints": self.hints,
            "seconds": round(self.seconds, 6),
            "cache_seconds": round(self.cache_seconds, 6),
        }


def replay(
    requests: Iterable[TraceRequest],
    capacity_tokens: int,
    page_size: int,
    page_aligned: bool = False,
    progress: Progress | None = None,
    make_cache: Callable[..., PrefixCache] | None = None,
    hints: bool = False,
) -> ReplayResult:
    """Serve ``requests`` one at a time from a cache of ``capacity_tokens // page_size`` pages.

    ``hints`` tells the cache where sessions end, which keeps the whole trace in memory.
    ``make_cache(num_pages=, page_size=)`` replaces PrefixCache, for another cache with the same face.
    ``cache_seconds`` is the time inside the cache's calls; ``seconds`` includes reading the trace. Raises
    InvalidArgument for a capacity below one page and for hints of a trace that does not tell where sessions end, and
    TraceError from the trace.
    """
    if page_size < 1:
        raise InvalidArgument(f"page_size must be at least 1, not {page_size}")
    if capacity_tokens < page_size:
        raise InvalidArgument(
            f"a capacity of {capacity_tokens} tokens is less than a page of {page_size}: raise it or lower page_size"
        )
    if capacity_tokens >= 2**31:
        raise InvalidArgument(f"a capacity of {capacity_tokens} tokens: a cache holds less than 2**31: lower it")
    if make_cache is None:
        from radixkv.cache import PrefixCache

        make_cache = PrefixCache
    ends: frozenset[int] = frozenset()
    if hints:
        requests = list(requests)
        ends = session_ends(requests)
    started = time.perf_counter()
    with make_cache(num_pages=capacity_tokens // page_size, page_size=page_size) as cache:
        counter = _Replay(cache, page_aligned, hints)
        for number, request in enumerate(requests, 1):
            counter.serve(request, number - 1 in ends)
            if progress is not None:
                progress(number)
        return counter.result(time.perf_counter() - started)


def session_ends(requests: Sequence[TraceRequest]) -> frozenset[int]:
    """The places of the requests that are the last of their session.

    Raises InvalidArgument where the trace does not tell: no request names its session, or each is one of its own. A
    guessed end costs more than a known one gains.
    """
    named = [(r.namespace, r.session) for r in requests if r.session]
    last = {(r.namespace, r.session): place for place, r in enumerate(requests) if r.session}
    if requests and len(last) == len(named):
        why = "each request is a session of its own" if named else "no request of this trace names its session"
        raise InvalidArgument(f"{why}: record it with sessions of several requests, or leave the hints out")
    return frozenset(last.values())


class _Replay:
    """One pass over a trace: the cache and the counters."""

    def __init__(self, cache: PrefixCache, page_aligned: bool, hints: bool) -> None:
        self._cache = cache
        self._page_aligned = page_aligned
        self._hints = hints
        self._pool_tokens = cache.num_pages * cache.page_size
        self._requests = self._input_tokens = self._output_tokens = self._hit_tokens = self._truncated = 0
        self._cache_seconds = 0.0

    def serve(self, request: TraceRequest, ends_session: bool) -> None:
        """Serve one request to its end and count it."""
        tokens_in = request.tokens_in
        num_in, num_out = len(tokens_in), request.num_out
        self._requests += 1
        self._input_tokens += num_in
        self._output_tokens += num_out
        page = self._cache.page_size
        total = (num_in + num_out) // page * page if self._page_aligned else num_in + num_out
        if total > self._pool_tokens:
            self._truncated += 1
            total = self._pool_tokens
        if total == 0:
            return  # page-aligned, and not even one full page
        prompt, output = tokens_in[:total], request.tokens_out[: max(0, total - num_in)]
        started = time.perf_counter()
        if self._page_aligned:
            matched = self._cache.match(prompt, request.namespace)
            self._hit_tokens += min(matched // page, (num_in - 1) // page) * page
        lease = self._cache.acquire(prompt, request.namespace)
        if not self._page_aligned:
            self._hit_tokens += lease.num_cached
        lease.advance()
        if len(output):
            lease.extend(output)
            lease.advance()
        if ends_session:
            lease.release(cold=True)
        else:
            lease.release()
        self._cache_seconds += time.perf_counter() - started

    def result(self, seconds: float) -> ReplayResult:
        """The counters so far."""
        return ReplayResult(
            requests=self._requests,
            input_tokens=self._input_tokens,
            output_tokens=self._output_tokens,
            hit_tokens=self._hit_tokens,
            evicted_pages=self._cache.stats().evicted_pages,
            capacity_pages=self._cache.num_pages,
            page_size=self._cache.page_size,
            page_aligned=self._page_aligned,
            truncated_requests=self._truncated,
            seconds=seconds,
            cache_seconds=self._cache_seconds,
            hints=self._hints,
        )
