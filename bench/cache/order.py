"""The order of service in simulation: hit rate and time to first token for each policy and load, on real traces.

    python -m bench.cache.order [tau_airline ...] [--loads 0.7 0.95 1.2] [--ages 0 16 64 256] [--json]

`radixkv.scheduling.Scheduler` runs the requests of a trace without a model: a step takes as long as its rows take at a
constant speed. `load` sets the speed: 1 where the tokens that miss in a cache that serves one request at a time come as
fast as they are computed. Inside a session the next request comes when the one before has ended, at its own time at the
earliest. An age of n: n cached tokens overtake one earlier request; 0 is the longest prefix first without ageing.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections import defaultdict, deque
from typing import Any, NamedTuple

import numpy as np

from bench.cache.npz_traces import read_npz, traces_folder
from radixkv import PrefixCache
from radixkv.scheduling import Request, Scheduler, policy

STEP, RUNNING = 8192, 64


class Trace(NamedTuple):
    """A trace, how much of it, and a pool for a share of it."""

    page_size: int
    requests: int
    share: float


TRACES = {
    "tau_airline": Trace(16, 2000, 0.05),
    "react_hotpot": Trace(16, 2000, 0.05),
    "bbh_zipf": Trace(16, 2000, 0.05),
    "mooncake_conv": Trace(512, 2000, 0.10),
}


class Call(NamedTuple):
    """A request of a trace."""

    time: float
    session: str
    prompt: np.ndarray


class Host:
    """Pages without tensors."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.cache = PrefixCache(num_pages, page_size)


def load_trace(name: str) -> list[Call]:
    folder = traces_folder()
    if folder is None:
        raise SystemExit("no traces: set RADIXKV_TRACES")
    found = []
    for request in read_npz(folder / f"{name}.npz", TRACES[name].requests):
        found.append(Call(request.timestamp, request.session, request.tokens_in))
    return found


def one_at_a_time(calls: list[Call], host: Host) -> int:
    """How many tokens miss where nobody waits."""
    missed = 0
    for call in calls:
        with host.cache.acquire(call.prompt) as lease:
            missed += len(call.prompt) - lease.num_cached
            lease.advance()
    return missed


def simulate(calls: list[Call], host: Host, speed: float, name: str) -> dict[str, float]:
    """Serve the calls at `speed` tokens a second; hit rate and times to first token."""
    scheduler = Scheduler(host, max_step_tokens=STEP, max_running=RUNNING, policy=name)
    later: dict[str, deque[Call]] = defaultdict(deque)
    for call in calls:
        later[call.session].append(call)
    coming = [(queue[0].time, number, session) for number, (session, queue) in enumerate(later.items())]
    heapq.heapify(coming)
    arrived: dict[Request, tuple[float, str]] = {}
    clock, first_tokens, cached, queued = 0.0, [], 0, []
    while coming or scheduler.unfinished:
        while coming and coming[0][0] <= clock:
            time, _, session = heapq.heappop(coming)
            request = Request(later[session].popleft().prompt, max_new_tokens=1)
            scheduler.submit(request)
            arrived[request] = time, session
        batch = scheduler.next()
        if batch is None:
            clock = coming[0][0]
            continue
        queued.append(len(scheduler.waiting))
        clock += sum(lease.num_tokens - lease.num_written for lease in batch.leases) / speed
        for lease in batch.leases:
            lease.advance()
        scheduler.accept([0] * len(batch.drawing))
        for request in batch.drawing:
            time, session = arrived.pop(request)
            first_tokens.append(clock - time)
            cached += request.stats.cached_tokens
            if later[session]:
                heapq.heappush(coming, (max(clock, later[session][0].time), request.id, session))
    p50, p99 = np.percentile(first_tokens, [50, 99])
    hit = cached / sum(len(call.prompt) for call in calls)
    return {"hit": 100 * hit, "p50": float(p50), "p99": float(p99), "waiting": float(np.mean(queued))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", default=list(TRACES))
    parser.add_argument("--loads", type=float, nargs="+", default=[0.7, 0.95, 1.2])
    parser.add_argument("--ages", type=float, nargs="+", default=[0, 16, 64, 256])
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    options = parser.parse_args()
    for name in options.traces:
        trace, calls = TRACES[name], load_trace(name)
        everything = Host(sum(-(-len(call.prompt) // trace.page_size) for call in calls), trace.page_size)
        one_at_a_time(calls, everything)
        pages = int(trace.share * (everything.cache.num_pages - everything.cache.stats().free))
        pages = max(pages, 2 * max(-(-len(call.prompt) // trace.page_size) for call in calls))
        missed = one_at_a_time(calls, Host(pages, trace.page_size))
        seconds = max(call.time for call in calls) - min(call.time for call in calls)
        for load in options.loads:
            speed = missed / seconds / load
            show(name, load, "arrival", simulate(calls, Host(pages, trace.page_size), speed, "arrival"), options.json)
            for age in options.ages:
                policy.AGE = age or 1e-9  # type: ignore[assignment]
                found = simulate(calls, Host(pages, trace.page_size), speed, "prefix")
                show(name, load, f"prefix, age {age:g}" if age else "prefix, no age", found, options.json)
    return 0


def show(trace: str, load: float, order: str, found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"trace": trace, "load": load, "order": order} | found), flush=True)
    else:
        print(
            f"{trace:14s} load {load:<5g} {order:16s} hit {found['hit']:5.1f} %   first token p50 {found['p50']:8.1f} s"
            f"   p99 {found['p99']:8.1f} s   {found['waiting']:6.1f} waiting",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
