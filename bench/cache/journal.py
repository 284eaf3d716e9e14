"""What the journal costs: commits of 64 pages and evictions, with it and without, alternated.

    python -m bench.cache.journal [--json]

Medians of the alternations; the journal is not read, as its readers run in threads of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

import radixkv

PAGE, PAGES, RUNS, ALTERNATIONS = 16, 64, 100, 11


def times(journal: bool, seed: int) -> tuple[float, float]:
    """(us a commit of 64 pages, ns a page evicted) of one cache."""
    cache = radixkv.PrefixCache(PAGES * RUNS + PAGES, PAGE)
    if journal:
        cache.journal()
    rng = np.random.default_rng(seed)
    commits = []
    for tokens in rng.integers(0, 32000, (RUNS, PAGES * PAGE), dtype=np.int32):
        with cache.acquire(tokens) as lease:
            lease.advance()
            start = time.perf_counter_ns()
            lease.commit()
            commits.append(time.perf_counter_ns() - start)
    total = cache.stats().evictable
    start = time.perf_counter_ns()
    while cache.evict(PAGES):
        pass
    return statistics.median(commits) / 1e3, (time.perf_counter_ns() - start) / total


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for seed in range(ALTERNATIONS):
        for journal in (False, True):
            found[journal].append(times(journal, seed))
    medians = {on: [statistics.median(column) for column in zip(*rows, strict=True)] for on, rows in found.items()}
    if args.json:
        print(json.dumps({name: dict(zip(("commit_us", "evict_ns_per_page"), medians[on], strict=True))
                          for name, on in (("off", False), ("on", True))}))  # fmt: skip
        return
    for i, (what, unit) in enumerate((("commit of 64 pages", "us"), ("eviction of a page", "ns"))):
        off, on = medians[False][i], medians[True][i]
        print(f"{what}: {off:.2f} {unit} without the journal, {on:.2f} {unit} with it")


if __name__ == "__main__":
    main()
