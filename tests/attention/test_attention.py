"""The native attention against a dense float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.attention.helpers import (
    ISAS,
    PLAIN,
    Heads,
    Options,
    Pool,
    Request,
    Tokens,
    error,
    random_sequence,
)
from tests.attention.helpers import one_torch_thread as one_torch_thread

# Largest error allowed for inputs of unit variance. The outputs are averages of values, so of order one.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
pytestmark = pytest.mark.usefixtures("one_torch_thread")
each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def batch_of(lengths: list[tuple[int, int]], heads: Heads, dtype: torch.dtype, seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    return [Request(random_sequence(generator, n, heads, dtype), n, rows) for n, rows in lengths]


def check(
    pool: Pool,
    lengths: list[tuple[int, int]],
    options: Options = PLAIN,
    seed: int = 0,
    slack: float = 1.0,
    sinks: torch.Tensor | None = None,
) -> None:
    requests = batch_of(lengths, pool.heads, pool.dtype, seed)
    got = pool.attend(requests, np.random.default_rng(seed), options, sinks)
    assert error(got, requests, options, sinks) <= TOLERANCE[pool.dtype] * slack


@each_isa
@each_dtype
@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
def test_mixed_batch(isa: str, dtype: torch.dtype, page_size: int) -> None:
    """Prefill, extend and decode together; lengths around the edges of pages, tiles (64) and chunks (512)."""
    pool = Pool(dtype=dtype, page_size=page_size, num_pages=3200 // page_size + 30, isa=isa, num_threads=2)
    edges = [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 513]
    check(pool, [(n, 1) for n in edges] + [(n, n) for n in edges] + [(64, 3), (130, 66), (300, 37)])


@each_isa
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("kv", [1, 3])
def test_groups(isa: str, group: int, kv: int) -> None:
    pool = Pool(heads=Heads(group * kv, kv, 64), isa=isa)
    check(pool, [(70, 70), (200, 1), (130, 5)])


@each_isa
@each_dtype
def test_every_head_dim(isa: str, dtype: torch.dtype) -> None:
    for dim in (*range(8, 257, 8), 264, 384, 512, 576):
        check(Pool(heads=Heads(3, 1, dim), dtype=dtype, isa=isa), [(81, 20), (67, 1)], seed=dim)


@each_isa
@each_dtype
@pytest.mark.parametrize(("dim", "value"), [(192, 128), (128, 192), (96, 64), (40, 24), (64, 8)])
def test_keys_and_values_of_different_dimensions(isa: str, dtype: torch.dtype, dim: int, value: int) -> None:
    """The first are those of MLA with K and V of every head."""
    for heads in (Heads(4, 4, dim, value=value), Heads(6, 2, dim, value=value)):
        check(Pool(heads, dtype, isa=isa), [(90, 30), (150, 1), (65, 4)], seed=dim)


@each_isa
@each_dtype
@pytest.mark.parametrize("window", [0, 1, 5, 63, 64, 65, 200, 2**31 - 1])
def test_sliding_window(isa: str, dtype: torch.dtype, window: int) -> None:
    pool = Pool(dtype=dtype, isa=isa, num_pages=128, num_threads=2)
    check(pool, [(180, 180), (640, 1), (300, 40), (65, 3)], Options(window_left=window))


@each_isa
@each_dtype
@pytest.mark.parametrize("chunk", [1, 5, 64, 65, 130, 512, 2**31 - 1])
def test_attention_in_chunks(isa: str, dtype: torch.dtype, chunk: int) -> None:
    """Prefill, extend and decode across and at the edges of chunks, with and without a window besides."""
    pool = Pool(dtype=dtype, isa=isa, num_pages=128, num_threads=2)
    for options in (Options(attention_chunk=chunk), Options(window_left=20, attention_chunk=chunk)):
        check(pool, [(180, 180), (640, 1), (641, 1), (300, 40), (66, 3)], options)


@each_isa
@each_dtype
def test_sinks(isa: str, dtype: torch.dtype) -> None:
    """A logit beside those of the keys: as large as they are, larger than all of them, smaller, and none at all."""
    pool = Pool(dtype=dtype, isa=isa, num_pages=128, num_threads=2)
    sinks = torch.tensor([0.5, -1.0, 3.0, 12.0, -200.0, -torch.inf])
    for options in (PLAIN, Options(window_left=0), Options(window_left=127), Options(0.3, -1, 4.0)):
        check(pool, [(180, 180), (640, 1), (300, 40), (65, 3), (1, 1)], options, sinks=sinks)


@each_isa
def test_a_sink_of_minus_infinity_is_none(isa: str) -> None:
    pool = Pool(isa=isa)
    requests = batch_of([(100, 100)], pool.heads, torch.float32)
    none = torch.full((6,), -torch.inf)
    (got,) = pool.attend(requests, np.random.default_rng(0), PLAIN, none)
    (want,) = pool.attend(requests, np.random.default_rng(0))
    assert torch.equal(got, want)


@each_isa
def test_a_sink_that_takes_all_leaves_nothing(isa: str) -> None:
    pool = Pool(isa=isa)
    (got,) = pool.attend(
        batch_of([(100, 100)], pool.heads, torch.float32), np.random.default_rng(0), PLAIN, torch.full((6,), 300.0)
    )
    assert (got == 0).all()


def test_window_that_a_block_leaves_behind() -> None:
    """Rows of one block that see disjoint tiles, over several chunks."""
    check(Pool(heads=Heads(1, 1, 16), num_pages=128), [(1500, 1500)], Options(window_left=3))


@each_isa
@each_dtype
def test_scale_and_soft_cap(isa: str, dtype: torch.dtype) -> None:
    pool = Pool(dtype=dtype, isa=isa)
    for options in (Options(sm_scale=0.3), Options(sm_scale=0.0), Options(sm_scale=-0.1)):
        check(pool, [(100, 30), (70, 1)], options, slack=2.0)  # logits up to 2.4 times as large as usual
    for cap in (0.5, 5.0, 50.0):
        check(pool, [(100, 30), (70, 1)], Options(logits_soft_cap=cap))
    check(pool, [(100, 30), (70, 1)], Options(0.2, 20, 3.0))


@each_isa
def test_long_decode_on_two_threads(isa: str) -> None:
    """Few heads and a long context: chunks are computed independently."""
    check(Pool(heads=Heads(3, 1, 64), num_pages=512, num_threads=2, isa=isa), [(5000, 1)])
    check(Pool(heads=Heads(3, 1, 64), num_pages=512, num_threads=2, isa=isa), [(5000, 1)], Options(window_left=700))


@each_isa
def test_large_logits(isa: str) -> None:
    """Scores of hundreds: nothing overflows, and the largest key wins."""
    heads = Heads(2, 1, 64)
    (request,) = batch_of([(150, 150)], heads, torch.float32)
    loud = Request(Tokens(request.sequence.q * 30, request.sequence.k * 30, request.sequence.v), 150, 150)
    got = Pool(heads=heads, isa=isa).attend([loud], np.random.default_rng(0))
    assert error(got, [loud]) <= 2e-3  # a score of 1000 has an error of 1e-4, and so has its weight


@each_isa
@each_dtype
def test_nothing_leaks_from_later_tokens(isa: str, dtype: torch.dtype) -> None:
    """Keys and values that a row must not see may be NaN or infinite, even in its own step."""
    heads = Heads(3, 1, 32)
    (request,) = batch_of([(130, 130)], heads, dtype)
    q, k, v = (x.clone() for x in request.sequence)
    clean = Pool(heads=heads, dtype=dtype, isa=isa).attend([request], np.random.default_rng(0))[0]
    for bad in (77, 78):
        k[bad:], v[bad:] = torch.nan, torch.inf
        dirty = Request(Tokens(q, k, v), 130, 130)
        got = Pool(heads=heads, dtype=dtype, isa=isa).attend([dirty], np.random.default_rng(0))[0]
        assert torch.equal(got[:bad], clean[:bad])
        assert not got[bad:].isfinite().any()
        k, v = request.sequence.k.clone(), request.sequence.v.clone()


@each_isa
@each_dtype
def test_nothing_leaks_from_before_the_window(isa: str, dtype: torch.dtype) -> None:
    heads = Heads(3, 1, 32)
    (request,) = batch_of([(130, 40)], heads, dtype)
    q, k, v = (x.clone() for x in request.sequence)
    k[:71], v[:71] = torch.nan, torch.inf
    options = Options(window_left=19)  # the first row is at 90 and sees 71
    got = Pool(heads=heads, dtype=dtype, isa=isa).attend(
        [Request(Tokens(q, k, v), 130, 40)], np.random.default_rng(0), options
    )
    assert error(got, [request], options) <= TOLERANCE[dtype]


@each_isa
@each_dtype
def test_nan_in_a_query_stays_in_its_row(isa: str, dtype: torch.dtype) -> None:
    heads = Heads(3, 1, 32)
    (request,) = batch_of([(100, 100)], heads, dtype)
    q = request.sequence.q.clone()
    q[50, 1, 3] = torch.nan
    got = Pool(heads=heads, dtype=dtype, isa=isa).attend(
        [Request(Tokens(q, request.sequence.k, request.sequence.v), 100, 100)], np.random.default_rng(0)
    )[0]
    assert got[50, 1].isnan().all()
    got[50, 1] = 0
    assert got.isfinite().all()


@each_dtype
def test_append_writes_its_slots_and_no_other(dtype: torch.dtype) -> None:
    pool = Pool(dtype=dtype, num_pages=64)
    requests = batch_of([(700, 600), (50, 1)], pool.heads, dtype)
    table = pool.load(requests, np.random.default_rng(1))
    before = pool.k.clone(), pool.v.clone()
    pool.backend.plan(table)
    k = torch.randn(601, 2, 64).to(dtype)
    v = torch.randn(2, 601, 64).to(dtype).transpose(0, 1)
    pool.backend.append(0, k, v)
    page, slot = table.slots // pool.page_size, table.slots % pool.page_size
    for cache, rows, old in ((pool.k, k, before[0]), (pool.v, v, before[1])):
        assert torch.equal(cache[page, slot], rows)
        cache[page, slot] = old[page, slot]
        assert torch.equal(cache.nan_to_num(), old.nan_to_num())


@each_isa
def test_rounding_to_storage(isa: str) -> None:
    """A row that sees one key returns its value exactly, subnormals, infinities and NaN included."""
    for dtype in DTYPES:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        values = bits.view(dtype) if dtype.itemsize == 2 else bits.to(dtype) * 1e-3
        if dtype == torch.bfloat16:
            values = values[(values.abs() >= 2**-126) | (values == 0) | values.isnan()]
        v = values[: len(values) // 256 * 256].reshape(-1, 1, 256)
        heads = Heads(1, 1, 256)
        zero = torch.zeros_like(v)
        pool = Pool(heads=heads, dtype=dtype, num_pages=len(v), page_size=1, isa=isa)
        requests = [Request(Tokens(zero[i : i + 1], zero[i : i + 1], v[i : i + 1]), 1, 1) for i in range(len(v))]
        got = torch.cat(pool.attend(requests, np.random.default_rng(0)))
        assert torch.equal(got.isnan(), v.isnan())
        assert torch.equal(got.nan_to_num(), v.nan_to_num())
