"""Decode over a shared prefix: K and V read once for all requests (cascade) against once for each of them.

    python -m bench.attention.cascade [--threads N] [--quick] [--json]

Every request decodes one token after a prefix that all share and 256 tokens of its own, in bf16. The two ways run
alternately on the same memory, out of cache; times are medians, the ratio is the median of the pairs' ratios. Their
outputs are compared bit for bit. "nothing shared" is the same batch with pages of its own for every request.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.attention.cases import OUT_OF_CACHE_BYTES, Heads
from bench.attention.ours import Layers, isa
from bench.common.machine import cpu_model
from bench.common.page_tables import table_of
from bench.common.table import Row, beside, line, rows_of
from radixkv.attention.cascade import NATIVE, OFF, CascadeCosts
from radixkv.attention.native import NativeAttention

MODELS = {"SmolLM2": Heads(9, 3, 64), "Llama": Heads(32, 8, 128)}
PRIVATE = 256


def pairs(one: Callable[[], object], other: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Medians of the seconds of either and of the ratio other / one, run alternately in either order."""
    first, second = [], []
    for i in range(repeats + 1):
        for call, times in ((one, first), (other, second)) if i % 2 else ((other, second), (one, first)):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(first[1:], second[1:], strict=True))
    return statistics.median(first[1:]), statistics.median(second[1:]), ratio


def measure(name: str, batch: int, shared: int, private: int, threads: int, repeats: int) -> dict[str, object]:
    heads = MODELS[name]
    table, num_pages = table_of(batch, shared + private, shared=shared)
    layers = Layers(num_pages, heads, torch.bfloat16, OUT_OF_CACHE_BYTES)

    def backend(costs: CascadeCosts) -> NativeAttention:
        made = layers.backend(threads, cascade=costs)
        made.plan(table)
        return made

    with_cascade, without = backend(NATIVE), backend(OFF)
    q = torch.randn(batch, heads.qo, heads.dim).to(torch.bfloat16)
    outs = [torch.empty_like(q) for _ in range(2)]
    for made, out in zip((with_cascade, without), outs, strict=True):
        made.run(0, q, out)
    assert torch.equal(outs[0].view(torch.int16), outs[1].view(torch.int16)), "the cascade changed bits"
    cascade, plain, ratio = pairs(
        lambda: with_cascade.run(layers.next(), q, outs[0]), lambda: without.run(layers.next(), q, outs[1]), repeats
    )
    planned, planned_plain, plan_ratio = pairs(
        lambda: with_cascade.plan(table), lambda: without.plan(table), max(20, repeats)
    )
    plan, token_bytes = with_cascade.cascade, 4 * heads.kv * heads.dim
    return {
        "case": "shared prefix" if shared else "nothing shared", "model": name, "heads": str(heads), "batch": batch,
        "shared": shared, "private": private, "MB_read": (plan.tokens_read - plan.tokens_saved) * token_bytes / 1e6,
        "MB_read_without": plan.tokens_read * token_bytes / 1e6, "us": cascade * 1e6, "us_without": plain * 1e6,
        "speedup": ratio, "plan_us": planned * 1e6, "plan_us_without": planned_plain * 1e6, "plan_ratio": plan_ratio,
    }  # fmt: skip


def rows(results: list[dict[str, Any]]) -> Iterator[Row]:
    """With the cascade against without it."""
    for r in results:
        least = {(8, 8192): 3.5, (32, 8192): 5.0}.get((r["batch"], r["shared"]), 0.97)
        name = f"cascade {r['heads']}, {r['batch']} x {r['shared']}"
        yield beside(name, "us", r["us"], "no cascade", r["us_without"], least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and only the smaller model")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    repeats = 7 if options.quick else 31
    machine = {"isa": isa(), "threads": options.threads, "cpu": cpu_model()}
    results: list[dict[str, object]] = []
    if not options.json:
        print(line(machine), flush=True)
    for name in ("SmolLM2",) if options.quick else tuple(MODELS):
        for batch in (8, 32):
            for shared, private in ((1024, PRIVATE), (8192, PRIVATE), (0, 1024 + PRIVATE)):
                again = repeats if shared else 101  # equal ways, told apart to 3 %
                results.append(measure(name, batch, shared, private, options.threads, again))
                if not options.json:
                    print(line(results[-1]), flush=True)
    if options.json:
        json.dump({**machine, "results": results} | rows_of(rows(results)), sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
