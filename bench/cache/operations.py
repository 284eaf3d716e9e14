"""Times of the cache's operations: match, acquire, commit, release, evict, page table, step; bytes of metadata a token.

    python -m bench.cache.operations [--json] [--quick]

Each figure is the median of repeats in this process. "memcmp" is the time of comparing the same tokens in memory, the
floor of a match.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import radixkv
from bench.cache import workload
from bench.cache.memory import memcmp_us
from bench.cache.workload import LENGTHS, PAGE, SYSTEM, TURN, TURNS
from bench.common.machine import cpu_model
from bench.common.table import OURS, Row, rows_of


def median_ns(run: Callable[[], object], repeats: int, inner: int = 1) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        for _ in range(inner):
            run()
        times.append((time.perf_counter_ns() - start) / inner)
    return statistics.median(times)


def serve(cache: radixkv.PrefixCache, tokens: np.ndarray) -> None:
    with cache.acquire(tokens) as lease:
        lease.advance()


def conversations(cache: radixkv.PrefixCache, count: int) -> None:
    for tokens in workload.conversations(count):
        serve(cache, tokens)


def lookups(count: int, repeats: int) -> list[dict[str, Any]]:
    suffixes = len(LENGTHS) * repeats * 1024  # of the commits; nothing is evicted, so runs of pages stay contiguous
    pages = (SYSTEM + count * TURNS * TURN + 2 * sum(LENGTHS) + suffixes) // PAGE + 4096
    cache = radixkv.PrefixCache(pages, PAGE)
    conversations(cache, count)
    rng = np.random.default_rng(1)
    rows = []
    for length in LENGTHS:
        tokens = rng.integers(0, 32000, length + 1, dtype=np.int32)
        serve(cache, tokens)

        def acquire_and_pages(tokens: np.ndarray = tokens) -> None:
            lease = cache.acquire(tokens)
            lease.pages  # noqa: B018 (the array is made when it is read)
            lease.release(False)

        def acquire_only(tokens: np.ndarray = tokens) -> None:
            cache.acquire(tokens).release(False)

        suffix = rng.integers(0, 32000, (repeats, 1024), dtype=np.int32)
        commit = []
        for new in suffix:
            lease = cache.acquire(np.concatenate([tokens[:length], new]))
            lease.advance()
            start = time.perf_counter_ns()
            lease.commit()
            commit.append(time.perf_counter_ns() - start)
            lease.release()
        rows.append(
            {
                "tokens": length,
                "memcmp_us": memcmp_us(tokens[:length], repeats),
                "match_us": median_ns(lambda t=tokens: cache.match(t), repeats, 5) / 1e3,  # type: ignore[misc]
                "acquire_release_us": median_ns(acquire_only, repeats, 5) / 1e3,
                "acquire_pages_release_us": median_ns(acquire_and_pages, repeats, 5) / 1e3,
                "commit_1k_us": statistics.median(commit) / 1e3,
            }
        )
    return rows


def turn(repeats: int) -> float:
    """acquire + commit + release of a 1k prompt of which 896 tokens are cached, in µs."""
    cache = radixkv.PrefixCache(200_000, PAGE)
    conversations(cache, 100)
    rng = np.random.default_rng(2)
    base = rng.integers(0, 32000, 896, dtype=np.int32)
    serve(cache, base)
    prompts = [np.concatenate([base, rng.integers(0, 32000, 128, dtype=np.int32)]) for _ in range(repeats)]
    times = []
    for prompt in prompts:
        start = time.perf_counter_ns()
        serve(cache, prompt)
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e3


def eviction(nodes: int, pages_per_node: int = 4) -> float:
    """ns a page, evicting all of a tree of `nodes` leaves in calls of 64 pages (1k tokens)."""
    cache = radixkv.PrefixCache(nodes * pages_per_node + 64, PAGE)
    tokens = np.arange(pages_per_node * PAGE, dtype=np.int32)
    for i in range(nodes):
        tokens[0], tokens[1] = i % 32000, i // 32000
        serve(cache, tokens)
    total = cache.stats().evictable
    start = time.perf_counter_ns()
    while cache.evict(64):
        pass
    return (time.perf_counter_ns() - start) / total


def page_table(repeats: int, batch: int = 256, length: int = 2048) -> dict[str, float]:
    cache = radixkv.PrefixCache(batch * (length // PAGE + 2), PAGE)
    rng = np.random.default_rng(3)
    leases = [cache.acquire(rng.integers(0, 32000, length, dtype=np.int32)) for _ in range(batch)]
    for lease in leases:
        lease.advance(length - 1)
    table = radixkv._core.PageTable(cache)
    step = radixkv._core.Step(table, leases, 1)

    def assemble() -> None:
        step.__enter__()
        step.__exit__(BaseException, None, None)  # as by an exception: the leases stay as they are

    step.__enter__()
    result = table.kv_indices
    step.__exit__(BaseException, None, None)
    target = np.empty_like(result)
    return {
        "assemble_us": median_ns(assemble, repeats) / 1e3,
        "memcpy_us": median_ns(lambda: np.copyto(target, result), repeats) / 1e3,
    }


def step(repeats: int, batch: int, length: int = 2048) -> float:
    """Entering and leaving a decode step of `batch` requests with all of its planning, without attention, in µs."""
    import torch

    pages = batch * (length // PAGE + 2 + repeats // PAGE)
    sizes = {"num_layers": 1, "num_qo_heads": 1, "num_kv_heads": 1, "head_dim": 8, "num_pages": pages}
    engine = radixkv.Engine(**sizes, dtype=torch.bfloat16)
    rng = np.random.default_rng(4)
    leases = [engine.acquire(rng.integers(0, 32000, length, dtype=np.int32)) for _ in range(batch)]
    for lease in leases:
        lease.advance(length - 1)
    rows = torch.zeros(batch, 1, 8, dtype=torch.bfloat16)
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        opened = engine.step(leases).__enter__()
        entered = time.perf_counter_ns()
        opened.attend(0, rows, rows, rows, window_left=0)
        attended = time.perf_counter_ns()
        opened.__exit__(None, None, None)
        times.append(time.perf_counter_ns() - attended + entered - start)
        for lease in leases:
            lease.extend([1])
    return statistics.median(times) / 1e3


def metadata(tokens: int) -> float:
    """Resident bytes a cached token, everything included, in a fresh process."""
    code = f"""
import resource, numpy as np, radixkv
from bench.cache.operations import conversations, PAGE
def rss():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
warm = radixkv.PrefixCache(4096, PAGE); conversations(warm, 10); del warm
before = rss()
cache = radixkv.PrefixCache({tokens} // PAGE + 1000, PAGE)
rng = np.random.default_rng(0)
for i in range({tokens} // 1024):
    with cache.acquire(rng.integers(0, 32000, 1024, dtype=np.int32)) as lease:
        lease.advance()
s = cache.stats()
print((rss() - before) / ((s.evictable + s.protected) * PAGE))
"""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def rows(out: dict[str, Any]) -> Iterator[Row]:
    """What has a goal of its own and no peer; the rest is in bench.cache.peers."""
    table = out["page_table_256x2k"]
    ours, copy = table["assemble_us"], table["memcpy_us"]
    yield Row("page table 256 x 2k", "us", {OURS: ours, "memcpy": copy}, copy / ours, "<= 2 memcpy", ours <= 2 * copy)
    for requests, us in out["step_us"].items():
        most = 30 + 0.2 * requests
        yield Row(f"step of {requests}", "us", {OURS: us}, None, f"<= {most:.0f}", us <= most)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and nodes")
    args = parser.parse_args(argv)
    repeats = 50 if args.quick else 300
    out = {
        "machine": cpu_model(),
        "lookups": lookups(200 if args.quick else 1000, repeats),
        "turn_us": turn(repeats),
        "evict_ns_per_page": {n: eviction(n) for n in ((1000, 10_000) if args.quick else (1000, 100_000, 1_000_000))},
        "page_table_256x2k": page_table(repeats),
        "step_us": {n: step(repeats, n) for n in (1, 32, 256)},
        "metadata_bytes_per_token": metadata(1_000_000 if args.quick else 8_000_000),
        "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if args.json:
        print(json.dumps(out | rows_of(rows(out))))
        return
    print("fully cached prompt among 1,000 conversations (us)" if not args.quick else "fully cached prompt (us)")
    for row in out["lookups"]:
        print("  " + "  ".join(f"{k} {v:9.2f}" if isinstance(v, float) else f"{k} {v:6d}" for k, v in row.items()))
    print(f"turn of 128 new tokens on 896 cached: acquire + commit + release {out['turn_us']:.2f} us")
    print("evict: " + ", ".join(f"{ns:.1f} ns/page at {n} nodes" for n, ns in out["evict_ns_per_page"].items()))
    t = out["page_table_256x2k"]
    print(f"page table 256 x 2k tokens: {t['assemble_us']:.1f} us (memcpy of kv_indices {t['memcpy_us']:.1f} us)")
    print("step, planned, without attention: " + ", ".join(f"{us:.1f} us for {n}" for n, us in out["step_us"].items()))
    print(f"metadata: {out['metadata_bytes_per_token']:.2f} bytes a cached token")


if __name__ == "__main__":
    main()
