"""Measures one cache: `python -m bench.cache.peers.measure DRIVER [--quick] [--trace FILE]` prints JSON.

Runs in the venv of the cache it measures. A driver is a module of this package with a function `make(pages) -> Cache`.
Every figure is the time of the cache's own calls: tokens are brought into the form that the cache takes before the
clock starts.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.cache import workload
from bench.cache.workload import PAGE, Tokens

EVICT_SECONDS = 5.0  # a tree that takes longer is evicted in part
REPLAY_SECONDS = 90.0  # a replay that takes longer stops
METADATA_PROMPT = 1024


class Cache(Protocol):
    """What a driver wraps. `claim` is whatever the cache hands out for a request."""

    def native(self, tokens: Tokens) -> Any:
        """The tokens in the form that the cache takes. Not timed."""

    def acquire(self, tokens: Any) -> Any:
        """Match, lock, and the ids of the pages (or slots) of the cached prefix. Timed."""

    def release(self, claim: Any) -> None:
        """Unlock; nothing is published."""

    def serve(self, tokens: Any) -> int:
        """A whole request: match, lock, take room (evicting), publish, unlock. Timed in the replay. Hit tokens."""

    def prepare(self, prompt: Any, whole: Any) -> Any:
        """A claim on `whole`, whose prefix `prompt` is cached, with room for the rest. Timed in a turn only."""

    def commit(self, claim: Any) -> None:
        """Publish the rest. Timed."""

    def finish(self, claim: Any) -> None:
        """Unlock. Timed in a turn only."""

    def evict(self, pages: int) -> int:
        """Evict up to `pages` pages; how many. Timed."""


Make = Callable[[int], Cache]


def timed(run: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    start = time.perf_counter_ns()
    result = run(*arguments)
    return time.perf_counter_ns() - start, result


def overhead_us() -> float:
    """The time that `timed` takes itself."""

    def nothing(_: None) -> None:
        pass

    return statistics.median(timed(nothing, None)[0] for _ in range(2000)) / 1e3


def lookups(make: Make, count: int, repeats: int) -> dict[str, Any]:
    pages = (workload.SYSTEM + count * workload.TURNS * workload.TURN + sum(workload.LENGTHS)) // PAGE
    suffix_pages = len(workload.COMMIT_UNDER) * repeats * (workload.SUFFIX // PAGE + 2)
    cache = make(pages + suffix_pages + 4096)
    for tokens in workload.conversations(count):
        cache.serve(cache.native(tokens))
    for length in workload.LENGTHS:
        for tokens in workload.long_turns(length):
            cache.serve(cache.native(tokens))
    empty = overhead_us()
    out: dict[str, Any] = {"acquire_us": {}, "acquire_release_us": {}, "commit_us": {}, "turn_us": {}}
    for length in workload.LENGTHS:
        prompt = cache.native(workload.long_prompt(length))
        acquires, both = [], []
        for _ in range(repeats):
            taken, claim = timed(cache.acquire, prompt)
            given, _ = timed(cache.release, claim)
            acquires.append(taken / 1e3 - empty)
            both.append((taken + given) / 1e3 - 2 * empty)
        out["acquire_us"][length] = statistics.median(acquires)
        out["acquire_release_us"][length] = statistics.median(both)
    for length in workload.COMMIT_UNDER:
        prompt = workload.long_prompt(length)[:length]
        commits, turns = [], []
        for suffix in workload.suffixes(repeats):
            first, whole = cache.native(prompt), cache.native(np.concatenate([prompt, suffix]))
            prepared, claim = timed(cache.prepare, first, whole)
            committed, _ = timed(cache.commit, claim)
            finished, _ = timed(cache.finish, claim)
            commits.append(committed / 1e3 - empty)
            turns.append((prepared + committed + finished) / 1e3 - 3 * empty)
        out["commit_us"][length] = statistics.median(commits)
        out["turn_us"][length] = statistics.median(turns)
    return out


def eviction(make: Make, nodes: int) -> dict[str, float]:
    """ns a page over the calls made in EVICT_SECONDS, and the share of the tree evicted in them."""
    total = nodes * workload.LEAF_PAGES
    cache = make(total)
    for tokens in workload.leaves(nodes):
        cache.serve(cache.native(tokens))
    gc.collect()
    evicted, spent = 0, 0
    while evicted < total and spent < EVICT_SECONDS * 1e9:
        taken, pages = timed(cache.evict, workload.EVICT_PAGES)
        if not pages:
            raise RuntimeError(f"{total - evicted} pages are left that cannot be evicted")
        evicted, spent = evicted + pages, spent + taken
    return {"ns_per_page": spent / evicted, "share": evicted / total}


def replay(make: Make, serve: str, trace: Path, limit: int | None, repeats: int) -> dict[str, float]:
    rates: list[float] = []
    seconds = 0.0
    while len(rates) < repeats and seconds < REPLAY_SECONDS / 3:
        cache = make(workload.REPLAY_TOKENS // PAGE)
        call = getattr(cache, serve)
        hits = inputs = requests = spent = 0
        for tokens in workload.mooncake(trace, limit):
            native = cache.native(tokens)
            taken, hit = timed(call, native)
            spent, hits, inputs, requests = spent + taken, hits + hit, inputs + len(tokens), requests + 1
            if spent > REPLAY_SECONDS * 1e9:
                break
        rates.append(requests / spent * 1e9)
        seconds += spent / 1e9
    return {
        "requests_per_s": statistics.median(rates),
        "repeats": len(rates),
        "requests": requests,
        "hit_rate": hits / inputs,
    }


def in_child(run: Callable[[], float]) -> float:
    """The result of `run` in a copy of this process, whose memory it leaves as it is."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, json.dumps(run()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.wait()
    if not answer:
        raise RuntimeError("the child process that measures metadata failed")
    return float(answer)


def metadata(make: Make, tokens: int) -> float:
    """Resident bytes a cached token: the growth of this process, from before the cache is made."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    warm = make(4096)
    for prompt in workload.conversations(10):
        warm.serve(warm.native(prompt))
    del warm
    gc.collect()
    rng = np.random.default_rng(3)
    before = resident()
    cache = make(tokens // PAGE + 64)
    for _ in range(tokens // METADATA_PROMPT):
        cache.serve(cache.native(rng.integers(0, workload.VOCABULARY, METADATA_PROMPT, dtype=np.int32)))
    gc.collect()
    return (resident() - before) / (tokens // METADATA_PROMPT * METADATA_PROMPT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("driver", help="a module of bench.cache.peers")
    parser.add_argument("--hash", help="the driver's hash function, where it has several")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, nodes and requests")
    parser.add_argument("--trace", type=Path, help="mooncake_conversation.jsonl; without it, no replay")
    parser.add_argument("--nodes", type=int, nargs="+", default=[], help="sizes of the trees that are evicted")
    args = parser.parse_args()
    start = time.perf_counter()
    driver = importlib.import_module(f"bench.cache.peers.{args.driver}")
    out: dict[str, Any] = {"import_ms": 1e3 * (time.perf_counter() - start)}
    if args.hash:
        driver.use_hash(args.hash)
    out["metadata_bytes"] = in_child(lambda: metadata(driver.make, 1_000_000 if args.quick else 2_000_000))
    out |= lookups(driver.make, 200 if args.quick else 1000, 30 if args.quick else 100)
    if args.trace:
        extent = (args.trace, 1000 if args.quick else None, 1 if args.quick else 3)
        out["replay"] = replay(driver.make, "serve", *extent)
        if args.driver == "ours":  # which can also do as the peers do
            out["replay_aligned"] = replay(driver.make, "serve_full_pages", *extent)
    out["evict"] = {nodes: eviction(driver.make, nodes) for nodes in args.nodes}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
