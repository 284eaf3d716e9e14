"""What watching a cache costs: microseconds of CPU a request, plain, with its journal, log and what-if, and by policy.

python -m bench.cache.insight              1,000 requests of the chat workload, the best of five runs
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack

from radixkv import PrefixCache
from radixkv.traces.request import TraceRequest
from radixkv.traces.workload import generate

_PAGE = 16


def serve(cache: PrefixCache, requests: list[TraceRequest], pump: Callable[[], None] | None) -> float:
    """Microseconds of CPU a request, ``pump`` after every 20th included."""
    started = time.process_time()
    for number, request in enumerate(requests, 1):
        lease = cache.acquire(request.tokens_in)
        lease.advance()
        lease.extend(request.tokens_out)
        lease.advance()
        lease.release()
        if pump is not None and number % 20 == 0:
            pump()
    return 1e6 * (time.process_time() - started) / len(requests)


def measure(name: str, requests: list[TraceRequest], num_pages: int) -> float:
    """One run: "plain", "journal", "log", "what if" or "hazard"."""
    with ExitStack() as stack:
        cache, pump = PrefixCache(num_pages, _PAGE, "hazard" if name == "hazard" else "lru"), None
        if name == "journal":
            cache.journal()
        if name == "what if":
            cache.curve()
        if name == "log":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            pump = stack.enter_context(cache.record(os.path.join(folder, "log"))).pump
        return serve(cache, requests, pump)


def main() -> None:
    """Measure each way, the best of several runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--pages", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    requests = list(generate("chat", args.requests))
    ways = ("plain", "journal", "log", "what if", "hazard")
    best = {name: min(measure(name, requests, args.pages) for _ in range(args.runs)) for name in ways}
    print(json.dumps({name: round(micros, 1) for name, micros in best.items()}))


if __name__ == "__main__":
    main()
