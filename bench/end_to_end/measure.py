"""Runs one contender: `python -m bench.end_to_end.measure DRIVER WORKLOAD REPEATS` prints one JSON object.

Runs in the venv of the contender. The clock is CPU seconds of the process with one thread, wall seconds with more.
Loading the model, compiling it and a first small request are not timed.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from bench.end_to_end.workload import Workload

Mark = Callable[[], None]


class Driver(Protocol):
    """A contender. It answers with the new tokens only, `new` of them, greedy, end-of-sequence ignored."""

    def begin(self, system: list[int]) -> None:
        """Forget all that is cached, and compute `system` if the contender wants it computed apart. Timed."""

    def serve(self, prompt: list[int], new: int, mark: Mark) -> list[int]:
        """One request from beginning to end; calls `mark` when the first token is known. Timed."""

    def serve_all(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """All requests together. Timed."""


def one_by_one(driver: Driver, work: Workload, clock: Callable[[], float]) -> dict[str, Any]:
    start = clock()
    driver.begin(work.system)
    answers, waits = [], []
    for prompt in work.prompts:
        submitted = clock()
        first: list[float] = []
        answers.append(driver.serve(prompt, work.new, lambda seen=first: seen.append(clock())))
        waits.append(first[0] - submitted)
    total = clock() - start
    return {"total_s": total, "ttft_s": statistics.median(waits[1:]), "first_ttft_s": waits[0], "tokens": answers}


def all_at_once(driver: Driver, work: Workload, clock: Callable[[], float]) -> dict[str, Any]:
    start = clock()
    driver.begin(work.system)
    answers = driver.serve_all(work.prompts, work.new)
    return {"total_s": clock() - start, "tokens": answers}


def summary(runs: list[dict[str, Any]], generated: int) -> dict[str, Any]:
    """Medians over the runs, their spread, and the tokens of the first."""
    out: dict[str, Any] = {"tokens": runs[0]["tokens"], "repeats": len(runs)}
    for name in runs[0].keys() - {"tokens"}:
        out[name] = statistics.median(run[name] for run in runs)
    totals = [run["total_s"] for run in runs]
    out["spread"] = max(totals) / min(totals) - 1
    out["tokens_per_s"] = generated / out["total_s"]
    out["repeatable"] = all(run["tokens"] == runs[0]["tokens"] for run in runs)
    return out


def main() -> int:
    name, file, repeats = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    work = Workload.load(file)
    clock = time.process_time if work.threads == 1 else time.perf_counter
    driver: Driver = importlib.import_module(f"bench.end_to_end.drivers.{name}").make(work)
    driver.begin(work.system[:16])
    driver.serve(work.system[:16] + work.prompts[0][-8:], 2, lambda: None)
    generated = len(work.prompts) * work.new
    out = {
        "one_by_one": summary([one_by_one(driver, work, clock) for _ in range(repeats)], generated),
        "all_at_once": summary([all_at_once(driver, work, clock) for _ in range(repeats)], generated),
    }
    for key, value in out.items():
        for answer in value["tokens"]:
            if len(answer) != work.new:
                raise RuntimeError(f"{key}: {len(answer)} tokens instead of {work.new}")
    print("\n" + json.dumps(out), flush=True)
    return 0


if __name__ == "__main__":
    os._exit(main())  # some contenders leave threads behind that would be waited for
