"""The native attention and pools for it that have left the CPU's caches."""

from __future__ import annotations

from typing import Any

import torch

from bench.attention.cases import GQA, Heads
from bench.common.page_tables import PAGE_SIZE
from radixkv.attention.native import NativeAttention
from radixkv.formats import layer_formats
from radixkv.pool import KVPool
from radixkv.shape import LayerShape


class Layers:
    """So many layers of one pool that going round them always reads memory that has left the cache."""

    def __init__(self, num_pages: int, heads: Heads, dtype: torch.dtype, minimum_bytes: int = 1) -> None:
        shape = LayerShape(heads.qo, heads.kv, heads.dim)
        (format,) = layer_formats(None, str(dtype).removeprefix("torch."), 1)
        self.bytes = num_pages * format.page_bytes(PAGE_SIZE, shape)
        count = -(-minimum_bytes // self.bytes)
        self.kv = KVPool([shape] * count, [format] * count, num_pages, PAGE_SIZE, torch.device("cpu")).layers
        self.dtype = dtype
        self.at = 0
        for layer in self.kv:
            layer.k.uniform_()
            layer.v.uniform_()

    def backend(self, threads: int, **options: Any) -> NativeAttention:
        return NativeAttention(self.kv, dtype=self.dtype, num_threads=threads, **options)

    def next(self) -> int:
        self.at = (self.at + 1) % len(self.kv)
        return self.at


def isa() -> str:
    """The instruction set that the kernels use here for bf16."""
    return Layers(1, GQA[0], torch.bfloat16).backend(threads=1).isa
