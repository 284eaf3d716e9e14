"""vLLM's paged attention for CPUs, which bench.attention.speed puts beside ours.

    python -m bench.attention.vllm [--threads N] [CASE ...]

Runs in the venv of bench.end_to_end.setup. Takes cases (cases.Case as JSON) as arguments or one a line, and
answers each with a line: {"us": median, ...} or {"error": why}. The first line says which vLLM this is.

Called as vLLM's own backend does (vllm/v1/attention/backends/cpu_attn.py): its choice of instructions, its cache
layout, written by its own operation. The clock sees cpu_attention_with_kv_cache alone: the scheduler's metadata is made
before, as our plan is. Blocks lie scattered in as many layers as ours, in huge pages.
"""

from __future__ import annotations

import os

os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}

import argparse
import ctypes
import itertools
import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
import vllm
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from bench.attention.cases import OUT_OF_CACHE_BYTES, Case, decode_rounds, median_seconds

HUGE = 2 << 20
MADV_HUGEPAGE = 14
TOLERANCE = 0.05


def prefer_huge_pages(tensor: torch.Tensor) -> None:
    """What our pool asks for, before the memory is touched."""
    begin = -(-tensor.data_ptr() // HUGE) * HUGE
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE * HUGE
    if begin < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_HUGEPAGE)


def layers_of(case: Case, blocks: int, dtype: torch.dtype) -> torch.Tensor:
    """[layers, 2 (K, V), blocks, kv heads, tokens, head_dim]. A decode's layers do not fit into cache."""
    shape = (blocks, case.heads.kv, case.block, 2 * case.heads.dim)
    size = blocks * case.heads.kv * case.block * 2 * case.heads.dim * dtype.itemsize
    count = max(1, -(-OUT_OF_CACHE_BYTES // size)) if case.rows == 1 else 1
    caches = torch.empty((count, *shape), dtype=dtype)
    prefer_huge_pages(caches)
    return caches.view(count, blocks, case.heads.kv, 2, case.block, case.heads.dim).movedim(3, 1)


def difference(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> float:
    """From SDPA, over at most 64 rows of each request; beyond 1 it is too large."""
    heads, at = case.heads, torch.linspace(0, case.rows - 1, min(case.rows, 64)).long()
    group = heads.qo // heads.kv

    def some(rows: torch.Tensor) -> torch.Tensor:
        """[batch, kv heads, group * rows, head_dim]"""
        rows = rows.view(case.batch, case.rows, heads.kv, group, heads.dim)[:, at]
        return rows.permute(0, 2, 3, 1, 4).reshape(case.batch, heads.kv, -1, heads.dim)

    k, v = (x.view(case.batch, case.length, heads.kv, heads.dim).transpose(1, 2) for x in (k, v))
    mask = torch.arange(case.length) <= case.length - case.rows + at[:, None]
    expected = F.scaled_dot_product_attention(some(q), k, v, attn_mask=mask.repeat(group, 1))
    most = TOLERANCE * min(1.0, expected.abs().max().item())  # long contexts average to small numbers
    return (some(out) - expected).abs().max().item() / most


def measure(case: Case) -> dict[str, Any]:
    heads, dtype = case.heads, getattr(torch, case.dtype)
    isa = _get_attn_isa(dtype, case.block, heads.dim, case.kv_dtype)
    each = -(-case.length // case.block)
    blocks = case.batch * each
    table = torch.randperm(blocks).to(torch.int32).view(case.batch, each)
    position = torch.arange(case.length)
    slots = table.long()[:, position // case.block] * case.block + position % case.block
    layers = layers_of(case, blocks, torch.uint8 if case.kv_dtype == "fp8" else dtype)
    k, v = (torch.randn(case.batch * case.length, heads.kv, heads.dim).to(dtype) for _ in range(2))
    ops.cpu_attn_reshape_and_cache(k, v, *layers[0], slots.flatten(), isa, kv_cache_dtype=case.kv_dtype)
    layers[1:] = layers[0]
    q = torch.randn(case.batch * case.rows, heads.qo, heads.dim).to(dtype)
    out = torch.empty_like(q)
    starts = torch.arange(0, case.batch * case.rows + 1, case.rows, dtype=torch.int32)
    lengths = torch.full((case.batch,), case.length, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=case.batch, num_heads=heads.qo, num_kv_heads=heads.kv, head_dim=heads.dim, seq_lens=lengths,
        dtype=dtype, query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV, kv_cache_dtype=case.kv_dtype,
    )  # fmt: skip
    rotation = itertools.cycle([(layer[0], layer[1]) for layer in layers])

    def attend() -> None:
        k_cache, v_cache = next(rotation)
        ops.cpu_attention_with_kv_cache(
            query=q, key_cache=k_cache, value_cache=v_cache, output=out, query_start_loc=starts,
            seq_lens=lengths, scale=heads.dim**-0.5, causal=True, alibi_slopes=None, sliding_window=-1,
            block_table=table, softcap=0, scheduler_metadata=plan, s_aux=None, kv_cache_dtype=case.kv_dtype,
        )  # fmt: skip

    seconds = median_seconds(attend, decode_rounds(case.repeats, len(layers)) if case.rows == 1 else case.repeats)
    apart = difference(case, q, k, v, out)
    if not apart < 1:
        raise RuntimeError(f"differs from SDPA by {apart * 100:.0f} % of what is tolerated")
    return {"us": seconds * 1e6, "isa": isa, "block": case.block, "difference": apart * TOLERANCE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(json.dumps({"version": vllm.__version__}), flush=True)
    for line in options.cases or sys.stdin:
        try:
            found = measure(Case.from_json(line))
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
