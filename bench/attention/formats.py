"""Decode and prefill by the format of K and V, beside a streaming read of the same bytes.

    python -m bench.attention.formats [--threads N] [--quick] [--json]

The formats of a case take turns, call by call, so that a noisy machine slows them alike. Times are medians; `times` is
the median over the rounds of bf16's time divided by the format's, `of_stream` the share of a streaming read's rate.
vLLM's kernel for CPUs stands beside them where it is installed (make e2e-venv), in bf16 and, where it can, fp8.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch

from bench.attention.cases import GQA, OUT_OF_CACHE_BYTES, Heads
from bench.attention.ours import Layers, isa
from bench.attention.peer import VllmCpu
from bench.attention.speed import stream_rate
from bench.common.machine import cpu_model
from bench.common.page_tables import table_of
from bench.common.table import line

FORMATS = ("bf16", "fp32", "fp8", "fp8_rotated", "int8", "k8v4", "int4")


def call_of(
    heads: Heads, batch: int, rows: int, length: int, threads: int, name: str
) -> tuple[Callable[[], None], int]:
    """One layer's attention, of another layer each time, and the bytes that it reads."""
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    table, num_pages = table_of(batch, length, rows)
    layers = Layers(num_pages, heads, dtype, OUT_OF_CACHE_BYTES if rows == 1 else 1, name)
    backend = layers.backend(threads)
    backend.plan(table)
    q = torch.randn(batch * rows, heads.qo, heads.dim).to(dtype)
    out = torch.empty_like(q)
    return lambda: backend.run(layers.next(), q, out), layers.bytes


def alternated(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def compare(
    heads: Heads, batch: int, rows: int, length: int, threads: int, stream: float, rounds: int, vllm: VllmCpu
) -> Iterator[dict[str, object]]:
    case: dict[str, object] = {
        "case": "decode" if rows == 1 else "prefill", "heads": str(heads), "batch": batch, "rows": rows,
        "length": length,
    }  # fmt: skip
    made = {name: call_of(heads, batch, rows, length, threads, name) for name in FORMATS}
    times = alternated({name: call for name, (call, _) in made.items()}, rounds)
    for name, (_, num_bytes) in made.items():
        median = statistics.median(times[name])
        yield case | {
            "format": name, "us": median * 1e6,
            "times": statistics.median(b / t for b, t in zip(times["bf16"], times[name], strict=True)),
            "of_stream": num_bytes / median / 1e9 / stream,
        }  # fmt: skip
    for kv_dtype in ("auto", "fp8"):
        us = vllm.stored(heads, batch, rows, length, rounds if rows > 1 else 1, kv_dtype)
        if us is not None:
            times_faster = statistics.median(times["bf16"]) * 1e6 / us
            name = f"vLLM {'bf16' if kv_dtype == 'auto' else kv_dtype}"
            yield case | {"format": name, "us": us, "times": times_faster}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths = (4096,) if options.quick else (1024, 4096, 16384)
    stream = stream_rate(3)
    machine = {"isa": isa(), "threads": options.threads, "cpu": cpu_model(), "streaming read GB/s": stream}
    results = []
    vllm = VllmCpu(options.threads)
    if not options.json:
        print(line(machine), flush=True)
    cases = [(batch, 1, length) for batch in (1, 8) for length in lengths] + [(1, 512, 512), (1, 512, 4096 + 512)]
    for heads in GQA:
        for batch, rows, length in cases:
            rounds = 7 if options.quick or rows > 1 else 25
            for result in compare(heads, batch, rows, length, options.threads, stream, rounds, vllm):
                results.append(result)
                if not options.json:
                    print(line(result), flush=True)
    vllm.close()
    if options.json:
        json.dump({**machine, "results": results, "notes": vllm.notes}, sys.stdout, indent=1)
        print()
    else:
        print(*vllm.notes, sep="\n")


if __name__ == "__main__":
    main()
