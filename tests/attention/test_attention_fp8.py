"""K and V in 8 bits on the native backend: against the oracle over what is stored, and what append stores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from radixkv import _core
from radixkv.attention import PageTable
from radixkv.attention.fp8 import FP8, quantize
from radixkv.attention.native import NativeAttention
from radixkv.errors import BackendUnavailable, InvalidArgument
from radixkv.formats import LayerFormat, RowFormat, fp8, layer_formats
from tests.attention.helpers import (
    PLAIN,
    SCALES,
    Heads,
    Options,
    Pool,
    Request,
    Tokens,
    as_stored,
    error,
    layer_kv,
    random_sequence,
)
from tests.attention.helpers import one_torch_thread as one_torch_thread
from tests.attention.test_attention import TOLERANCE, each_dtype, each_isa

pytestmark = pytest.mark.usefixtures("one_torch_thread")
FINE_K = (64.0, 0.125)  # most of K is subnormal


def check(
    pool: Pool, lengths: list[tuple[int, int]], options: Options = PLAIN, slack: float = 1.0, seed: int = 0
) -> None:
    """The oracle sees what 8 bits hold, so the tolerance is that of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [random_sequence(generator, n, pool.heads, pool.dtype) for n, _ in lengths]
    requests = [Request(s, n, rows) for s, (n, rows) in zip(sequences, lengths, strict=True)]
    got = pool.attend(requests, np.random.default_rng(seed), options)
    stored = [Request(as_stored(r.sequence, pool.scales), r.length, r.rows) for r in requests]
    assert error(got, stored, options) <= TOLERANCE[pool.dtype] * slack


@each_isa
@each_dtype
@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
def test_mixed_batch(isa: str, dtype: torch.dtype, page_size: int) -> None:
    pool = Pool(
        dtype=dtype, page_size=page_size, num_pages=2600 // page_size + 30, isa=isa, num_threads=2, kv_dtype=FP8
    )
    edges = [1, 2, 15, 17, 63, 64, 65, 129, 513]
    check(pool, [(n, 1) for n in edges] + [(n, n) for n in edges] + [(64, 3), (130, 66), (300, 37)])


@each_isa
@each_dtype
def test_options(isa: str, dtype: torch.dtype) -> None:
    for scales in (SCALES, FINE_K):
        pool = Pool(dtype=dtype, isa=isa, num_pages=128, num_threads=2, kv_dtype=FP8, scales=scales)
        for options in (Options(window_left=0), Options(window_left=65), Options(logits_soft_cap=3.0)):
            check(pool, [(180, 180), (640, 1), (65, 3)], options)
        check(pool, [(100, 30), (70, 1)], Options(-0.2, 20, 3.0), slack=2.0)


@each_isa
@each_dtype
def test_every_head_dim(isa: str, dtype: torch.dtype) -> None:
    for dim in range(8, 257, 8):
        pool = Pool(heads=Heads(3, 1, dim), dtype=dtype, isa=isa, kv_dtype=FP8, scales=FINE_K)
        check(pool, [(81, 20), (67, 1)], slack=2.0, seed=dim)  # fp32 sums of 256 products


@each_isa
@each_dtype
def test_every_number_is_read_exactly(isa: str, dtype: torch.dtype) -> None:
    """A row that sees one key returns its value times v_scale, NaN included."""
    stored = torch.arange(256, dtype=torch.uint8).view(FP8)
    for scale in (1.0, 0.25):
        pool = Pool(Heads(1, 1, 256), dtype, num_pages=1, page_size=1, isa=isa, kv_dtype=FP8, scales=(1.0, scale))
        zero, out = torch.zeros(1, 1, 256, dtype=dtype), torch.empty(1, 1, 256, dtype=dtype)
        pool.load([Request(Tokens(zero, zero, zero), 1, 1)], np.random.default_rng(0))
        pool.backend.plan(one_row())
        pool.k.zero_()
        pool.v.copy_(stored)
        pool.backend.run(0, zero, out)
        want = (stored.float() * scale).to(dtype)
        assert torch.equal(out.flatten().isnan(), want.isnan())
        assert int(want.isnan().sum()) == 2
        assert torch.equal(out.flatten().nan_to_num(), want.nan_to_num())


@each_isa
def test_every_key_is_read_exactly(isa: str) -> None:
    """Against a key of zeros, a query of a single one weighs a key by one of its numbers."""
    for dtype in (torch.float32, torch.bfloat16):
        bits = torch.arange(256, dtype=torch.uint8)
        bits = bits[bits.view(FP8).float().abs() <= 8]  # else the weights saturate
        pool = Pool(Heads(1, 1, 8), dtype, num_pages=2, page_size=1, isa=isa, kv_dtype=FP8, scales=(1.0, 1.0))
        table = PageTable(*(np.array(a, dtype=np.int32) for a in ([0, 1], [0, 2], [0, 1], [1], [1])))
        pool.backend.plan(table)
        pool.v.view(torch.uint8).zero_()
        pool.v[1].fill_(1.0)
        for at, number in enumerate(bits.view(FP8).float().tolist()):
            pool.k.view(torch.uint8).zero_()
            pool.k.view(torch.uint8)[1, 0, 0, at % 8] = bits[at]
            q, out = torch.zeros(1, 1, 8, dtype=dtype), torch.empty(1, 1, 8, dtype=dtype)
            q[..., at % 8] = 1.0
            pool.backend.run(0, q, out, Options(sm_scale=1.0))
            want = torch.tensor(number, dtype=torch.float64).sigmoid()
            assert (out.double() - want).abs().max() <= TOLERANCE[dtype], number


def one_row() -> PageTable:
    return PageTable(*(np.array(a, dtype=np.int32) for a in ([0, 1], [0, 1], [0], [1], [0])))


def numbers_of(dtype: torch.dtype) -> torch.Tensor:
    """Every number of a 16-bit dtype; of float32 random bits, and numbers around every tie of e4m3."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (2**15,), generator=generator).to(torch.int32)
    exact = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    ties = (exact[1:] + exact[:-1]) / 2
    near = torch.cat([x.nextafter(torch.tensor(to)) for x in (exact, ties) for to in (-torch.inf, torch.inf)])
    some = torch.cat([bits.view(dtype), exact, ties, near, torch.tensor([torch.inf, torch.nan, 448.0, 464.0, 480.0])])
    return torch.cat([some, -some])


@each_isa
@each_dtype
def test_append_stores_what_quantize_says(isa: str, dtype: torch.dtype) -> None:
    """Clamped, rounded to nearest even; NaN stays NaN, infinity and what is too large become the largest."""
    heads = Heads(1, 1, 64)
    numbers = numbers_of(dtype)
    rows = torch.cat([numbers, numbers.new_zeros(-len(numbers) % 64)]).view(-1, 1, 64)
    for k_scale, v_scale in ((1.0, 0.037), (3.0, 2.0**-130)):
        pool = Pool(
            heads, dtype, num_pages=len(rows) // 16 + 1, isa=isa, num_threads=2, kv_dtype=FP8, scales=(k_scale, v_scale)
        )
        table = pool.load([Request(Tokens(rows, rows, rows), len(rows), len(rows))], np.random.default_rng(0))
        pool.backend.plan(table)
        pool.backend.append(0, rows, rows)
        page, slot = table.slots // 16, table.slots % 16
        for cache, scale in ((pool.k, k_scale), (pool.v, v_scale)):
            want = quantize(rows, scale).view(torch.uint8)
            got = cache.view(torch.uint8)[page, slot]
            assert torch.equal(got & 0x7F, want & 0x7F)
            number = ~rows.isnan()
            assert torch.equal(got[number], want[number])
        assert int((pool.k.float().abs() == 448).sum()) > 100


@pytest.mark.parametrize(
    ("kv_format", "kind", "message"),
    [
        (
            lambda: LayerFormat(RowFormat("float16"), RowFormat("float16")),
            BackendUnavailable,
            "kv_format stores K as float16 and V as float16: use bfloat16, .*e4m3fn",
        ),
        (lambda: LayerFormat(RowFormat("bfloat16"), RowFormat("float8_e4m3fn")), BackendUnavailable, "for both"),
        (lambda: RowFormat("float8_e5m2"), InvalidArgument, "a row of 'float8_e5m2': rows are stored as float32"),
        (lambda: fp8(k_scale=0.0), InvalidArgument, "scale is 0.0: use a positive finite factor"),
        (lambda: fp8(v_scale=float("inf")), InvalidArgument, "scale is inf"),
        (lambda: RowFormat("bfloat16", 0.5), InvalidArgument, "scale is 0.5: only float8_e4m3fn is stored with one"),
        (lambda: "int3", InvalidArgument, "kv_format is 'int3': use None, 'fp8' or a LayerFormat"),
        (lambda: [None], InvalidArgument, "kv_format has 1 formats for 2 layers"),
    ],
)
def test_formats_that_are_refused(kv_format: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        layer_formats(kv_format(), "bfloat16", 2)


def test_tensors_that_are_refused() -> None:
    layer = layer_kv(Heads(1, 1, 64), torch.bfloat16, 1, 1, FP8)
    backend = NativeAttention([layer], dtype=torch.bfloat16)
    with pytest.raises(InvalidArgument, match="dtype is torch.float8_e4m3fn"):
        NativeAttention([layer], dtype=FP8)
    with pytest.raises(InvalidArgument, match="dtype is float8_e4m3fn: q, k, v and out are"):
        _core.AttentionPlan([layer.core], "float8_e4m3fn", 1, 1, 1)
    with pytest.raises(InvalidArgument, match="stored neither in the dtype of k and v nor as float8_e4m3fn"):
        NativeAttention([layer_kv(Heads(1, 1, 64), torch.bfloat16, 1, 1)], dtype=torch.float16)
    backend.plan(one_row())
    row = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(InvalidArgument, match="v is torch.float8_e4m3fn: convert it to torch.bfloat16"):
        backend.append(0, row, row.to(FP8))
    with pytest.raises(InvalidArgument, match="q is torch.float8_e4m3fn: convert it to torch.bfloat16"):
        backend.run(0, row.to(FP8), row)
