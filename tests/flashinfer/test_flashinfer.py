"""The FlashInfer backend against the dense oracle: on the semantic twin, and on a CUDA device (pytest -m gpu)."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import radixkv
from radixkv.attention.fp8 import quantize
from radixkv.formats import fp8
from tests.attention.helpers import PLAIN, Options, Request, Tokens, error, random_sequence
from tests.attention.helpers import one_torch_thread as one_torch_thread
from tests.flashinfer.helpers import (
    DTYPES,
    TOLERANCE,
    VOCAB,
    FlashInferPool,
    each_dtype,
    each_target,
    heads_of,
    make_engine,
    many_modules,
    run_step,
)

GROUPS = [1, 2, 4, 7, 8]
PAGE_SIZES = [1, 16, 64]
RANDOM_BATCHES = int(os.environ.get("RADIXKV_BATCHES", "40"))
pytestmark = pytest.mark.usefixtures("one_torch_thread")


def check(
    pool: FlashInferPool,
    lengths: list[tuple[int, int]],
    options: Options = PLAIN,
    seed: int = 0,
    slack: float = 1.0,
    sinks: torch.Tensor | None = None,
) -> float:
    """Attend requests of these (length, new rows); returns the error after comparing it with the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    requests = [Request(random_sequence(generator, n, pool.heads, pool.dtype), n, rows) for n, rows in lengths]
    worst = error(pool.attend(requests, np.random.default_rng(seed), options, sinks), requests, options, sinks)
    assert worst <= TOLERANCE[pool.dtype] * slack
    return worst


@each_target
@each_dtype
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group", GROUPS)
def test_decode_then_extend_then_decode(target: str, dtype: torch.dtype, page_size: int, group: int) -> None:
    """Three steps with one backend: wrappers are planned again, workspaces grow, lengths lie around page edges."""
    pool = FlashInferPool(heads_of(group), dtype, 400 // page_size + 20, page_size, target=target)
    edges = [1, 15, 16, 17, 64, 65]
    check(pool, [(n, 1) for n in edges])
    check(pool, [(n, 1) for n in edges[:3]] + [(n, n) for n in edges[3:]] + [(70, 3)], seed=1)
    check(pool, [(n + 1, 1) for n in edges], seed=2)


@each_target
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 5, 64, 2**31 - 1])
def test_sliding_window(target: str, dtype: torch.dtype, window: int) -> None:
    pool = FlashInferPool(heads_of(2), dtype, target=target)
    for lengths in ([(180, 60), (65, 3), (40, 1)], [(180, 1), (3, 1)]):
        check(pool, lengths, Options(window_left=window))


@each_target
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_cap_and_scale(target: str, dtype: torch.dtype) -> None:
    """A cap, a scale, both; the group of 4 decodes with the tensor cores of prefill."""
    pool = FlashInferPool(heads_of(4), dtype, target=target)
    for lengths in ([(100, 30), (70, 1)], [(100, 1), (70, 1)]):
        check(pool, lengths, Options(sm_scale=0.3), slack=2.0)  # logits 2.4 times as large as usual
        for cap in (0.5, 5.0):
            check(pool, lengths, Options(logits_soft_cap=cap))
        check(pool, lengths, Options(sm_scale=0.2, logits_soft_cap=3.0))


@each_target
@each_dtype
@pytest.mark.parametrize("group", [2, 4])
def test_window_soft_cap_and_scale_together(target: str, dtype: torch.dtype, group: int) -> None:
    pool = FlashInferPool(heads_of(group), dtype, target=target)
    for lengths in ([(100, 30), (70, 1)], [(100, 1), (70, 1)]):
        check(pool, lengths, Options(0.2, 20, 3.0), slack=2.0)


@each_target
@each_dtype
@pytest.mark.parametrize("group", [2, 8])
def test_sinks(target: str, dtype: torch.dtype, group: int) -> None:
    """From sinks that take nothing to sinks that take nearly all, also of a row that sees itself alone."""
    pool = FlashInferPool(heads_of(group), dtype, target=target)
    for sinks in (torch.linspace(-8, 8, 2 * group), torch.full((2 * group,), -torch.inf)):
        for options in (PLAIN, Options(window_left=20), Options(sm_scale=0.2)):
            for lengths in ([(180, 60), (65, 3), (1, 1)], [(180, 1), (1, 1)]):
                check(pool, lengths, options, slack=1.5, sinks=sinks)  # rounded once more than without


@each_target
@each_dtype
@pytest.mark.parametrize(("page_size", "chunk"), [(16, 64), (16, 16), (16, 40), (1, 7), (64, 100), (4, 1), (16, 1000)])
def test_chunks(target: str, dtype: torch.dtype, page_size: int, chunk: int) -> None:
    """Extends that straddle chunks, decodes at their edges; chunks that begin inside a page; with a window, too."""
    pool = FlashInferPool(heads_of(4), dtype, 480 // page_size + 20, page_size, target=target)
    edges = [1, chunk, chunk + 1, 2 * chunk, 130]
    edges = [n for n in edges if n <= 150]
    for options in (Options(attention_chunk=chunk), Options(window_left=20, attention_chunk=chunk)):
        check(pool, [(n, 1) for n in edges], options)
        check(pool, [(n, max(n - 3, 1)) for n in edges] + [(150, 90), (90, 1)], options, seed=1)


@each_target
def test_chunks_and_full_layers_by_turns(target: str) -> None:
    """In one step, as Llama 4 has them, and in steps that are all in the first chunk and are not."""
    pool = FlashInferPool(heads_of(4), target=target)
    generator = torch.Generator().manual_seed(0)
    for step, (length, rows) in enumerate([(60, 60), (64, 1), (65, 1), (130, 65), (131, 1)]):
        request = Request(random_sequence(generator, length, pool.heads, pool.dtype), length, rows)
        pool.flashinfer.plan(pool.load([request], np.random.default_rng(step)))
        device = pool.flashinfer.device
        q, k, v = (x[-rows:].to(device) for x in request.sequence)
        for options in (Options(attention_chunk=64), PLAIN, Options(attention_chunk=64), Options(attention_chunk=24)):
            pool.flashinfer.append(0, k, v)
            out = torch.empty(tuple(q.shape), dtype=pool.dtype, device=device)
            pool.flashinfer.run(0, q, out, options)
            assert error([out.cpu()], [request], options) <= TOLERANCE[pool.dtype]


@each_target
@pytest.mark.parametrize("dim", [128, 192, 256])
def test_head_dims(target: str, dim: int) -> None:
    """The append kernel and decode without tensor cores do not take 192."""
    if dim == 256:
        many_modules()
    pool = FlashInferPool(heads_of(2, 2, dim), target=target)
    check(pool, [(100, 30), (70, 1)])
    check(pool, [(100, 1), (70, 1)])


@each_target
@pytest.mark.parametrize("group", [1, 4])
def test_long_contexts(target: str, group: int) -> None:
    """Long enough that FlashInfer splits the keys among blocks and merges: the workspace is really used."""
    pool = FlashInferPool(heads_of(group, 1), num_pages=200, target=target)
    check(pool, [(2500, 1), (3, 1)])
    check(pool, [(2500, 5), (3, 1)])


@each_target
def test_layers_with_different_options(target: str) -> None:
    """Local and global layers by turns in one step, as Gemma has them: plans do not disturb each other."""
    pool = FlashInferPool(heads_of(2), target=target)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        rows = (1, 9, 1)[step]
        request = Request(random_sequence(generator, 90 + step, pool.heads, pool.dtype), 90 + step, rows)
        pool.flashinfer.plan(pool.load([request], np.random.default_rng(step)))
        device = pool.flashinfer.device
        q, k, v = (x[-rows:].to(device) for x in request.sequence)
        for options in (Options(window_left=20), PLAIN, Options(window_left=20), Options(sm_scale=0.2), PLAIN):
            pool.flashinfer.append(0, k, v)
            out = torch.empty(tuple(q.shape), dtype=pool.dtype, device=device)
            pool.flashinfer.run(0, q, out, options)
            assert error([out.cpu()], [request], options) <= 2 * TOLERANCE[pool.dtype]


@each_target
@each_dtype
@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize("dim", [64, 192])
def test_8_bit_caches(target: str, dtype: torch.dtype, group: int, dim: int) -> None:
    """Tokens whose K and V are exact in 8 bits, the cached and the new ones, meet the tolerance of their dtype."""
    if dim != 64:
        many_modules()
    scales = (0.5, 0.0625)
    pool = FlashInferPool(heads_of(group, 2, dim), dtype, 64, 16, target=target, kv_format=fp8(*scales))
    generator = torch.Generator().manual_seed(0)
    for lengths in ([(100, 30), (70, 1), (9, 9)], [(100, 1), (33, 1)]):
        requests = []
        for n, rows in lengths:
            q, k, v = random_sequence(generator, n, pool.heads, dtype)
            k, v = (quantize(x, s).to(dtype) * s for x, s in zip((k, v), scales, strict=True))
            requests.append(Request(Tokens(q, k, v), n, rows))
        assert error(pool.attend(requests, np.random.default_rng(0)), requests) <= TOLERANCE[dtype]


def test_quantize_rounds_and_saturates() -> None:
    x = torch.tensor([0.0, 1.0, 1.06, 1.07, -3.0, 448.0, 460.0, 1e6, -torch.inf, torch.nan])
    expected = [0.0, 1.0, 1.0, 1.125, -3.0, 448.0, 448.0, 448.0, -448.0]
    assert quantize(x, 1.0).float()[:-1].tolist() == expected
    assert quantize(x, 1.0).float()[-1].isnan()
    assert quantize(x.to(torch.bfloat16), 4.0).float()[5].item() == 112.0


@each_target
def test_random_batches(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """RADIXKV_BATCHES random batches of decode, extend and prefill rows; prints the worst error of each kind."""
    rng = np.random.default_rng(0)
    worst: dict[tuple[str, str], float] = {}
    counts: dict[tuple[str, str], int] = {}
    pools: dict[tuple[int, int, torch.dtype], FlashInferPool] = {}
    for seed in range(RANDOM_BATCHES):
        key = (int(rng.choice(GROUPS)), int(rng.choice(PAGE_SIZES)), DTYPES[seed % 2])
        if key not in pools:
            pools[key] = FlashInferPool(heads_of(key[0]), key[2], 800 // key[1] + 10, key[1], target=target)
        rows = rng.choice([1, 1, 1, 2, 7, 40], rng.integers(1, 7)) if seed % 3 else np.ones(rng.integers(1, 7), int)
        lengths = [(int(n + rng.integers(0, 90)), int(n)) for n in rows]
        options, kind = PLAIN, "plain"
        if seed % 4 == 0 and key[2] == torch.float16:
            options, kind = Options(window_left=int(rng.integers(0, 60))), "window"
        elif seed % 4 == 1 and key[0] >= 4:
            options, kind = Options(logits_soft_cap=float(rng.uniform(1, 20))), "soft cap"
        name = (str(key[2]).removeprefix("torch."), kind + (" decode" if max(rows) == 1 else " mixed"))
        worst[name] = max(worst.get(name, 0.0), check(pools[key], lengths, options, seed))
        counts[name] = counts.get(name, 0) + 1
    with capsys.disabled():
        print(f"\n{RANDOM_BATCHES} random batches on {target}; largest error, allowed:")
        for (dtype, kind), value in sorted(worst.items()):
            limit = TOLERANCE[getattr(torch, dtype)]
            print(f"  {dtype:<9} {kind:<16} {counts[dtype, kind]:>4} batches  {value:.1e}  {limit:.0e}")


# --- the engine -----------------------------------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize(("page_size", "kv_format"), [(1, None), (16, None), (16, "fp8"), (16, "fp8_rotated")])
def test_engine_gives_the_answers_of_the_native_engine(
    target: str, page_size: int, kv_format: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hits, page copies, mixed batches and decode steps over several turns. 8-bit K and V cost a few percent."""
    dtype = torch.float16
    sizes = {"num_pages": 600 // page_size, "page_size": page_size, "dtype": dtype}
    ours = make_engine(monkeypatch, target, **sizes, kv_format=kv_format)
    rotated = kv_format == "fp8_rotated"  # in the same format: both store the same but for what rotations round
    native = make_engine(monkeypatch, "native", **sizes, kv_format=kv_format if rotated else None)
    rng = np.random.default_rng(page_size)
    shared = rng.integers(0, VOCAB, 37).tolist()
    leases: list[tuple[radixkv.Lease, radixkv.Lease]] = []
    for turn in range(8):
        if turn % 3 == 0 or not leases:
            tokens = shared[: rng.integers(1, 38)] + rng.integers(0, VOCAB, rng.integers(1, 30)).tolist()
            leases.append((ours.acquire(tokens), native.acquire(tokens)))
        got = run_step(ours, [a for a, _ in leases], dtype)
        want = run_step(native, [b for _, b in leases], dtype)
        difference = (got - want).float().abs()
        if kv_format is None or rotated:
            assert difference.max() <= 1e-2 * want.abs().max()
        else:
            assert 1e-3 < difference.mean() / want.float().abs().mean() <= 5e-2
        for pair in leases:
            token = int(rng.integers(0, VOCAB))
            for lease in pair:
                lease.extend([token])
        if turn % 4 == 3:
            for lease in leases.pop(0):
                lease.release()
    ours.cache.check()
    assert ours.cache.stats().hit_tokens == native.cache.stats().hit_tokens > 0
    assert ours.pool.nbytes * (2 if kv_format == "fp8" else 1) == native.pool.nbytes


@each_target
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_chunks_and_sinks_after_pages_were_dropped(
    target: str, cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks begin at positions of the sequence, not of what is left of it."""
    dtype, options = torch.float16, Options(attention_chunk=12)
    sizes = {"num_layers": 1, "num_pages": 16, "page_size": 4, "dtype": dtype}
    engine = make_engine(monkeypatch, target, **sizes, cuda_graphs=cuda_graphs)
    sequence = random_sequence(torch.Generator().manual_seed(0), 60, heads_of(2), dtype)
    sinks = torch.linspace(-2, 2, 4)
    lease = engine.acquire(range(21))
    worst, dropped = 0.0, 0
    for length, rows in [(21, 21), (23, 2), *((n, 1) for n in range(24, 41)), (60, 20)]:
        if length > 21:
            lease.extend(range(length - rows, length))
        q, k, v = (x[length - rows : length].to(engine.device) for x in sequence)
        with engine.step([lease]) as step:
            assert (step.graph_key is not None) == (cuda_graphs and rows == 1)
            out = step.attend(0, q, k, v, attention_chunk=12, sinks=sinks.to(engine.device))
        worst = max(worst, error([out.cpu()], [Request(sequence, length, rows)], options, sinks))
        dropped += engine.drop(lease, options.lookback)
    assert worst <= TOLERANCE[dtype]
    assert dropped > 5
