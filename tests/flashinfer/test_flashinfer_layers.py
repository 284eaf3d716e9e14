"""FlashInfer over layers that differ in heads, head_dim, format, window and soft cap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import radixkv
from radixkv.attention.flashinfer import FlashInferAttention
from radixkv.attention.flashinfer.plans import PlanSet
from radixkv.formats import LayerFormat, fp8, layer_formats
from radixkv.pool import KVPool
from radixkv.shape import LayerShape
from tests.attention.cascade_helpers import ALL, Forest
from tests.attention.helpers import PLAIN, Heads, Options
from tests.attention.helpers import one_torch_thread as one_torch_thread
from tests.attention.test_attention_errors import TABLE
from tests.flashinfer.helpers import (
    TOLERANCE,
    UNLIKE,
    VOCAB,
    WINDOWS,
    backend_over,
    each_target,
    heads_of,
    make_engine,
    run_step,
)
from tests.flashinfer.recorder import DECODE, Recorder, half, one_layer
from tests.flashinfer.test_flashinfer_cascade import DECODE as DECODE_FOREST
from tests.flashinfer.test_flashinfer_cascade import MIXED, Batch
from tests.flashinfer.test_flashinfer_contract import SHARED

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Kinds A (twice), B, C (8 bits, twice, with other scales), D (not merged).
SHAPES = [LayerShape(6, 2, dim) for dim in (64, 128, 64, 64, 64, 192)]
FORMATS = [None, None, fp8(0.5, 0.25), None, fp8(2.0, 4.0), None]


def recorded_layers(
    shapes: list[LayerShape] = SHAPES, formats: list[LayerFormat | None] = FORMATS, **options: object
) -> tuple[FlashInferAttention, Recorder]:
    api = Recorder()
    pool = KVPool(shapes, layer_formats(formats, "float16", len(shapes)), 8, 4, torch.device("cpu"))
    return FlashInferAttention(pool.layers, dtype=torch.float16, **options, api=api), api  # type: ignore[arg-type]


def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Entries of each copy of index arrays to the device."""
    sent: list[int] = []
    real = PlanSet._send

    def count(self: PlanSet, begin: int, entries: int) -> None:
        sent.append(entries)
        real(self, begin, entries)

    monkeypatch.setattr(PlanSet, "_send", count)
    return sent


# --- what is called -------------------------------------------------------------------------------------------------


def test_a_plan_for_each_kind_of_layers_from_the_same_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, api = recorded_layers()
    sent = copies(monkeypatch)
    for _ in range(4):
        attention.plan(TABLE)
        for layer in range(len(SHAPES)):
            one_layer(attention, layer, 6)
    assert len(sent) == 4
    plans = api.named("PrefillWithPagedKVCacheWrapper.plan")
    assert [(a[6], k["kv_data_type"]) for a, k in plans] == 4 * [
        (64, torch.float16),
        (128, torch.float16),
        (64, torch.float8_e4m3fn),
        (192, torch.float16),
    ]
    for step in range(0, 16, 4):
        assert len({tuple(x.data_ptr() for x in arguments[:4]) for arguments, _ in plans[step : step + 4]}) == 1
    assert len(api.named("__init__")) == 8  # two sets of four
    scratch = {arguments[0].data_ptr() for arguments, _ in api.named("reset_workspace_buffer")}
    assert len(scratch) == 1  # kernels run one after the other


def test_each_layer_has_its_own_pages_and_scales() -> None:
    attention, api = recorded_layers()
    attention.plan(TABLE)
    for layer in range(len(SHAPES)):
        one_layer(attention, layer, 6)
    runs = api.named(".run")
    assert [arguments[1][0].data_ptr() for arguments, _ in runs] == [e.kv.k.data_ptr() for e in attention._layers]
    scales = [(k.get("k_scale"), k.get("v_scale")) for _, k in runs]
    assert scales == [(None, None), (None, None), (0.5, 0.25), (None, None), (2.0, 4.0), (None, None)]
    appended = [(arguments[4][1].data_ptr(), arguments[0].dtype) for arguments, _ in api.named("append_paged_kv_cache")]
    assert appended == [(e.kv.v.data_ptr(), e.kv.v.dtype) for e in attention._layers[:5]]  # the last one is not merged


def test_layers_of_one_kind_are_planned_as_one_layer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of layers, scales of 8 bits of their own included: one plan, one copy."""
    for formats in ([None] * 5, [fp8(), fp8(0.5), fp8(0.5, 2.0), fp8(), fp8()]):
        attention, api = recorded_layers([LayerShape(6, 2, 64)] * 5, formats)
        sent = copies(monkeypatch)
        for table, rows in ((TABLE, 6), (DECODE, 2)):
            sent.clear()
            api.calls.clear()
            attention.plan(table)
            for layer in range(5):
                one_layer(attention, layer, rows)
            assert len(sent) == len(api.named(".plan")) == 1
            assert len(api.named(".run")) == 5


def test_tensor_cores_by_kind() -> None:
    attention, api = recorded_layers([LayerShape(6, 2, 64), LayerShape(8, 2, 64), LayerShape(6, 2, 128)], [None] * 3)
    attention.plan(DECODE)
    for layer in range(3):
        one_layer(attention, layer, 2)
    made = api.named("BatchDecodeWithPagedKVCacheWrapper.__init__")
    assert [keywords["use_tensor_cores"] for _, keywords in made] == [False, True, False]


def test_kinds_share_the_levels_of_a_cascade(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied once for each window; a kind without a kernel that merges reads its own."""
    attention, api = recorded_layers(cascade=ALL)
    sent = copies(monkeypatch)
    attention.plan(SHARED)
    for layer in range(len(SHAPES)):
        one_layer(attention, layer, 5)
        one_layer(attention, layer, 5, Options(logits_soft_cap=2.0))
    assert len(sent) == 2
    one_layer(attention, 1, 5, Options(window_left=11))
    one_layer(attention, 2, 5, Options(window_left=11))
    assert len(sent) == 3
    plans = [(a, k) for a, k in api.named("PrefillWithPagedKVCacheWrapper.plan") if k["window_left"] == -1]
    shared = [a for a, k in plans if not k["causal"]]
    assert [a[6] for a in shared] == [64, 64, 128, 128, 64, 64, 128, 64]
    assert len({a[2].data_ptr() for a in shared[:6]}) == 1
    whole = [a for a, k in plans if k["causal"] and len(a[2]) == 9]
    assert [a[6] for a in whole] == [192, 192]
    assert len(api.named("merge_state_in_place")) == 12
    explained = attention.cascade.explain()
    assert "1 used in 1 levels" in explained
    assert "cascade is for head_dim 64, 128, 256: FlashInfer merges no others" in explained


def test_warm_up_runs_every_kind() -> None:
    attention, api = recorded_layers()
    attention.warm_up()
    plans = api.named("WithPagedKVCacheWrapper.plan")
    assert [a[-2] for a, _ in plans] == [64, 128, 64, 192] * 2
    assert len(api.named("merge_state_in_place")) == 3


def test_graph_wrappers_for_each_kind() -> None:
    attention, api = recorded_layers(cuda_graphs=True)
    assert attention.graph_window == 0
    attention.plan(DECODE)
    assert (attention.graph_key, attention.graph_window) == (2, 0)
    for layer in range(len(SHAPES)):
        one_layer(attention, layer, 2, Options(window_left=3 + layer))
    assert attention.graph_window == 8
    assert len(api.named("__init__")) == 6
    api.calls.clear()
    attention.plan(DECODE)
    assert [a[5] for a, _ in api.named(".plan")] == [64, 128, 64, 64, 64, 192]
    one_layer(attention, 1, 2)
    assert attention.graph_window == -1
    attention.plan(TABLE)
    assert (attention.graph_key, attention.graph_window) == (None, 0)


def test_rows_of_another_layer_are_refused() -> None:
    attention, api = recorded_layers()
    attention.plan(TABLE)
    with pytest.raises(radixkv.InvalidArgument, match=r"q has shape \(6, 6, 64\): it must be \(6, 6, 128\)"):
        attention.run(1, half(6, 6, 64), half(6, 6, 64))
    with pytest.raises(radixkv.InvalidArgument, match=r"k has shape \(6, 2, 128\): it must be \(6, 2, 64\)"):
        attention.append(2, half(6, 2, 128), half(6, 2, 128))
    assert api.calls == []


# --- what comes out -------------------------------------------------------------------------------------------------

EIGHT_BIT, FINER = (0.5, 0.0625), (0.25, 0.125)
LAYERS: list[tuple[Heads, tuple[float, float] | None, Options]] = [
    (heads_of(2), None, Options(window_left=70)),
    (heads_of(4, 1, 128), None, PLAIN),
    (heads_of(2), EIGHT_BIT, PLAIN),
    (heads_of(7), None, PLAIN),
    (heads_of(2), FINER, PLAIN),
    (heads_of(2, 2, 192), None, PLAIN),
    (heads_of(2), None, Options(logits_soft_cap=5.0)),
    (heads_of(2), None, PLAIN),
]
"""Heads, scales if in 8 bits, and what layers as Gemma's ask for."""


@each_target
@pytest.mark.parametrize("forest", [DECODE_FOREST, MIXED], ids=["decode", "mixed"])
def test_a_layer_among_others_has_the_bits_that_it_has_alone(target: str, forest: Forest) -> None:
    """In a cascade of three levels and two families, of which 192 has none; and what they are is the oracle's."""
    batches = [
        Batch(forest, heads, torch.float16, target, seed, scales) for seed, (heads, scales, _) in enumerate(LAYERS)
    ]
    attention = backend_over(target, [b.attention._layers[0].kv for b in batches], torch.float16, cascade=ALL)
    for _ in range(2):
        attention.plan(forest.table())
        assert attention.cascade.shared
        for layer, (batch, (_, _, options)) in enumerate(zip(batches, LAYERS, strict=True)):
            out = batch.run(attention, layer, options)
            assert batch.judge(out, options) <= TOLERANCE[torch.float16], layer
            batch.attention.plan(forest.table())
            assert torch.equal(out, batch.run(batch.attention, 0, options)), layer


@each_target
def test_a_layer_served_as_another_is_noticed(target: str) -> None:
    """8-bit pages with the scales of another layer."""
    batches = [Batch(MIXED, heads_of(2), torch.float16, target, 0, scales) for scales in (EIGHT_BIT, FINER)]
    attention = backend_over(target, [b.attention._layers[0].kv for b in batches], torch.float16, cascade=ALL)
    first, second = attention._layers
    attention._layers = [first, second._replace(scales=first.scales)]
    attention.plan(MIXED.table())
    assert batches[0].judge(batches[0].run(attention, 0), PLAIN) <= TOLERANCE[torch.float16]
    assert batches[1].judge(batches[1].run(attention, 1), PLAIN) > 10 * TOLERANCE[torch.float16]


@each_target
@pytest.mark.parametrize("page_size", [1, 16])
def test_an_engine_of_layers_that_differ(target: str, page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the native engine of the same layers: hits, page copies, mixed steps, decode steps, a cascade."""
    dtype = torch.float16
    sizes = {"num_pages": 600 // page_size, "page_size": page_size, "dtype": dtype, **UNLIKE}
    ours = make_engine(monkeypatch, target, **sizes, cascade=ALL)
    native = make_engine(monkeypatch, "native", **sizes)
    rng = np.random.default_rng(page_size)
    shared = rng.integers(0, VOCAB, 37).tolist()
    for engine in (ours, native):
        with engine.acquire(shared) as lease:
            run_step(engine, [lease], dtype, windows=WINDOWS)
    leases: list[tuple[radixkv.Lease, radixkv.Lease]] = []
    cascades = 0
    for turn in range(8):
        if turn % 3 == 0 or len(leases) < 2:
            tokens = shared[: rng.integers(20, 38)] + rng.integers(0, VOCAB, rng.integers(1, 30)).tolist()
            leases.append((ours.acquire(tokens), native.acquire(tokens)))
        with ours.step([a for a, _ in leases]) as step:
            got = run_step(ours, [], dtype, step, WINDOWS)
            cascades += step.plan.shared
        want = run_step(native, [b for _, b in leases], dtype, windows=WINDOWS)
        difference = (got - want).float().abs()
        assert difference.mean() / want.float().abs().mean() <= 1e-2
        for pair in leases:
            token = int(rng.integers(0, VOCAB))
            for lease in pair:
                lease.extend([token])
        if turn % 4 == 3:
            for lease in leases.pop(0):
                lease.release()
    ours.cache.check()
    assert cascades >= 4
    assert ours.cache.stats().hit_tokens == native.cache.stats().hit_tokens > 0
    assert ours.pool.nbytes == native.pool.nbytes
