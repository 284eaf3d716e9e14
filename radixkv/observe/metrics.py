"""Metrics of a running cache and of the requests that use it, for Prometheus.

    metrics = Metrics(engine.cache).follow(engine)
    prometheus_client.REGISTRY.register(metrics)           # prometheus_client.start_http_server(9400) serves them
    request = metrics.watch(generator.submit(prompt))      # counted when it is done
    with metrics.step():                                   # timed
        generator.step()

The cache is read when somebody asks (a scrape) and costs nothing in between. Counters never fall while the cache lives.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from radixkv.errors import BackendUnavailable
from radixkv.observe.engine_metrics import EngineFigures, engine_families

if TYPE_CHECKING:
    from radixkv.cache import PrefixCache

__all__ = ["MAX_GROUPS", "Metrics", "group_by_default"]

MAX_GROUPS = 100
"""More groups than these are counted as "other": each is a time series for good."""

_STEP_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class _Request(Protocol):
    """A request of `radixkv.scheduling`, or a host's own with these figures."""

    namespace: str
    siblings: tuple[Any, ...]
    stats: Any

    @property
    def status(self) -> str: ...
    @property
    def done(self) -> bool: ...


_AnyRequest = TypeVar("_AnyRequest", bound=_Request)


class _Plan(Protocol):
    """What `Step.plan` says of a step."""

    @property
    def tokens_read(self) -> int: ...
    @property
    def tokens_saved(self) -> int: ...


def group_by_default(namespace: str) -> str:
    """The group of a namespace unless told otherwise: names of tenants are neither few nor anybody's business."""
    return "named" if namespace else "default"


class Metrics:
    """A collector for prometheus_client. One for a cache; its methods may be called from any thread.

    ``group`` gives the label under which a namespace's requests are counted: a tenant, a model, a tier of service.

    Raises BackendUnavailable where prometheus_client is missing.
    """

    def __init__(self, cache: PrefixCache, group: Callable[[str], str] = group_by_default) -> None:
        try:
            from prometheus_client import core
        except ImportError as error:
            raise BackendUnavailable(
                f"metrics need prometheus_client: pip install 'radixkv[metrics]' ({error})"
            ) from None
        self._families = core
        self._cache = cache
        cache.curve()  # counts from here on what larger pools would hit
        self._group = group
        self._lock = threading.Lock()
        self._watched: list[Any] = []
        self._steps = _Histogram(_STEP_BOUNDS)
        self._first_tokens = _Histogram(_FIRST_TOKEN_BOUNDS)
        self._groups: set[str] = set()
        self._finished: Counter[tuple[str, str]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._preempted = self._read = self._saved = 0
        self._engine: EngineFigures | None = None

    def follow(self, engine: EngineFigures) -> Metrics:
        """Also tell what the engine's formats have stored and what its tiers did. Returns itself."""
        self._engine = engine
        return self

    def watch(self, request: _AnyRequest) -> _AnyRequest:
        """Count a request, and those of the same submission, when they are done; returns it. Call it once."""
        with self._lock:
            self._gather()  # so that none is kept where nobody asks for the figures
            self._watched.extend(request.siblings or (request,))
        return request

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time what is done inside, whether it raises or not, and count the requests that it ended."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            with self._lock:
                self._steps.add(seconds)
                self._gather()

    def add_plan(self, plan: _Plan) -> None:
        """Count what a step's cascade saves, from `Step.plan`."""
        with self._lock:
            self._read += plan.tokens_read
            self._saved += plan.tokens_saved

    def collect(self) -> Iterator[Any]:
        """All families, as prometheus_client asks for them."""
        stats = self._cache.stats()
        yield from self._of_cache(stats)
        with self._lock:
            self._gather()
            families = [*self._of_requests(), *self._of_steps()]
        yield from families
        if self._engine is not None:
            yield from engine_families(self._families, self._engine)

    def _gather(self) -> None:
        """Take what is done out of the watched requests, and count it."""
        done = [request for request in self._watched if request.done]
        if not done:
            return
        self._watched = [request for request in self._watched if not request.done]
        for request in done:
            group, stats = self._label(request.namespace), request.stats
            self._finished[group, request.status] += 1
            for kind in ("prompt", "cached", "computed", "generated"):
                self._tokens[group, kind] += getattr(stats, f"{kind}_tokens")
            self._preempted += stats.preemptions
            if stats.time_to_first_token is not None:
                self._first_tokens.add(stats.time_to_first_token)

    def _label(self, namespace: str) -> str:
        group = str(self._group(namespace))
        if group not in self._groups and len(self._groups) >= MAX_GROUPS:
            return "other"
        self._groups.add(group)
        return group

    def _of_cache(self, stats: Any) -> Iterator[Any]:
        gauge, counter = self._families.GaugeMetricFamily, self._families.CounterMetricFamily
        pages = gauge("radixkv_pages", "Pages of the pool by state; together they are the pool.", labels=["state"])
        for state in ("free", "private", "protected", "evictable"):
            pages.add_metric([state], getattr(stats, state))
        yield pages
        in_use = (stats.private + stats.protected) / stats.num_pages
        yield gauge("radixkv_pages_in_use_ratio", "Share of the pages that cannot be evicted.", value=in_use)
        yield gauge("radixkv_page_size_tokens", "Tokens that a page holds.", value=stats.page_size)
        yield gauge("radixkv_tree_nodes", "Runs of pages in the tree.", value=stats.num_nodes)
        yield gauge("radixkv_leases", "Leases that are held.", value=stats.num_leases)
        yield gauge("radixkv_pins", "Pins that are held.", value=stats.num_pins)
        yield counter("radixkv_acquired_requests", "Requests that acquired pages.", value=stats.requests)
        yield counter("radixkv_input_tokens", "Tokens of these requests.", value=stats.input_tokens)
        yield counter("radixkv_hit_tokens", "Of these, tokens found in the cache.", value=stats.hit_tokens)
        larger = counter(
            "radixkv_what_if_hit_tokens",
            "Tokens that a pool of so many times the pages would have found, since these metrics were made.",
            labels=["times"],
        )
        curve = self._cache.curve()
        for times, hits in {1.0: curve.hit_tokens, **curve.larger}.items():
            larger.add_metric([f"{times:g}"], hits)
        yield larger
        yield counter("radixkv_what_if_input_tokens", "Of so many input tokens.", value=curve.input_tokens)
        yield counter("radixkv_committed_tokens", "Tokens published to the tree.", value=stats.committed_tokens)
        yield counter("radixkv_evicted_pages", "Pages taken back from the tree.", value=stats.evicted_pages)

    def _of_requests(self) -> Iterator[Any]:
        gauge, counter = self._families.GaugeMetricFamily, self._families.CounterMetricFamily
        queue = gauge("radixkv_queue_requests", "Watched requests that are not done, by status.", labels=["status"])
        statuses = Counter(request.status for request in self._watched)
        for status in ("waiting", "running"):
            queue.add_metric([status], statuses[status])
        yield queue
        finished = counter(
            "radixkv_finished_requests", "Requests that ended, by group and reason.", labels=["group", "status"]
        )
        for labels, count in sorted(self._finished.items()):
            finished.add_metric(list(labels), count)
        yield finished
        tokens = counter(
            "radixkv_finished_tokens",
            "Tokens of requests that ended: of their prompts, of these found in the cache, run through the model, "
            "generated.",
            labels=["group", "kind"],
        )
        for labels, count in sorted(self._tokens.items()):
            tokens.add_metric(list(labels), count)
        yield tokens
        pages = gauge("radixkv_group_pages", "Pages that namespaces of a group have.", labels=["group"])
        held: Counter[str] = Counter()
        for namespace, use in self._cache.namespaces().items():
            if namespace is not None and use.pages > 0:
                held[self._label(namespace)] += use.pages
        for group, count in sorted(held.items()):
            pages.add_metric([group], count)
        yield pages
        waiting = sum(request.stats.preemptions for request in self._watched)
        yield counter(
            "radixkv_preemptions", "Times that a request gave its pages back.", value=self._preempted + waiting
        )

    def _of_steps(self) -> Iterator[Any]:
        counter = self._families.CounterMetricFamily
        yield counter("radixkv_cascade_read_tokens", "Tokens a layer would read without cascade.", value=self._read)
        yield counter("radixkv_cascade_saved_tokens", "Of these, not read again.", value=self._saved)
        histogram = self._families.HistogramMetricFamily
        yield histogram("radixkv_step_seconds", "Duration of a step.", **self._steps.contents())
        yield histogram(
            "radixkv_time_to_first_token_seconds",
            "From submission to the first token, of requests that ended.",
            **self._first_tokens.contents(),
        )


class _Histogram:
    """Counts of values up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def contents(self) -> dict[str, Any]:
        """The arguments of a HistogramMetricFamily: cumulative counts by upper bound, and the sum."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return {"buckets": buckets, "sum_value": self._sum}
