"""The scheduler without a model: what it costs beside a step, and what headroom saves where pages are few.

    python -m bench.serving.scheduler [--steps 300]

The first table is of decode steps of as many requests as stand there: the median CPU time of `next` and `accept`, which
choose the requests, extend their leases and take their tokens. The second is of 64 requests of up to 128 + 512 tokens
over 400 pages of 16, which some twenty fill, with the headroom that the scheduler keeps and with none.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from radixkv import Lease, PrefixCache
from radixkv.scheduling import Request, Scheduler, space

PAGE = 16
RUNNING = (1, 32, 256)
LENGTH = 512  # tokens of a prompt in the first table


class Host:
    """Pages of a cache without tensors, as `Engine` has them."""

    def __init__(self, num_pages: int) -> None:
        self.cache = PrefixCache(num_pages, PAGE)
        self.drop_unit = PAGE

    def drop(self, lease: Lease, window_left: int) -> int:
        return lease.drop(max(0, lease.num_written - window_left) // PAGE * PAGE)


def requests_of(prompts: list[int], answers: list[int]) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(rng.integers(0, 32000, n), answer) for n, answer in zip(prompts, answers, strict=True)]


def step_us(running: int, steps: int) -> float:
    """Median µs of CPU time of `next` and `accept` in a decode step of so many requests."""
    scheduler = Scheduler(Host(running * (LENGTH + steps + 2 * PAGE) // PAGE + 64), max_step_tokens=running * LENGTH)
    for request in requests_of([LENGTH] * running, [steps + 1] * running):
        scheduler.submit(request)
    times = []
    while True:
        start = time.thread_time_ns()
        batch = scheduler.next()
        chosen = time.thread_time_ns()
        if batch is None:
            return statistics.median(times[1:]) / 1e3  # the first one is the prompts'
        for lease in batch.leases:
            lease.advance()
        tokens = [1] * len(batch.rows)
        written = time.thread_time_ns()
        scheduler.accept(tokens)
        times.append(time.thread_time_ns() - written + chosen - start)


def simulated(headroom: int) -> tuple[int, int, int, float]:
    """Steps, preemptions and rows of the second table's requests, and the share of the rows computed before."""
    rng = np.random.default_rng(0)
    requests = requests_of(rng.integers(32, 129, 64).tolist(), rng.integers(128, 513, 64).tolist())
    before, space.HEADROOM = space.HEADROOM, headroom
    scheduler = Scheduler(Host(400))
    for request in requests:
        scheduler.submit(request)
    steps = rows = 0
    try:
        while batch := scheduler.next():
            steps += 1
            rows += sum(lease.num_tokens - lease.num_written for lease in batch.leases)
            for lease in batch.leases:
                lease.advance()
            scheduler.accept(rng.integers(0, 32000, len(batch.rows)).tolist())
    finally:
        space.HEADROOM = before
    again = rows - sum(request.num_tokens - 1 for request in requests)
    return steps, sum(request.stats.preemptions for request in requests), rows, again / rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    for running in RUNNING:
        print(f"{running:4} running: {step_us(running, steps):8.1f} us a step", flush=True)
    for headroom in (space.HEADROOM, 0):
        count, preemptions, rows, again = simulated(headroom)
        print(
            f"headroom {headroom:3}: {count} steps, {preemptions} preemptions, {rows} rows, {again:.1%} of them again",
            flush=True,
        )


if __name__ == "__main__":
    main()
