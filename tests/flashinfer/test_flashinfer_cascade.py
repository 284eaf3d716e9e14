"""Cascade with FlashInfer against the dense oracle: on the semantic twin, and on a CUDA device (pytest -m gpu)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import radixkv
from radixkv.attention.cascade import CascadePlan, Level
from radixkv.attention.flashinfer import FlashInferAttention
from radixkv.attention.fp8 import quantize
from radixkv.formats import fp8
from tests.attention.cascade_helpers import ALL, Forest, random_forest
from tests.attention.helpers import PLAIN, Heads, Options, Request, Tokens, dense, error
from tests.attention.helpers import one_torch_thread as one_torch_thread
from tests.flashinfer.helpers import (
    DTYPES,
    TOLERANCE,
    backend,
    each_dtype,
    each_target,
    heads_of,
    make_engine,
    many_modules,
    run_step,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")
RANDOM_BATCHES = int(os.environ.get("RADIXKV_BATCHES", "40"))

# Pages that requests begin with: page 0 of five, then 1 and 2 of three, then 3 of two; 20 and 21 of another family; one
# request alone. The users are scattered over the batch.
PREFIXES = [[0, 1, 2, 3], [0, 1, 2], [0], [0, 1, 2, 3], [20, 21], [20, 21], [0], []]


def grown(lengths: list[int], rows: list[int]) -> Forest:
    """Requests that go on from the prefixes on pages of 16 of their own."""
    pages = [[*prefix, *range(30 + 5 * i, 35 + 5 * i)] for i, prefix in enumerate(PREFIXES)]
    pages = [mine[: -(-length // 16)] for mine, length in zip(pages, lengths, strict=True)]
    return Forest(pages, lengths, rows, 16)


DECODE = grown([71, 65, 17, 96, 40, 64, 32, 5], [1] * 8)
MIXED = grown([71, 65, 30, 90, 40, 60, 32, 5], [3, 1, 9, 20, 1, 8, 16, 5])


@dataclass
class Batch:
    """A forest's requests over one layer's caches: random K and V, NaN where nothing was written."""

    forest: Forest
    heads: Heads
    dtype: torch.dtype
    target: str
    seed: int = 0
    scales: tuple[float, float] | None = None
    attention: FlashInferAttention = field(init=False)

    def __post_init__(self) -> None:
        forest, heads = self.forest, self.heads
        stored: dict[str, Any] = {"kv_format": fp8(*self.scales)} if self.scales else {}
        sizes = (heads, self.dtype, forest.num_pages, forest.page_size)
        self.attention = backend(self.target, *sizes, **stored, cascade=ALL)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (2, forest.num_pages * forest.page_size, heads.kv, heads.dim)
        kv = torch.randn(shape, generator=generator).to(self.dtype)
        if self.scales:  # values that 8 bits hold exactly
            kv = torch.stack([quantize(x, s).to(self.dtype) * s for x, s in zip(kv, self.scales, strict=True)])
        self.requests, written, rows = [], [], []
        for pages, length, new in zip(forest.pages, forest.lengths, forest.rows, strict=True):
            at = torch.arange(length)
            slots = torch.tensor(pages)[at // forest.page_size] * forest.page_size + at % forest.page_size
            q = torch.randn(length, heads.qo, heads.dim, generator=generator).to(self.dtype)
            self.requests.append(Request(Tokens(q, kv[0, slots], kv[1, slots]), length, new))
            written.append(slots[: length - new])
            rows.append([x[length - new :] for x in self.requests[-1].sequence])
        self.q, self.k, self.v = (torch.cat(x) for x in zip(*rows, strict=True))
        caches = torch.full_like(kv, torch.nan)
        caches[:, torch.cat(written)] = kv[:, torch.cat(written)]
        if self.scales:
            caches = torch.stack([quantize(x, s) for x, s in zip(caches, self.scales, strict=True)])
        self.caches = caches.view(2, forest.num_pages, forest.page_size, heads.kv, heads.dim)

    def error(self, options: Options = PLAIN, sinks: torch.Tensor | None = None) -> float:
        """The largest error of one step, relative where an output is larger than 1; infinite if anything is NaN.

        A state is rounded once for each level. Between 2 and 4, rounding to bfloat16 alone is an error of up to 0.008,
        so an absolute limit of 0.01 would be one for the data, not for the kernels. `absolute` keeps that error too.
        """
        self.attention.plan(self.forest.table())
        return self.judge(self.run(self.attention, 0, options, sinks), options, sinks)

    def run(
        self,
        attention: FlashInferAttention,
        layer: int,
        options: Options = PLAIN,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The rows of a layer of these heads in a step that is planned for the forest."""
        kv, device = attention._layers[layer].kv, attention.device
        for place, cache in zip((kv.k, kv.v), self.caches, strict=True):
            place.view(torch.uint8).copy_(cache.view(torch.uint8))
        attention.append(layer, self.k.to(device), self.v.to(device))
        q = self.q.transpose(0, 1).contiguous().to(device).transpose(0, 1)  # as a model hands it over
        out = torch.full(tuple(q.shape), torch.nan, dtype=self.dtype, device=device)
        attention.run(layer, q, out, options, None if sinks is None else sinks.to(device))
        return out.cpu()

    def judge(self, out: torch.Tensor, options: Options, sinks: torch.Tensor | None = None) -> float:
        """What `error` returns, of these rows."""
        self.absolute = error(list(out.split(self.forest.rows)), self.requests, options, sinks)
        wanted = torch.cat([dense(request, options, sinks) for request in self.requests])
        found = ((out.double() - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
        return found if found == found else float("inf")


def merges(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each call of merge_state_in_place."""
    called: list[int] = []
    real = batch.attention._api.merge_state_in_place

    def count(*states: torch.Tensor) -> None:
        called.append(len(called))
        real(*states)

    monkeypatch.setattr(batch.attention._api, "merge_state_in_place", count)
    return called


@each_target
@each_dtype
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("forest", [DECODE, MIXED], ids=["decode", "mixed"])
def test_three_levels_and_two_families(
    target: str, dtype: torch.dtype, group: int, forest: Forest, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(forest, heads_of(group), dtype, target)
    called = merges(batch, monkeypatch)
    assert batch.error() <= TOLERANCE[dtype]
    assert len(called) == 3
    sinks = torch.linspace(-3, 5, 2 * group)
    assert batch.error(sinks=sinks) <= TOLERANCE[dtype]  # once a row, not once a level
    chunk = Options(attention_chunk=int(max(forest.lengths)))
    assert batch.error(chunk) <= TOLERANCE[dtype]
    assert len(called) == 9  # all in the first chunk
    assert batch.error(Options(attention_chunk=40), sinks) <= TOLERANCE[dtype]
    assert len(called) == 9
    found = {(tuple(sorted(s.users)), s.page_begin, s.page_end, s.level) for s in batch.attention.cascade.segments}
    assert found == {((0, 1, 2, 3, 6), 0, 1, 0), ((0, 1, 3), 1, 3, 1), ((0, 3), 3, 4, 2), ((4, 5), 0, 2, 0)}
    assert "8 requests, 4 shared segments, 4 used in 3 levels" in batch.attention.cascade.explain()


@each_target
@pytest.mark.parametrize("dim", [128, 192, 256])
def test_head_dims(target: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer merges no states of 192."""
    if dim == 256:
        many_modules()
    for forest in (DECODE, MIXED):
        batch = Batch(forest, heads_of(2, 2, dim), torch.float16, target)
        called = merges(batch, monkeypatch)
        assert batch.error() <= TOLERANCE[torch.float16]
        assert len(called) == (0 if dim == 192 else 3)


@each_target
@each_dtype
def test_scale_and_soft_cap(target: str, dtype: torch.dtype) -> None:
    batch = Batch(MIXED, heads_of(4), dtype, target)
    assert batch.error(Options(sm_scale=0.2)) <= 2 * TOLERANCE[dtype]  # logits 1.6 times as large as usual
    assert batch.error(Options(logits_soft_cap=1.0)) <= TOLERANCE[dtype]
    assert batch.error(Options(sm_scale=0.2, logits_soft_cap=3.0)) <= TOLERANCE[dtype]


@each_target
@each_dtype
@pytest.mark.parametrize(("window", "levels"), [(2**31 - 1, 3), (70, 3), (69, 1), (30, 0), (22, 1), (0, 0)])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_windows(
    target: str, dtype: torch.dtype, window: int, levels: int, cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 holds all segments. 69 cuts the first: its family shares nothing, the other one does. 22 holds the segment of
    0 and 3 and begins behind those above it. 30 cuts the first of each family, 0 begins behind all."""
    forest = grown([71, 71, 40, 71, 40, 40, 40, 5], [1] * 8)
    batch = Batch(forest, heads_of(2), dtype, target)
    called = merges(batch, monkeypatch)
    assert batch.error(Options(window_left=window, logits_soft_cap=cap)) <= TOLERANCE[dtype]
    assert len(called) == levels
    assert batch.error() <= TOLERANCE[dtype]
    assert len(called) == levels + 3


@each_target
@each_dtype
@pytest.mark.parametrize("forest", [DECODE, MIXED], ids=["decode", "mixed"])
def test_8_bit_caches(target: str, dtype: torch.dtype, forest: Forest, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(forest, heads_of(2), dtype, target, scales=(0.5, 0.0625))
    called = merges(batch, monkeypatch)
    assert batch.error() <= TOLERANCE[dtype]
    assert len(called) == 3


@each_target
def test_8_bit_caches_with_a_window(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    many_modules()
    batch = Batch(DECODE, heads_of(2), torch.float16, target, scales=(0.5, 0.0625))
    called = merges(batch, monkeypatch)
    assert batch.error(Options(window_left=95)) <= TOLERANCE[torch.float16]
    assert batch.error(Options(window_left=30)) <= TOLERANCE[torch.float16]
    assert len(called) == 3


@each_target
def test_random_forests(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """RADIXKV_BATCHES random forests of decode, extend and prefill rows; prints the worst error of each kind."""
    rng = np.random.default_rng(1)
    worst: dict[tuple[str, str], tuple[float, float, int, int]] = {}
    for seed in range(RANDOM_BATCHES):
        dtype = DTYPES[seed % 2]
        page_size = int(rng.choice([1, 16, 64]))
        choices = [[1], [1, 1, 2, 7, 40]][seed % 3 > 0]
        run = -(-int(rng.choice([20, 100])) // page_size)
        forest = random_forest(rng, int(rng.integers(2, 9)), page_size, run, int(rng.choice([0, 30])), choices)
        kind = ("plain", "window", "soft cap", "window + soft cap")[seed // 2 % 4]
        window, cap = int(rng.integers(0, 300)), float(rng.uniform(1, 20))
        options = Options(None, window if "window" in kind else -1, cap if "cap" in kind else 0.0)
        batch = Batch(forest, heads_of(int(rng.choice([1, 2, 4, 7, 8]))), dtype, target, seed)
        found = batch.error(options)
        assert found <= TOLERANCE[dtype], (seed, batch.attention.cascade.explain())
        levels = len(batch.attention.cascade.levels(options.window_left)) - 1
        name = (str(dtype).removeprefix("torch."), kind)
        before = worst.get(name, (0.0, 0.0, 0, 0))
        largest = max(before[0], found), max(before[1], batch.absolute)
        worst[name] = (*largest, before[2] + 1, before[3] + (levels > 0))
    assert sum(cascades for _, _, _, cascades in worst.values()) >= RANDOM_BATCHES // 3
    with capsys.disabled():
        print(f"\n{RANDOM_BATCHES} random forests on {target}; largest error, allowed, largest absolute error:")
        for (name, kind), (value, absolute, count, cascades) in sorted(worst.items()):
            limit = TOLERANCE[getattr(torch, name)]
            counts = f"{count:>4} batches, {cascades:>3} cascades"
            print(f"  {name:<9} {kind:<17} {counts}  {value:.1e}  {limit:.0e}  {absolute:.1e}")


# --- what these tests would notice ----------------------------------------------------------------------------------


@each_target
def test_rows_in_a_wrong_order_are_noticed(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(DECODE, heads_of(2), torch.float16, target)
    monkeypatch.setattr(CascadePlan, "rows", np.arange(sum(DECODE.rows)))
    assert not batch.error() <= 100 * TOLERANCE[torch.float16]


@each_target
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_level_is_noticed(target: str, lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(DECODE, heads_of(2), torch.float16, target)
    real = CascadePlan.levels

    def levels(self: CascadePlan, window_left: int = -1) -> list[Level]:
        found = real(self, window_left)
        return found[:lost] + found[lost + 1 :]

    monkeypatch.setattr(CascadePlan, "levels", levels)
    assert not batch.error() <= 100 * TOLERANCE[torch.float16]


@each_target
def test_a_window_on_a_shared_level_is_noticed(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan for no window, run with one: what FlashInfer's own wrapper for cascades does."""
    batch = Batch(DECODE, heads_of(2), torch.float16, target)
    real = CascadePlan.levels
    monkeypatch.setattr(CascadePlan, "levels", lambda self, window_left: real(self))
    assert not batch.error(Options(window_left=30)) <= 100 * TOLERANCE[torch.float16]


# --- the engine -----------------------------------------------------------------------------------------------------


@each_target
def test_a_prefix_that_ends_inside_a_page_is_shared_in_whole_pages(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """37 common tokens on pages of 16: two pages are read once, the other 5 tokens from each user's own third page."""
    sizes = {"num_pages": 60, "page_size": 16, "dtype": torch.float16}
    ours = make_engine(monkeypatch, target, **sizes, cascade=ALL)
    native = make_engine(monkeypatch, "native", **sizes)
    shared = list(range(37))

    def conversation(engine: radixkv.Engine) -> tuple[list[torch.Tensor], list[radixkv.Lease], CascadePlan]:
        with engine.acquire(shared) as lease:
            run_step(engine, [lease], torch.float16)
        leases = [engine.acquire([*shared, 40 + i]) for i in range(3)]
        assert [lease.num_cached for lease in leases] == [37] * 3
        outs = [run_step(engine, leases, torch.float16)]
        for i, lease in enumerate(leases):
            lease.extend([45 + i])
        with engine.step(leases) as step:
            plan = step.plan
            outs.append(run_step(engine, leases, torch.float16, step))
        return outs, leases, plan

    got, leases, plan = conversation(ours)
    want, _, _ = conversation(native)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-2 * b.abs().max()
    assert [tuple(lease.pages[:2]) for lease in leases] == [tuple(leases[0].pages[:2])] * 3
    assert len({int(lease.pages[2]) for lease in leases}) == 3
    (segment,) = plan.segments
    assert (len(segment.users), segment.token_begin, segment.token_end, segment.used) == (3, 0, 32, True)
    assert "3 users (0, 1, 2), pages 0 to 1, serves 32 tokens: used at level 0" in plan.explain()
