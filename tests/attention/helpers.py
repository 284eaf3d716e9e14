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
from radixkv.attention.native import NativeAttention
from radixkv.formats import LayerFormat, RowFormat, fp8, layer_formats
from radixkv.pool import KVPool, LayerKV
from radixkv.shape import LayerShape
from tests.attention import storing

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
    """Query heads, key heads and their size; that of a value, if it differs; if it is a part of its key, `latent`."""

    qo: int = 6
    kv: int = 2
    dim: int = 64
    latent: int = 0
    value: int = 0

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.qo, self.kv, self.dim, self.latent or self.value, latent=self.latent > 0)


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
    def randn(n: int, dim: int = heads.dim) -> torch.Tensor:
        return torch.randn(length, n, dim, generator=generator).to(dtype)

    q, k = randn(heads.qo), randn(heads.kv)
    return Tokens(q, k, k[..., : heads.latent] if heads.latent else randn(heads.kv, heads.shape.v_dim))


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
"""k_scale and v_scale of pools in fp8."""

FORMATS: dict[str, str | LayerFormat | None] = {
    "": None,
    "fp8": fp8(*SCALES),
    "fp8_rotated": fp8(*SCALES, rotated=True),
    "int8": "int8",
    "k8v4": "k8v4",
    "int4": "int4",
    "mixed": LayerFormat(RowFormat("int8"), RowFormat("float8_e4m3fn", SCALES[1])),  # products of fp32
}
each_format = pytest.mark.parametrize("kv_format", FORMATS.values(), ids=FORMATS.keys())
each_quantized = pytest.mark.parametrize("kv_format", list(FORMATS.values())[1:], ids=list(FORMATS)[1:])


def as_stored(sequence: Tokens, layer: LayerKV) -> Tokens:
    """The sequence with K and V as the layer holds them, in float64."""
    k, v = storing.as_stored(sequence.k, layer.format.k), storing.as_stored(sequence.v, layer.format.v)
    return Tokens(sequence.q, k, v)


def takes(kv_format: str | LayerFormat | None, heads: Heads) -> bool:
    """Whether the format has rows of this size."""
    if heads.latent:
        return kv_format is None
    return (heads.dim % 16 == 0 and heads.shape.v_dim % 16 == 0) or kv_format not in ("k8v4", "int4")


def garble(layer: LayerKV) -> None:
    """Makes the pages garbage: bytes of ones are NaN as a float of any size, and as the scale of a row of codes."""
    layer.k_pages.fill_(0xFF)
    layer.v_pages.fill_(0xFF)


def put(layer: LayerKV, pages: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Writes rows as the reference stores them."""
    for rows, cache, scales, stored in (
        (k, layer.k, layer.k_scales, layer.format.k),
        (v, layer.v, layer.v_scales, layer.format.v),
    ):
        codes, row_scales = storing.store(rows, stored)
        cache.view(as_bytes(cache))[pages, slots] = codes.view(as_bytes(cache))
        if scales is not None:
            assert row_scales is not None
            scales[pages, slots] = row_scales


def as_bytes(cache: torch.Tensor) -> torch.dtype:
    """torch indexes no 8-bit floats."""
    return torch.uint8 if cache.dtype.itemsize == 1 else cache.dtype


@dataclass
class Pool:
    """One layer's caches, every slot NaN until it is written, and a backend over them."""

    heads: Heads = Heads()
    dtype: torch.dtype = torch.float32
    num_pages: int = 64
    page_size: int = 16
    num_threads: int = 1
    isa: str | None = None
    kv_format: str | LayerFormat | None = None
    backend: NativeAttention = field(init=False)

    def __post_init__(self) -> None:
        self.layer = layer_of(self.heads, self.dtype, self.num_pages, self.page_size, self.kv_format)
        self.k, self.v = self.layer.k, self.layer.v
        self.backend = NativeAttention([self.layer], dtype=self.dtype, num_threads=self.num_threads, isa=self.isa)

    def load(self, requests: Sequence[Request], rng: np.random.Generator) -> PageTable:
        """Give every request random pages, write its cached tokens, leave NaN everywhere else; returns the table."""
        garble(self.layer)
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
            put(self.layer, page, offset % self.page_size, r.sequence.k[:cached], r.sequence.v[:cached])
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
        if self.heads.latent:
            v = k[..., : self.heads.latent]
        self.backend.append(0, k, v)
        out = torch.full((*q.shape[:2], v.shape[2]), torch.nan, dtype=self.dtype)
        self.backend.run(0, q, out, options, sinks)
        return list(out.split([r.rows for r in requests]))

    def store(self, rows: torch.Tensor) -> list[tuple[RowFormat, torch.Tensor, torch.Tensor | None]]:
        """Append rows [n, kv, dim] as K and as V; for each, its format, bytes [n, kv, ...] and scales [n, kv]."""
        table = self.load([Request(Tokens(rows, rows, rows), len(rows), len(rows))], np.random.default_rng(0))
        self.backend.plan(table)
        self.backend.append(0, rows, rows)
        page, slot = table.slots // self.page_size, table.slots % self.page_size
        k, v = self.layer.format.k, self.layer.format.v
        return [
            (stored, cache.view(torch.uint8)[page, slot], None if scales is None else scales[page, slot])
            for stored, cache, scales in ((k, self.k, self.layer.k_scales), (v, self.v, self.layer.v_scales))
        ]


def layer_of(
    heads: Heads,
    dtype: torch.dtype,
    num_pages: int,
    page_size: int,
    kv_format: str | LayerFormat | None = None,
    device: str | torch.device = "cpu",
) -> LayerKV:
    """One layer of a pool."""
    formats = layer_formats(kv_format, str(dtype).removeprefix("torch."), 1)
    return KVPool([heads.shape], formats, num_pages, page_size, torch.device(device)).layers[0]


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
