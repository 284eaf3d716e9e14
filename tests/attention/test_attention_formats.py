"""K and V in 8 and 4 bits on the native backend: against the oracle over what is stored, and what append stores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from radixkv import _core
from radixkv.attention import PageTable
from radixkv.attention.fp8 import FP8
from radixkv.attention.native import NativeAttention
from radixkv.errors import BackendUnavailable, InvalidArgument
from radixkv.formats import LayerFormat, RowFormat, fp8, layer_formats
from tests.attention import storing
from tests.attention.helpers import (
    PLAIN,
    Heads,
    Options,
    Pool,
    Request,
    Tokens,
    as_stored,
    each_quantized,
    error,
    layer_of,
    random_sequence,
    takes,
)
from tests.attention.helpers import one_torch_thread as one_torch_thread
from tests.attention.test_attention import TOLERANCE, each_dtype, each_isa

pytestmark = pytest.mark.usefixtures("one_torch_thread")
INTEGERS = 1e-4  # queries and weights of 16 bits
FINE_K = (64.0, 0.125)  # most of K is subnormal


def check(
    pool: Pool, lengths: list[tuple[int, int]], options: Options = PLAIN, slack: float = 1.0, seed: int = 0
) -> None:
    """The oracle sees what is stored, so the tolerance is that of the dtype, or of products in integers."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [random_sequence(generator, n, pool.heads, pool.dtype) for n, _ in lengths]
    requests = [Request(s, n, rows) for s, (n, rows) in zip(sequences, lengths, strict=True)]
    got = pool.attend(requests, np.random.default_rng(seed), options)
    stored = [Request(as_stored(r.sequence, pool.layer), r.length, r.rows) for r in requests]
    integers = pool.layer.k_scales is not None and pool.layer.v_scales is not None
    assert error(got, stored, options) <= max(TOLERANCE[pool.dtype], INTEGERS if integers else 0.0) * slack


@each_isa
@each_dtype
@each_quantized
@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
def test_mixed_batch(isa: str, dtype: torch.dtype, kv_format: str | LayerFormat, page_size: int) -> None:
    num_pages = 2600 // page_size + 30
    pool = Pool(dtype=dtype, page_size=page_size, num_pages=num_pages, isa=isa, num_threads=2, kv_format=kv_format)
    edges = [1, 2, 15, 17, 63, 64, 65, 129, 513]
    check(pool, [(n, 1) for n in edges] + [(n, n) for n in edges] + [(64, 3), (130, 66), (300, 37)])


@each_isa
@each_dtype
@each_quantized
def test_options(isa: str, dtype: torch.dtype, kv_format: str | LayerFormat) -> None:
    pool = Pool(dtype=dtype, isa=isa, num_pages=128, num_threads=2, kv_format=kv_format)
    for options in (Options(window_left=0), Options(window_left=65), Options(logits_soft_cap=3.0)):
        check(pool, [(180, 180), (640, 1), (65, 3)], options, slack=2.0)  # bf16 rounds a value above 4 by 0.016
    check(pool, [(100, 30), (70, 1)], Options(-0.2, 20, 3.0), slack=2.0)


@each_isa
@each_dtype
@pytest.mark.parametrize("kv_format", [fp8(*FINE_K), fp8(rotated=True), "int8", "k8v4", "int4"])
def test_every_head_dim(isa: str, dtype: torch.dtype, kv_format: str | LayerFormat) -> None:
    for dim in range(8, 257, 8):
        heads = Heads(3, 1, dim)
        if not takes(kv_format, heads):
            continue
        pool = Pool(heads=heads, dtype=dtype, isa=isa, kv_format=kv_format)
        check(pool, [(81, 20), (67, 1)], slack=2.0, seed=dim)  # fp32 sums of 256 products


@each_isa
@each_dtype
def test_every_number_is_read_exactly(isa: str, dtype: torch.dtype) -> None:
    """A row that sees one key returns its value times v_scale, NaN included."""
    stored = torch.arange(256, dtype=torch.uint8).view(FP8)
    for scale in (1.0, 0.25):
        pool = Pool(Heads(1, 1, 256), dtype, num_pages=1, page_size=1, isa=isa, kv_format=fp8(1.0, scale))
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
        pool = Pool(Heads(1, 1, 8), dtype, num_pages=2, page_size=1, isa=isa, kv_format="fp8")
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


def rows_of(dtype: torch.dtype, dim: int) -> torch.Tensor:
    """[rows, 1, dim]: all numbers, random rows of every size, zeros, ties, one spike, NaN, infinities."""
    numbers = numbers_of(dtype)
    generator = torch.Generator().manual_seed(dim)
    size = 10.0 ** torch.randint(-44, 36, (400, 1), generator=generator)
    some = torch.randn(400, dim, generator=generator)
    hostile = torch.zeros(8, dim)
    hostile[1, 0] = hostile[2, dim - 1] = 1e30
    hostile[3] = 1e-40
    hostile[4, 3], hostile[5, 4], hostile[6, 5] = torch.nan, torch.inf, -torch.inf
    hostile[7, 0] = 3e38
    whole = torch.cat([some, some * size, torch.randint(-9, 10, (100, dim), generator=generator).float(), hostile])
    numbers = torch.cat([numbers, numbers.new_zeros(-len(numbers) % dim)]).view(-1, dim)
    return torch.cat([numbers, whole.to(dtype)])[:, None]


@each_isa
@each_dtype
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    "kv_format",
    [fp8(1.0, 0.037), fp8(3.0, 2.0**-130), fp8(0.3, 7.0, rotated=True), "int8", "k8v4", "int4"],
    ids=["fp8", "fp8_fine", "fp8_rotated", "int8", "k8v4", "int4"],
)
def test_append_stores_what_the_reference_does(
    isa: str, dtype: torch.dtype, dim: int, kv_format: str | LayerFormat
) -> None:
    """The same bytes from every instruction set: of fp8 clamped, rounded to nearest even, NaN of either sign."""
    rows = rows_of(dtype, dim)
    pool = Pool(Heads(1, 1, dim), dtype, num_pages=len(rows) // 16 + 1, isa=isa, num_threads=2, kv_format=kv_format)
    for stored, got, scales in pool.store(rows):
        want, want_scales = storing.store(rows, stored)
        if scales is None:
            both = torch.stack([got, want.view(torch.uint8)])
            nan = want.float().isnan()
            assert torch.equal(*torch.where(nan, both & 0x7F, both))
        else:
            assert want_scales is not None
            assert torch.equal(scales.view(torch.int16), want_scales.view(torch.int16))
            assert torch.equal(got, want.view(torch.uint8))


@pytest.mark.parametrize(
    ("kv_format", "kind", "message"),
    [
        (
            lambda: LayerFormat(RowFormat("float16"), RowFormat("float16")),
            BackendUnavailable,
            "kv_format stores K as float16: use bfloat16, the dtype of k and v, or a format of 8 or 4 bits",
        ),
        (lambda: "fp32", BackendUnavailable, "kv_format stores K as float32: use bfloat16"),
        (lambda: RowFormat("int8", 0.5), InvalidArgument, "scale is 0.5: .* not int8, whose rows have their own"),
        (
            lambda: RowFormat("bfloat16", rotated=True),
            InvalidArgument,
            "rotated rows of bfloat16: only",
        ),
        (lambda: RowFormat("float8_e5m2"), InvalidArgument, "a row of 'float8_e5m2': rows are stored as float32"),
        (lambda: fp8(k_scale=0.0), InvalidArgument, "scale is 0.0: use a positive finite factor"),
        (lambda: fp8(v_scale=float("inf")), InvalidArgument, "scale is inf"),
        (lambda: RowFormat("bfloat16", 0.5), InvalidArgument, "scale is 0.5: only float8_e4m3fn is stored with one"),
        (lambda: "int3", InvalidArgument, "kv_format is 'int3': use None, one of fp32, .* or a LayerFormat"),
        (lambda: [None], InvalidArgument, "kv_format has 1 formats for 2 layers"),
    ],
)
def test_formats_that_are_refused(kv_format: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        layer_formats(kv_format(), "bfloat16", 2)


def test_tensors_that_are_refused() -> None:
    layer = layer_of(Heads(1, 1, 64), torch.bfloat16, 1, 1, "fp8")
    backend = NativeAttention([layer], dtype=torch.bfloat16)
    with pytest.raises(InvalidArgument, match="dtype is torch.float8_e4m3fn"):
        NativeAttention([layer], dtype=FP8)
    with pytest.raises(InvalidArgument, match="dtype is of 8 or 4 bits: q, k, v and out are"):
        _core.AttentionPlan([layer.core], "float8_e4m3fn", 1, 1, 1)
    with pytest.raises(InvalidArgument, match="stored neither in the dtype of k and v nor as float8"):
        NativeAttention([layer_of(Heads(1, 1, 64), torch.bfloat16, 1, 1)], dtype=torch.float16)
    backend.plan(one_row())
    row = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(InvalidArgument, match="v is torch.float8_e4m3fn: convert it to torch.bfloat16"):
        backend.append(0, row, row.to(FP8))
    with pytest.raises(InvalidArgument, match="q is torch.float8_e4m3fn: convert it to torch.bfloat16"):
        backend.run(0, row.to(FP8), row)
