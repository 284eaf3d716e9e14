"""Entering a decode step: what it costs beside attention, by how long the requests' contexts are.

    python -m bench.cache.step [--steps 200]

Each step extends every request by a token, opens the step, plans attention of one small layer (which is not run) and
leaves it, as `Engine.step` does. The requests share their context but for the last page: memory stays small, and all
that is counted in pages is as large as it would be.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

import radixkv

PAGE = 16
SHAPES = ((32, 512), (256, 512), (256, 2048), (64, 32768), (256, 131072))


def step_us(batch: int, length: int, steps: int) -> float:
    """Median µs of entering and leaving a decode step of `batch` requests with `length` tokens each."""
    pages = length // PAGE + batch * (2 + steps // PAGE) + 8
    engine = radixkv.Engine(num_layers=1, num_qo_heads=1, num_kv_heads=1, head_dim=8, num_pages=pages, page_size=PAGE)
    context = np.random.default_rng(0).integers(0, 32000, length, dtype=np.int32)
    first = engine.acquire(context)
    first.advance()
    first.commit()
    leases = [engine.acquire(np.append(context, i)) for i in range(batch)]
    times = []
    for _ in range(steps):
        start = time.perf_counter_ns()
        step = engine.step(leases)
        step.__enter__()
        step._attended(0)
        step.__exit__(None, None, None)
        times.append(time.perf_counter_ns() - start)
        for lease in leases:
            lease.extend([1])
    return statistics.median(times) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    for batch, length in SHAPES:
        print(f"{batch:4} requests of {length:6} tokens: {step_us(batch, length, steps):9.1f} us a step", flush=True)


if __name__ == "__main__":
    main()
