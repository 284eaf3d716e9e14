"""Sequences, pools and a float64 oracle for the tests of attention."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
import torch

from radixkv import _core
from radixkv.attention import Options, PageTable
from radixkv.attention.fp8 import FP8, quantize
from radixkv.attention.native import NativeAttention
from radixkv.formats import fp8, layer_formats
from radixkv.pool import KVPool, LayerKV
from radixkv.shape import LayerShape

FORCED_ISA = os.environ.get("RADIXKV_ISA")
ISAS = [FORCED_ISA] if FORCED_ISA else list(_core.isas())


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """The oracle's small operations are many times faster on one thread of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads and their size."""

    qo: int = 6
    kv: int = 2
    dim: int = 64


PLAIN = Options()


class Tokens(NamedTuple):
    """q [n, qo, dim], k and v [n, kv, dim] of a whole sequence."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Request(NamedTuple):
    """The first `length` tokens of a sequence, of which the last `rows` are new."""

    sequence: Tokens
    length: int
    rows: int


def random_sequence(generator: torch.Generator, length: int, heads: Heads, dtype: torch.dtype) -> Tokens:
    def randn(n: int) -> torch.Tensor:
        return torch.randn(length, n, heads.dim, generator=generator).to(dtype)

    return Tokens(randn(heads.qo), randn(heads.kv), randn(heads.kv))


def dense(request: Request, options: Options = PLAIN, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """What the rows must be: [rows, qo, dim] in float64, from a dense matrix of scores."""
    sequence, length, rows = request
    q = sequence.q[length - rows : length].double()
    group = q.shape[1] // sequence.k.shape[1]
    k = sequence.k[:length].double().repeat_interleave(group, 1)
    v = sequence.v[:length].double().repeat_interleave(group, 1)
    scale = q.shape[2] ** -0.5 if options.sm_scale is None else options.sm_scale
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if options.logits_soft_cap > 0:
        scores = options.logits_soft_cap * torch.tanh(scores / options.logits_soft_cap)
    position = torch.arange(length - rows, length)[:, None]
    key = torch.arange(length)[None, :]
    hidden = key > position
    if options.window_left >= 0:
        hidden |= key < position - options.window_left
    if options.attention_chunk:
        hidden |= key < position // options.attention_chunk * options.attention_chunk
    scores.masked_fill_(hidden, -torch.inf)
    if sinks is None:
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    beside = torch.cat([scores, sinks.double()[:, None, None].expand(-1, rows, 1)], -1)
    return torch.einsum("hqk,khd->qhd", beside.softmax(-1)[..., :-1], v)


SCALES = (0.5, 0.0625)
"""k_scale and v_scale of pools in 8 bits."""


def as_stored(sequence: Tokens, scales: tuple[float, float] = SCALES) -> Tokens:
    """The sequence with K and V as 8 bits hold them, in float64."""
    k, v = (quantize(x, s).double() * s for x, s in zip(sequence[1:], scales, strict=True))
    return Tokens(sequence.q, k, v)


def fill_nan(cache: torch.Tensor, index: object = ...) -> None:
    """Sets the rows to NaN; torch indexes no 8-bit floats."""
    if cache.dtype == FP8:
        cache.view(torch.uint8)[index] = 0x7F  # type: ignore[index]
    else:
        cache[index] = torch.nan  # type: ignore[index]


@dataclass
class Pool:
    """One layer's caches, every slot NaN until it is written, and a backend over them."""

    heads: Heads = Heads()
    dtype: torch.dtype = torch.float32
    num_pages: int = 64
    page_size: int = 16
    num_threads: int = 1
    isa: str | None = None
    kv_dtype: torch.dtype | None = None
    scales: tuple[float, float] = SCALES  # if kv_dtype is FP8
    backend: NativeAttention = field(init=False)

    def __post_init__(self) -> None:
        layer = layer_kv(self.heads, self.dtype, self.num_pages, self.page_size, self.kv_dtype, self.scales)
        self.k, self.v = layer.k, layer.v
        self.backend = NativeAttention([layer], dtype=self.dtype, num_threads=self.num_threads, isa=self.isa)

    def load(self, requests: Sequence[Request], rng: np.random.Generator) -> PageTable:
        """Give every request random pages, write its cached tokens, leave NaN everywhere else; returns the table."""
        fill_nan(self.k)
        fill_nan(self.v)
        counts = [-(-r.length // self.page_size) for r in requests]
        pages = rng.permutation(self.num_pages)[: sum(counts)].astype(np.int32)
        kv_indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        slots = []
        for i, r in enumerate(requests):
            position = np.arange(r.length)
            mine = pages[kv_indptr[i] : kv_indptr[i + 1]]
            slot = mine[position // self.page_size] * self.page_size + position % self.page_size
            cached = r.length - r.rows
            page, offset = torch.from_numpy(slot[:cached] // self.page_size), torch.from_numpy(position[:cached])
            for cache, rows, scale in zip((self.k, self.v), r.sequence[1:], self.scales, strict=True):
                if self.kv_dtype == FP8:
                    cache, rows = cache.view(torch.uint8), quantize(rows, scale).view(torch.uint8)
                cache[page, offset % self.page_size] = rows[:cached]
            slots.append(slot[cached:])
        return PageTable(
            np.concatenate([[0], np.cumsum([r.rows for r in requests])]).astype(np.int32),
            kv_indptr,
            pages,
            np.array([(r.length - 1) % self.page_size + 1 for r in requests], dtype=np.int32),
            np.concatenate(slots).astype(np.int32),
        )

    def attend(
        self,
        requests: Sequence[Request],
        rng: np.random.Generator,
        options: Options = PLAIN,
        sinks: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Plan, append and run one step; returns each request's rows."""
        self.backend.plan(self.load(requests, rng))
        q, k, v = (
            packed([getattr(r.sequence, name)[r.length - r.rows : r.length] for r in requests]) for name in "qkv"
        )
        self.backend.append(0, k, v)
        out = torch.full(q.shape, torch.nan, dtype=self.dtype)
        self.backend.run(0, q, out, options, sinks)
        return list(out.split([r.rows for r in requests]))


def layer_kv(
    heads: Heads,
    dtype: torch.dtype,
    num_pages: int,
    page_size: int,
    kv_dtype: torch.dtype | None = None,
    scales: tuple[float, float] = SCALES,
    device: str | torch.device = "cpu",
) -> LayerKV:
    """One layer of a pool, stored as `dtype` or, if kv_dtype is FP8, in 8 bits with these scales."""
    kv_format = None if kv_dtype is None else fp8(*scales)
    formats = layer_formats(kv_format, str(dtype).removeprefix("torch."), 1)
    shape = LayerShape(heads.qo, heads.kv, heads.dim)
    return KVPool([shape], formats, num_pages, page_size, torch.device(device)).layers[0]


def packed(parts: list[torch.Tensor]) -> torch.Tensor:
    """The rows one after the other, laid out as [1, heads, rows, dim] transposed, the way a model hands them over."""
    return torch.cat(parts).transpose(0, 1).contiguous().transpose(0, 1)


def error(
    got: Sequence[torch.Tensor],
    requests: Sequence[Request],
    options: Options = PLAIN,
    sinks: torch.Tensor | None = None,
) -> float:
    """Largest absolute difference from the oracle; infinite if anything is NaN."""
    worst = 0.0
    for rows, request in zip(got, requests, strict=True):
        difference = (rows.double() - dense(request, options, sinks)).abs().max().item()
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst
