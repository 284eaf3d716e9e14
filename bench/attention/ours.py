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

    def __init__(
        self,
        num_pages: int,
        heads: Heads | LayerShape,
        dtype: torch.dtype,
        minimum_bytes: int = 1,
        kv_format: str | None = None,
    ) -> None:
        shape = heads if isinstance(heads, LayerShape) else LayerShape(heads.qo, heads.kv, heads.dim)
        (format,) = layer_formats(kv_format, str(dtype).removeprefix("torch."), 1)
        self.bytes = num_pages * format.page_bytes(PAGE_SIZE, shape)
        count = -(-minimum_bytes // self.bytes)
        self.kv = KVPool([shape] * count, [format] * count, num_pages, PAGE_SIZE, torch.device("cpu")).layers
        self.dtype = dtype
        self.at = 0
        for layer in self.kv:
            fill(layer.k_pages, layer.k, layer.k_scales)
            fill(layer.v_pages, layer.v, layer.v_scales)

    def backend(self, threads: int, **options: Any) -> NativeAttention:
        return NativeAttention(self.kv, dtype=self.dtype, num_threads=threads, **options)

    def next(self) -> int:
        self.at = (self.at + 1) % len(self.kv)
        return self.at


def fill(pages: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Numbers from 0 to 1, or random codes with a scale that makes them about as large."""
    if scales is not None:
        pages.random_(0, 256)
        scales.fill_(1 / 1024)
    elif rows.dtype == torch.float8_e4m3fn:
        rows.copy_(torch.rand(rows.shape))
    else:
        rows.uniform_()


def isa() -> str:
    """The instruction set that the kernels use here for bf16."""
    return Layers(1, GQA[0], torch.bfloat16).backend(threads=1).isa
