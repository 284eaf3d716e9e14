"""Latent attention: decode over one row a token against decode over K and V of every head, of the same model.

    python -m bench.attention.latent [--threads N] [--quick] [--json]

One layer's attention in bf16, one new row for each request. "latent" is all that radixkv.hf.latent makes a layer do
between its projections: queries times the key half of kv_b_proj, attention over 576 numbers a token, outputs times the
value half. "expanded" is attention over the K and V of all heads. The two run alternately in either order, out of
cache; times are medians, the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch

from bench.attention.cascade import pairs
from bench.attention.cases import OUT_OF_CACHE_BYTES
from bench.attention.ours import Layers, isa
from bench.common.machine import cpu_model
from bench.common.page_tables import table_of
from bench.common.table import line
from radixkv.attention import Options
from radixkv.formats import FORMATS
from radixkv.hf.absorbed import head_values, latent_queries
from radixkv.shape import LayerShape

MODELS = {"DeepSeek-V2-Lite": 16, "DeepSeek-V3": 128}
"""Query heads; all else is the same in both."""

RANK, NOPE, ROPE, VALUE = 512, 128, 64, 128
OPTIONS = Options((NOPE + ROPE) ** -0.5)
BF16 = torch.bfloat16


def measure(name: str, batch: int, length: int, threads: int, repeats: int) -> dict[str, Any]:
    heads = MODELS[name]
    table, num_pages = table_of(batch, length)
    shapes = LayerShape(heads, 1, RANK + ROPE, RANK, latent=True), LayerShape(heads, heads, NOPE + ROPE, VALUE)
    rows, expanded = (Layers(num_pages, shape, BF16, OUT_OF_CACHE_BYTES) for shape in shapes)
    backends = rows.backend(threads), expanded.backend(threads)
    for backend in backends:
        backend.plan(table)
    weight = torch.randn(heads * (NOPE + VALUE), RANK).to(BF16)
    module = SimpleNamespace(
        qk_nope_head_dim=NOPE, v_head_dim=VALUE, kv_b_proj=SimpleNamespace(weight=weight)
    )  # what the products read of an attention module
    q = torch.randn(batch, heads, NOPE + ROPE).to(BF16)
    outs = [torch.empty(batch, heads, shape.v_dim, dtype=BF16) for shape in shapes]

    def attend_latent() -> None:
        backends[0].run(rows.next(), latent_queries(module, q), outs[0], OPTIONS)
        head_values(module, outs[0])

    def attend_expanded() -> None:
        backends[1].run(expanded.next(), q, outs[1], OPTIONS)

    latent_s, expanded_s, ratio = pairs(attend_latent, attend_expanded, repeats)
    queries_s, values_s, _ = pairs(lambda: latent_queries(module, q), lambda: head_values(module, outs[0]), repeats)
    each, all_heads = (FORMATS["bf16"].token_bytes(shape) for shape in shapes)
    return {
        "model": name, "heads": heads, "batch": batch, "length": length,
        "bytes_a_token": each, "bytes_a_token_expanded": all_heads,
        "us": latent_s * 1e6, "of_it_products_us": (queries_s + values_s) * 1e6, "us_expanded": expanded_s * 1e6,
        "speedup": ratio, "fewer_bytes": all_heads / each,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and only the smaller model")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine = {"isa": isa(), "threads": options.threads, "cpu": cpu_model()}
    results: list[dict[str, Any]] = []
    if not options.json:
        print(line(machine), flush=True)
    for name in list(MODELS)[: 1 if options.quick else None]:
        for batch, length in ((1, 4096), (1, 16384), (4, 4096)):
            results.append(measure(name, batch, length, options.threads, 5 if options.quick else 21))
            if not options.json:
                print(line(results[-1]), flush=True)
    if options.json:
        json.dump({**machine, "results": results}, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
