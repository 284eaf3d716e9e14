"""Decode steps for CUDA graphs: every step of one size has the same memory, and launches repeated over it are right.

A replay is emulated: the calls that a step makes to FlashInfer are noted with their very arguments, and made again in
a later step after nothing but its plan. No graph is captured here: neither the twin nor the emulated device can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import radixkv
from radixkv.attention import PageTable, flashinfer
from radixkv.attention.cascade import OFF
from radixkv.attention.flashinfer import FlashInferAttention, plans
from radixkv.attention.flashinfer.graphs import DecodeGraphs
from radixkv.attention.fp8 import quantize
from radixkv.errors import BackendUnavailable, InvalidArgument, LeaseError
from radixkv.formats import fp8
from radixkv.step import Step
from tests.attention.helpers import PLAIN, Options, Request, Tokens, error, random_sequence
from tests.attention.helpers import one_torch_thread as one_torch_thread
from tests.attention.test_attention_errors import TABLE, int32
from tests.flashinfer.helpers import (
    TOLERANCE,
    UNLIKE,
    WINDOWS,
    FlashInferPool,
    backend,
    each_dtype,
    each_target,
    heads_of,
    make_engine,
    run_step,
)
from tests.flashinfer.recorder import DECODE, SIZES, half, recorded, step

pytestmark = pytest.mark.usefixtures("one_torch_thread")
CHUNKS = Options(attention_chunk=24)
SHARED = PageTable(int32(0, 1, 2), int32(0, 2, 4), int32(5, 2, 5, 3), int32(1, 3), int32(8, 14))


class Launches:
    """What a captured graph holds: launches with their arguments, which `replay` makes again."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@contextmanager
def noted(attention: FlashInferAttention, launches: Launches) -> Iterator[None]:
    """Note the launches of append and run while they are made."""
    real, real_quantize, real_weigh = attention._api.append_paged_kv_cache, flashinfer.quantize, plans.weigh
    handles = [w.handle for w in attention._planned.values()]
    runs = [handle.run for handle in handles]

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            launches.calls.append(lambda: function(*arguments, **keywords))
            return function(*arguments, **keywords)

        return call

    def quantize_into_one_place(x: torch.Tensor, scale: float) -> torch.Tensor:
        kept = real_quantize(x, scale)
        bits = kept.view(torch.uint8)
        launches.calls.append(lambda: bits.copy_(real_quantize(x, scale).view(torch.uint8)))
        return kept

    flashinfer.quantize = quantize_into_one_place  # type: ignore[attr-defined]
    attention._api.append_paged_kv_cache, plans.weigh = note(real), note(real_weigh)
    for handle, run in zip(handles, runs, strict=True):
        handle.run = note(run)
    yield
    attention._api.append_paged_kv_cache, plans.weigh = real, real_weigh
    flashinfer.quantize = real_quantize  # type: ignore[attr-defined]
    for handle, run in zip(handles, runs, strict=True):
        handle.run = run


def graph_pool(target: str, group: int, dtype: torch.dtype, scales: tuple[float, float] | None) -> FlashInferPool:
    stored: dict[str, Any] = {"kv_format": fp8(*scales)} if scales else {}
    return FlashInferPool(heads_of(group), dtype, 120, 16, target=target, options={"cuda_graphs": True}, **stored)


def replayed_errors(
    target: str, dtype: torch.dtype, group: int, scales: tuple[float, float] | None = None
) -> Iterator[float]:
    """The error of each layer of five steps: captured at short contexts, replayed at others, longer and shorter.

    Two layers with different windows and one with chunks, that begin inside pages, and sinks; or one over 8-bit caches.
    """
    pool = graph_pool(target, group, dtype, scales)
    attention, device = pool.flashinfer, pool.flashinfer.device
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    sinks = torch.linspace(-2, 4, 2 * group, device=device)
    layers = [(PLAIN, None)] if scales else [(PLAIN, None), (Options(window_left=20), None), (CHUNKS, sinks)]
    q = torch.zeros(3, 2 * group, 64, dtype=dtype, device=device)
    k, v = (torch.zeros(3, 2, 64, dtype=dtype, device=device) for _ in range(2))
    outs = [torch.zeros_like(q) for _ in layers]
    launches = Launches()

    def layers_of_a_step() -> None:
        for (options, logits), out in zip(layers, outs, strict=True):
            attention.append(0, k, v)
            attention.run(0, q, out, options, logits)

    for number, lengths in enumerate([(17, 1, 33), (5, 6, 7), (600, 40, 700), (16, 64, 15), (2, 900, 1)]):
        requests = []
        for n in lengths:
            sequence = random_sequence(generator, n, pool.heads, dtype)
            if scales:
                exact = [quantize(x, s).to(dtype) * s for x, s in zip(sequence[1:], scales, strict=True)]
                sequence = Tokens(sequence.q, *exact)
            requests.append(Request(sequence, n, 1))
        attention.plan(pool.load(requests, rng))
        assert attention.graph_key == 3
        for place, name in ((q, "q"), (k, "k"), (v, "v")):
            place.copy_(torch.cat([getattr(r.sequence, name)[-1:] for r in requests]).to(device))
        if number == 0:
            layers_of_a_step()
            with noted(attention, launches):  # a capture in the same step, as Step.replay shows
                layers_of_a_step()
            assert len(launches.calls) == (4 if scales else 2 * len(layers) + 1)
        else:
            launches.replay()
        for (options, logits), out in zip(layers, outs, strict=True):
            yield error(list(out.cpu().split(1)), requests, options, None if logits is None else logits.cpu())
            out.fill_(torch.nan)


@each_target
@each_dtype
@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("scales", [None, (0.5, 0.0625)], ids=["16-bit", "8-bit"])
def test_launches_repeated_after_a_new_plan(
    target: str, dtype: torch.dtype, group: int, scales: tuple[float, float] | None
) -> None:
    errors = list(replayed_errors(target, dtype, group, scales))
    assert len(errors) == (5 if scales else 15)
    assert max(errors) <= TOLERANCE[dtype]


@each_target
@pytest.mark.parametrize("group", [2, 4])
def test_a_schedule_of_an_earlier_step_is_noticed(target: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaying without having planned the wrappers again: the twin raises, the kernels compute something else."""
    real = DecodeGraphs.plan

    def plan(self: DecodeGraphs, batch: int, *arguments: Any) -> Any:
        return self._wrappers[batch] if batch in self._wrappers else real(self, batch, *arguments)

    monkeypatch.setattr(DecodeGraphs, "plan", plan)
    errors = []
    with pytest.raises(AssertionError):
        for found in replayed_errors(target, torch.float16, group):
            errors.append(found)
            assert found <= 100 * TOLERANCE[torch.float16]
    assert len(errors) >= 2


@each_target
def test_the_memory_of_steps_of_one_size_is_the_same(target: str) -> None:
    attention = backend(target, **SIZES, cuda_graphs=True)
    places: dict[int, set[tuple[int, ...]]] = {}
    tables = {
        2: DECODE,
        3: PageTable(*(int32(*a) for a in ([0, 1, 2, 3], [0, 1, 2, 4], [0, 6, 3, 5], [1, 4, 3], [0, 27, 22]))),
    }
    longer = PageTable(int32(0, 1, 2), int32(0, 3, 5), int32(3, 1, 0, 6, 2), int32(2, 4), int32(1, 11))
    for table in (tables[2], longer, tables[3], SHARED, tables[2], TABLE, tables[3], longer):
        attention.plan(table)
        if attention.graph_key is None:
            assert table is TABLE
            continue
        assert attention._step is not None
        arrays = attention._step.arrays
        assert [a.tolist() for a in arrays.device] == [a.tolist() for a in arrays.host]
        assert arrays.device.kv_indices.tolist() == table.kv_indices.tolist()
        places.setdefault(attention.graph_key, set()).add(tuple(a.data_ptr() for a in arrays.device))
    assert {key: len(found) for key, found in places.items()} == {2: 1, 3: 1}


def test_graph_wrappers_are_made_once_and_planned_in_every_step() -> None:
    attention, api = recorded(cuda_graphs=True)
    out = half(2, 6, 64)
    step(attention, DECODE, PLAIN, Options(window_left=3), PLAIN)
    assert len(api.named("__init__")) == 2
    api.calls.clear()
    attention.plan(SHARED)
    assert [keywords["window_left"] for _, keywords in api.named(".plan")] == [-1, 3]  # nothing ran, all is planned
    assert all(arguments[1].tolist() == [5, 2, 5, 3] for arguments, _ in api.named(".plan"))
    attention.run(0, half(2, 6, 64), out)
    assert [name for name, _, _ in api.calls] == ["BatchDecodeWithPagedKVCacheWrapper.plan"] * 2 + [
        "BatchDecodeWithPagedKVCacheWrapper.run"
    ]


def test_the_tables_of_chunks_stay_where_they_are() -> None:
    """In memory of their own, however long the requests are. Pages of 6 in chunks of 4 are read as pages of 2."""
    attention, api = recorded(cuda_graphs=True, page_size=6, num_pages=9)
    longer = PageTable(int32(0, 1, 2), int32(0, 3, 5), int32(3, 1, 0, 6, 2), int32(2, 4), int32(1, 15))
    step(attention, DECODE._replace(slots=int32(7, 3)), PLAIN, Options(attention_chunk=4))
    _, (_, made) = api.named("BatchDecodeWithPagedKVCacheWrapper.__init__")
    _, (first, _) = api.named("BatchDecodeWithPagedKVCacheWrapper.plan")
    assert [x.tolist() for x in first[:3]] == [[0, 2, 4], [11, 3, 0, 1], [2, 2]]
    attention.plan(longer)
    attention.run(0, half(2, 6, 64), half(2, 6, 64), Options(attention_chunk=4))
    _, _, _, (second, _) = api.named("BatchDecodeWithPagedKVCacheWrapper.plan")
    assert [x.tolist() for x in second[:3]] == [[0, 1, 2], [0, 7], [2, 2]]
    assert first[6] == second[6] == 2
    assert first[1].data_ptr() == second[1].data_ptr() == made["paged_kv_indices_buffer"].data_ptr()
    assert made["paged_kv_indptr_buffer"].tolist() == [0, 1, 2]
    assert made["paged_kv_last_page_len_buffer"].tolist() == [2, 2]
    assert api.named(".run")[-1][0][1][0].shape == (27, 2, 2, 64)
    assert attention.graph_window == -1


def test_graph_wrappers_read_the_memory_of_the_index_arrays() -> None:
    attention, api = recorded(cuda_graphs=True)
    step(attention, DECODE)
    ((arguments, keywords),) = api.named("BatchDecodeWithPagedKVCacheWrapper.__init__")
    assert arguments[1:] == ("NHD",)
    assert keywords["use_cuda_graph"] is True
    ((appended, _),) = api.named("append_paged_kv_cache")
    kv_indices, kv_indptr, last = appended[5:]
    assert keywords["paged_kv_indptr_buffer"].data_ptr() == kv_indptr.data_ptr()
    assert keywords["paged_kv_last_page_len_buffer"].data_ptr() == last.data_ptr()
    assert keywords["paged_kv_indices_buffer"].data_ptr() == kv_indices.data_ptr()
    assert len(keywords["paged_kv_indices_buffer"]) > 4 * SIZES["num_pages"]


def test_workspaces_stay_where_a_graph_found_them() -> None:
    attention, api = recorded(cuda_graphs=True)
    step(attention, DECODE)
    api.float_bytes = 64 << 20
    with pytest.raises(RuntimeError, match="Buffer overflow"):
        attention.plan(DECODE)
    assert len(api.named("reset_workspace_buffer")) == 1


def test_which_steps_have_a_key() -> None:
    attention, _ = recorded(cuda_graphs=True)
    assert attention.graph_key is None
    for table, key in ((DECODE, 2), (TABLE, None), (SHARED, 2)):
        attention.plan(table)
        assert attention.graph_key == key
    assert not attention.cascade.shared
    assert "can be replayed from CUDA graphs, which have no cascade" in attention.cascade.explain()
    assert "not used, cascade is off" in attention.cascade.explain()
    attention, _ = recorded()
    attention.plan(DECODE)
    assert attention.graph_key is None


def test_steps_that_the_memory_does_not_hold_have_no_key() -> None:
    """Pages may occur several times in a step's table, but not any number of times."""
    attention, _ = recorded(cuda_graphs=True, num_pages=70000, page_size=1, cascade=OFF)
    pages = np.tile(np.arange(60000, dtype=np.int32), 5)
    for requests, key in ((4, 4), (5, None)):
        own = np.arange(60001, 60001 + requests, dtype=np.int32)
        each = np.column_stack([pages[: 60000 * requests].reshape(requests, -1), own]).ravel()
        ones = np.arange(requests + 1, dtype=np.int32)
        attention.plan(PageTable(ones, ones * 60001, each, np.ones(requests, np.int32), own))
        assert attention.graph_key == key


def test_what_must_not_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, api = recorded(cuda_graphs=True)
    q = half(2, 6, 64)
    attention.plan(DECODE)
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(attention, "device", torch.device("cuda", 0))
    monkeypatch.setattr(attention, "_check", lambda *arguments: None)
    with pytest.raises(InvalidArgument, match="plans, which must not be captured.* run a step that has a graph_key"):
        attention.run(0, q, q.clone())
    capturing[0] = False
    attention.run(0, q, q.clone())
    capturing[0] = True
    attention.run(0, q, q.clone())
    capturing[0] = False
    attention.plan(TABLE)
    attention.run(0, half(6, 6, 64), half(6, 6, 64))
    capturing[0] = True
    with pytest.raises(InvalidArgument, match="this step must not be captured, as later ones have other memory"):
        attention.run(0, half(6, 6, 64), half(6, 6, 64))
    assert len(api.named(".run")) == 3


# --- the engine -----------------------------------------------------------------------------------------------------


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph: a toy model's forward pass over the tensors of the step it was made in."""

    def __init__(self, engine: radixkv.Engine, step: Step, windows: list[int]) -> None:
        self.engine, self.replays, self.windows = engine, 0, windows
        self.inputs = SimpleNamespace(
            input_ids=step.input_ids, positions=step.positions, last_rows=step.last_rows, attend=self.attend
        )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window_left: int) -> torch.Tensor:
        out = torch.empty_like(q)
        self.engine.attention.append(layer, k, v)
        self.engine.attention.run(layer, q, out, Options(window_left=window_left))
        return out

    def replay(self) -> None:
        self.replays += 1
        self.out = run_step(self.engine, [], torch.float16, self.inputs, self.windows)


@each_target
@pytest.mark.parametrize(
    ("layers", "windows", "tolerance"), [({}, [-1, -1], 1e-2), (UNLIKE, WINDOWS, 5e-2)], ids=["alike", "unlike"]
)
def test_an_inference_loop_with_graphs(
    target: str, layers: dict[str, Any], windows: list[int], tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop of Step.replay's docstring against the native engine, over leases that come and go."""
    dtype = torch.float16
    sizes = {"num_pages": 60, "page_size": 16, "dtype": dtype, **layers}
    ours = make_engine(monkeypatch, target, **sizes, cuda_graphs=True)
    native = make_engine(monkeypatch, "native", **sizes)
    rng = np.random.default_rng(0)
    graphs: dict[int, FakeGraph] = {}
    pairs: list[tuple[radixkv.Lease, radixkv.Lease]] = []
    places: dict[int, set[tuple[int, ...]]] = {}
    for turn in range(24):
        if turn % 5 == 0:
            tokens = rng.integers(0, 50, 20 + turn).tolist()
            pairs.append((ours.acquire(tokens), native.acquire(tokens)))
        want = run_step(native, [b for _, b in pairs], dtype, windows=windows)
        leases = [a for a, _ in pairs]
        with ours.step(leases) as step:
            key = step.graph_key
            assert key == (None if turn % 5 == 0 else len(leases))
            if key in graphs:
                step.replay(graphs[key])  # type: ignore[arg-type]
                got = graphs[key].out
            else:
                got = run_step(ours, leases, dtype, step, windows)
                if key is not None:
                    graphs[key] = FakeGraph(ours, step, windows)
            if key is not None:
                inputs = (step.input_ids, step.positions, step.last_rows)
                places.setdefault(key, set()).add(tuple(x.data_ptr() for x in inputs))
        assert (got - want).abs().max() <= tolerance * want.abs().max()
        for pair in pairs:
            token = int(rng.integers(0, 50))
            for lease in pair:
                lease.extend([token])
        if turn % 7 == 6:
            for lease in pairs.pop(0):
                lease.release()
    ours.cache.check()
    assert sum(graph.replays for graph in graphs.values()) >= 8
    assert all(len(found) == 1 for found in places.values())


def test_replays_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(monkeypatch, "native", num_pages=8, dtype=torch.float32)
    lease = engine.acquire([1, 2])
    step, graph = engine.step([lease]), Launches()
    with pytest.raises(LeaseError, match="replay inside"):
        step.replay(graph)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="a step of 1 leases and 2 rows without a graph_key"), step:
        assert step.graph_key is None
        step.replay(graph)  # type: ignore[arg-type]
    assert lease.num_written == 0
    with pytest.raises(BackendUnavailable, match="cuda_graphs on cpu: leave it out there, or use device='cuda'"):
        make_engine(monkeypatch, "native", num_pages=8, cuda_graphs=True)


@each_target
def test_a_replay_does_not_look_at_dropped_pages(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float16
    engine = make_engine(monkeypatch, target, num_pages=60, page_size=16, dtype=dtype, cuda_graphs=True)
    lease, graph = engine.acquire(list(range(40))), Launches()
    for _ in range(2):  # the second can be captured; its layers have no window
        with engine.step([lease]) as step:
            run_step(engine, [lease], dtype, step)
        lease.extend([1])
    assert lease.drop(16) == 1
    with (
        pytest.raises(InvalidArgument, match="window_left is -1, but a lease .* look back 25 keys at most"),
        engine.step([lease]) as step,
    ):
        step.replay(graph)  # type: ignore[arg-type]
    assert lease.num_written == 41
    lease.release()
