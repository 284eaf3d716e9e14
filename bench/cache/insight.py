"""What watching a cache costs: microseconds of CPU a request, by what is on, and what that is over the plain cache.

    python -m bench.cache.insight [--json]     1,000 requests of the chat workload, which evicts 35 pages a request

The ways take turns, so that what else the machine does meets all of them; the best run of each counts. `log` has its
thread's work in it, `metrics` is `Metrics.step` around each request, with a request watched; a scrape is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

from radixkv import PrefixCache
from radixkv.scheduling import Request
from radixkv.traces.request import TraceRequest
from radixkv.traces.workload import generate

_PAGE = 16
_WAYS = ("plain", "journal", "log", "what if", "metrics", "hazard")


def serve(cache: PrefixCache, requests: list[TraceRequest], pump: Callable[[], None] | None, metrics: Any) -> float:
    """Microseconds of CPU a request, ``pump`` after every 20th included."""
    step = nullcontext if metrics is None else metrics.step
    started = time.process_time()
    for number, request in enumerate(requests, 1):
        with step():
            lease = cache.acquire(request.tokens_in)
            lease.advance()
            lease.extend(request.tokens_out)
            lease.advance()
            lease.release()
        if pump is not None and number % 20 == 0:
            pump()
    return 1e6 * (time.process_time() - started) / len(requests)


def measure(name: str, requests: list[TraceRequest], num_pages: int) -> float:
    """One run of one of the ways."""
    with ExitStack() as stack:
        cache = PrefixCache(num_pages, _PAGE, "hazard" if name == "hazard" else "lru")
        pump = metrics = None
        if name == "journal":
            cache.journal()
        if name == "what if":
            cache.curve()
        if name == "log":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            pump = stack.enter_context(cache.record(os.path.join(folder, "log"))).pump
        if name == "metrics":
            from radixkv.observe.metrics import Metrics

            metrics = Metrics(cache)
            metrics.watch(Request([1]))
        return serve(cache, requests, pump, metrics)


def scrape(num_pages: int) -> float:
    """Microseconds of CPU that a scrape takes."""
    import prometheus_client

    from radixkv.observe.metrics import Metrics

    registry = prometheus_client.CollectorRegistry()
    registry.register(Metrics(PrefixCache(num_pages, _PAGE)))
    started = time.process_time()
    for _ in range(100):
        prometheus_client.generate_latest(registry)
    return 1e6 * (time.process_time() - started) / 100


def main() -> None:
    """Measure each way, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--pages", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    requests = list(generate("chat", args.requests))
    best = dict.fromkeys(_WAYS, float("inf"))
    for _ in range(args.runs):
        for name in _WAYS:
            best[name] = min(best[name], measure(name, requests, args.pages))
    once = min(scrape(args.pages) for _ in range(3))
    if args.json:
        print(json.dumps({name: round(micros, 2) for name, micros in best.items()} | {"scrape": round(once, 1)}))
        return
    for name, micros in best.items():
        print(f"{name:<8}{micros:>8.2f} us a request{micros - best['plain']:>+8.2f}")
    print(f"a scrape{once:>8.0f} us")


if __name__ == "__main__":
    main()
