"""The native attention and caches for it that have left the CPU's caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.attention.cases import GQA, Heads
from bench.common.page_tables import PAGE_SIZE
from radixkv import _core
from radixkv.attention.native import NativeAttention


def backend_for(
    heads: Heads, num_pages: int, threads: int, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> NativeAttention:
    return NativeAttention(
        num_qo_heads=heads.qo,
        num_kv_heads=heads.kv,
        head_dim=heads.dim,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        dtype=dtype,
        num_threads=threads,
        **options,
    )


def isa() -> str:
    """The instruction set that the kernels use here for bf16."""
    return backend_for(GQA[0], num_pages=1, threads=1).isa


class Layers:
    """So many layers of caches that going round them always reads memory that has left the cache."""

    def __init__(self, num_pages: int, heads: Heads, dtype: torch.dtype, minimum_bytes: int) -> None:
        shape = (num_pages, PAGE_SIZE, heads.kv, heads.dim)
        self.bytes = 2 * int(np.prod(shape)) * dtype.itemsize
        count = max(1, -(-minimum_bytes // self.bytes))
        pool = torch.empty((count, 2, *shape), dtype=dtype)
        _core.prefer_huge_pages(pool.data_ptr(), pool.nbytes)  # as the engine's pool does
        pool.view(torch.int16).random_(0x3C00, 0x3F80)  # positive bf16 numbers below 1
        self.k, self.v = pool[:, 0], pool[:, 1]
        self.at = 0

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.at = (self.at + 1) % len(self.k)
        return self.k[self.at], self.v[self.at]
