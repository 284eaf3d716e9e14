"""The contract: an output row is the same, bit for bit, whatever surrounds it.

Every comparison is with one reference: the whole sequence computed at once, alone, on one thread. The splits vary the
cached part, the page size, the page ids, the other requests of the batch and the number of threads, all at random.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from radixkv.formats import LayerFormat
from tests.attention.helpers import (
    FORMATS,
    ISAS,
    Heads,
    Options,
    Pool,
    Request,
    Tokens,
    each_format,
    random_sequence,
    takes,
)
from tests.attention.helpers import one_torch_thread as one_torch_thread

HEADS = Heads(4, 2, 16)
LENGTH = 600  # beyond the first chunk of 512 keys
SEQUENCES = 3
PAGE_SIZES = (1, 3, 16, 64)
SINKS = torch.tensor([0.5, -1.0, 4.0, 1.5])
pytestmark = pytest.mark.usefixtures("one_torch_thread")
each_isa = pytest.mark.parametrize("isa", ISAS)


def sequences(dtype: torch.dtype, heads: Heads = HEADS, length: int = LENGTH, count: int = SEQUENCES) -> list[Tokens]:
    generator = torch.Generator().manual_seed(7)
    return [random_sequence(generator, length, heads, dtype) for _ in range(count)]


def references(
    tokens: list[Tokens], pool: Pool, options: Options, sinks: torch.Tensor | None = None
) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [pool.attend([Request(t, len(t.q), len(t.q))], rng, options, sinks)[0] for t in tokens]


def random_request(rng: np.random.Generator, which: int, tokens: Tokens) -> Request:
    length = int(rng.integers(1, len(tokens.q) + 1))
    rows = int(min(length, rng.choice([1, 2, 5, 40, length, rng.integers(1, length + 1)])))
    return Request(tokens, length, rows)


def assert_same_bits(got: torch.Tensor, want: torch.Tensor, request: Request, pool: Pool) -> None:
    kind = torch.int32 if want.dtype == torch.float32 else torch.int16
    same = torch.equal(got.contiguous().view(kind), want[request.length - request.rows : request.length].view(kind))
    assert same, f"{request.rows} rows of {request.length} on pages of {pool.page_size}, {pool.num_threads} threads"


@each_isa
@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("options", "sinks"),
    [
        (Options(), None),
        (Options(window_left=70), None),
        (Options(0.2, 9, 3.0), None),
        (Options(attention_chunk=90), None),
        (Options(), SINKS),
        (Options(window_left=70), SINKS),
    ],
    ids=["plain", "window", "cap", "chunk", "sinks", "sinks and window"],
)
def test_random_splits(
    isa: str,
    dtype: torch.dtype,
    kv_format: str | LayerFormat | None,
    options: Options,
    sinks: torch.Tensor | None,
) -> None:
    """150 splits for each instruction set, dtype and set of options; 50 of 8 and 4 bits."""
    rng = np.random.default_rng(len(isa))
    tokens = sequences(dtype)
    pools = [
        Pool(
            HEADS,
            dtype,
            num_pages=4 * -(-LENGTH // size),
            page_size=size,
            num_threads=threads,
            isa=isa,
            kv_format=kv_format,
        )
        for size in PAGE_SIZES
        for threads in (1, 2, 3)
    ]
    want = references(tokens, pools[-1], options, sinks)
    done = 0
    while done < (150 if kv_format is None else 50):
        pool = pools[rng.integers(len(pools))]
        which = rng.integers(SEQUENCES, size=rng.integers(1, 5))
        requests = [random_request(rng, i, tokens[i]) for i in which]
        for i, request, got in zip(which, requests, pool.attend(requests, rng, options, sinks), strict=True):
            assert_same_bits(got, want[i], request, pool)
        done += len(requests)


@each_isa
@pytest.mark.parametrize(
    "heads",
    [Heads(3, 1, 64), Heads(8, 8, 8), Heads(7, 1, 40), Heads(16, 2, 128), Heads(4, 4, 192, value=128)],
    ids=str,
)
def test_every_cut_of_a_short_sequence(isa: str, heads: Heads) -> None:
    """Cached part 0, 1, 2, ... for sizes that end inside pages, tiles and vectors."""
    rng = np.random.default_rng(0)
    for dtype, kv_format in [(torch.float32, None), *((torch.bfloat16, f) for f in FORMATS.values())]:
        if not takes(kv_format, heads):
            continue
        tokens = sequences(dtype, heads, 75, 1)
        pool = Pool(heads, dtype, num_pages=40, page_size=5, isa=isa, kv_format=kv_format)
        alone = Pool(heads, dtype, num_pages=2, page_size=64, isa=isa, kv_format=kv_format)
        want = references(tokens, alone, Options())[0]
        for cached in range(75):
            request = Request(tokens[0], 75, 75 - cached)
            assert_same_bits(pool.attend([request], rng)[0], want, request, pool)


@each_isa
def test_long_decode_split_over_threads(isa: str) -> None:
    heads = Heads(3, 1, 64)
    tokens = sequences(torch.bfloat16, heads, 3000, 1)
    pools = [Pool(heads, torch.bfloat16, num_pages=200, num_threads=n, isa=isa) for n in (1, 2, 5)]
    want = references(tokens, pools[0], Options())[0]
    rng = np.random.default_rng(0)
    for pool in pools:
        for length, rows in ((3000, 1), (2999, 4), (2561, 1), (2560, 17), (513, 1)):
            request = Request(tokens[0], length, rows)
            assert_same_bits(pool.attend([request], rng)[0], want, request, pool)


def test_number_of_threads_may_change_between_calls() -> None:
    tokens = sequences(torch.float32)
    pool = Pool(HEADS, num_pages=150)
    want = references(tokens, pool, Options())
    rng = np.random.default_rng(0)
    for threads in (4, 1, 2, 7):
        pool.backend.num_threads = threads
        assert pool.backend.num_threads == threads
        requests = [Request(t, LENGTH, 100) for t in tokens]
        for i, got in enumerate(pool.attend(requests, rng)):
            assert_same_bits(got, want[i], requests[i], pool)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_works_in_a_forked_child() -> None:
    """Threads do not survive fork(); the child starts its own."""
    tokens = sequences(torch.float32, count=1)
    pool = Pool(HEADS, num_pages=64, num_threads=2)
    request = Request(tokens[0], LENGTH, LENGTH)
    want = pool.attend([request], np.random.default_rng(0))[0]
    child = os.fork()
    if child == 0:
        got = pool.attend([request], np.random.default_rng(0))[0]
        os._exit(0 if torch.equal(got, want) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(pool.attend([request], np.random.default_rng(0))[0], want)
