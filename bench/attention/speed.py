"""Speed of the native attention: decode against memory bandwidth, prefill against torch's SDPA.

    python -m bench.attention.speed [--threads N] [--quick] [--json]

Decode reads every key and value once, so its yardstick is a plain streaming read of as many bytes by as many threads,
out of cache; beside it stands what one would write without paged kernels: gather the pages, then SDPA. Prefill is
measured against SDPA on contiguous K and V, which needs no gather. Both stand beside vLLM's paged attention for CPUs
where it is installed (make e2e-venv): each case is measured there right after ours. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from bench.attention.cases import GQA, OUT_OF_CACHE_BYTES, Heads, decode_rounds, median_seconds
from bench.attention.ours import Layers, isa
from bench.attention.peer import NAME as VLLM
from bench.attention.peer import VllmCpu
from bench.common.machine import cpu_model
from bench.common.page_tables import table_of
from bench.common.table import OURS, Row, beside, beside_all, line, rows_of


def stream_rate(repeats: int) -> float:
    """GB/s of the fastest plain reduction over memory out of cache, with torch's threads."""
    data = torch.ones(OUT_OF_CACHE_BYTES // 4)
    reductions: list[Callable[[], object]] = [data.sum, data.amax, lambda: torch.dot(data, data)]
    return OUT_OF_CACHE_BYTES / min(median_seconds(r, repeats) for r in reductions) / 1e9


def gather(cache: torch.Tensor, pages: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """[batch, kv_heads, length, head_dim], the way SDPA wants it."""
    rows = cache.index_select(0, pages).reshape(batch, -1, cache.shape[2], cache.shape[3])
    return rows[:, :length].transpose(1, 2)


def decode(heads: Heads, batch: int, context: int, threads: int, stream: float, repeats: int) -> dict[str, object]:
    dtype = torch.bfloat16
    table, num_pages = table_of(batch, context)
    layers = Layers(num_pages, heads, dtype, OUT_OF_CACHE_BYTES)
    backend = layers.backend(threads)
    backend.plan(table)
    q = torch.randn(batch, heads.qo, heads.dim).to(dtype)
    out = torch.empty_like(q)
    pages = torch.from_numpy(table.kv_indices)

    def ours() -> None:
        backend.run(layers.next(), q, out)

    # One query row per head, so the group of a kv head can stand where SDPA has its rows: K and V are read once.
    q_sdpa = q.view(batch, heads.kv, heads.qo // heads.kv, heads.dim)

    def gather_and_sdpa() -> torch.Tensor:
        kv = layers.kv[layers.next()]
        k, v = (gather(cache, pages, batch, context) for cache in (kv.k, kv.v))
        return F.scaled_dot_product_attention(q_sdpa, k, v)

    rounds = decode_rounds(repeats, len(layers.kv))
    layers.at = 0
    ours()
    got = out.clone()
    layers.at = 0
    difference = (got - gather_and_sdpa().reshape(out.shape)).abs().max().item()
    assert difference < 0.05, f"differs from SDPA by {difference}"
    seconds = median_seconds(ours, rounds)
    peer = median_seconds(gather_and_sdpa, max(3, repeats))
    rate = layers.bytes / seconds / 1e9
    return {
        "case": "decode", "heads": str(heads), "batch": batch, "context": context, "us": seconds * 1e6,
        "GB/s": rate, "of_stream": rate / stream, "gather+sdpa_us": peer * 1e6, "speedup": peer / seconds,
    }  # fmt: skip


def prefill(heads: Heads, rows: int, cached: int, dtype: torch.dtype, threads: int, repeats: int) -> dict[str, object]:
    length = cached + rows
    table, num_pages = table_of(1, length, rows)
    layers = Layers(num_pages, heads, dtype)
    kv = layers.kv[0]
    backend = layers.backend(threads)
    backend.plan(table)
    q = torch.randn(rows, heads.qo, heads.dim).to(dtype)
    out = torch.empty_like(q)
    q_sdpa = q.transpose(0, 1)[None].contiguous()
    group = heads.qo // heads.kv
    pages = torch.from_numpy(table.kv_indices)
    k, v = (gather(c, pages, 1, length).repeat_interleave(group, 1).contiguous() for c in (kv.k, kv.v))
    mask = None if cached == 0 else torch.ones(rows, length, dtype=torch.bool).tril(cached)

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(q_sdpa, k, v, attn_mask=mask, is_causal=mask is None)

    seconds = median_seconds(lambda: backend.run(0, q, out), repeats)
    peer = median_seconds(sdpa, repeats)
    difference = (out - sdpa()[0].transpose(0, 1)).abs().max().item()
    assert difference < 0.05, f"differs from SDPA by {difference}"
    operations = 4 * heads.qo * heads.dim * (rows * cached + rows * (rows + 1) // 2)
    return {
        "case": "prefill", "heads": str(heads), "dtype": str(dtype).removeprefix("torch."), "rows": rows,
        "cached": cached, "ms": seconds * 1e3, "GFLOP/s": operations / seconds / 1e9, "sdpa_ms": peer * 1e3,
        "speedup": peer / seconds,
    }  # fmt: skip


def rows(results: list[dict[str, Any]]) -> Iterator[Row]:
    """Decode against the streaming read and the faster of gather + SDPA and vLLM-CPU; prefill against SDPA."""
    for r in results:
        if r["case"] == "decode":
            name = f"decode {r['heads']}, {r['batch']} x {r['context']}"
            floor = r["us"] * r["of_stream"]
            peers = {"gather + SDPA": r["gather+sdpa_us"]} | ({VLLM: r["vllm_us"]} if "vllm_us" in r else {})
            figures = {OURS: r["us"], "streaming read": floor, **peers}
            yield Row(name, "us", figures, r["of_stream"], ">= 0.8 of stream", r["of_stream"] >= 0.8)
            yield beside_all(f"{name}, of peers", "us", r["us"], peers, 1)
        else:
            name = f"prefill {r['heads']} {r['dtype']}, {r['rows']} on {r['cached']}"
            row = beside(name, "ms", r["ms"], "SDPA, contiguous", r["sdpa_ms"], 1, " of SDPA")
            yield replace(row, figures=row.figures | ({VLLM: r["vllm_ms"]} if "vllm_ms" in r else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    repeats = 3 if options.quick else 9
    contexts = (1024, 4096) if options.quick else (1024, 4096, 16384)
    extents = ((512, 0), (512, 4096)) if options.quick else ((512, 0), (2048, 0), (512, 4096), (2048, 4096))
    dtypes = (torch.bfloat16,) if options.quick else (torch.bfloat16, torch.float32)
    vllm = VllmCpu(options.threads)
    stream = stream_rate(repeats)
    machine = {"isa": isa(), "threads": options.threads, "cpu": cpu_model()}
    results: list[dict[str, object]] = []

    def record(result: dict[str, object]) -> None:
        results.append(result)
        if not options.json:
            print(line(result), flush=True)

    if not options.json:
        print(line({**machine, "streaming read GB/s": stream}), flush=True)
    for heads in GQA:
        for batch in (1, 8):
            for context in contexts:
                ours = decode(heads, batch, context, options.threads, stream, repeats)
                record(ours | vllm.decode(heads, batch, context, repeats))
    for dtype in dtypes:
        for heads in GQA:
            for extent in extents:
                ours = prefill(heads, *extent, dtype, options.threads, max(3, repeats // 2))
                record(ours | vllm.prefill(heads, *extent, dtype, max(3, repeats // 2)))
    vllm.close()
    if options.json:
        found = {**machine, "stream_GB/s": stream, "results": results, "notes": vllm.notes}
        json.dump(found | rows_of(rows(results)), sys.stdout, indent=1)
        print()
    else:
        print(*vllm.notes, sep="\n")


if __name__ == "__main__":
    main()
