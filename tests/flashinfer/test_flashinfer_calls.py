"""Exactly what the FlashInfer backend calls.

FlashInfer is replaced by a recorder here, so this runs everywhere. Where FlashInfer is installed, every recorded call
is bound to the signature of the real function.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import numpy as np
import pytest
import torch

import radixkv.attention.flashinfer.kernels
from radixkv.attention import PageTable
from radixkv.attention.cascade import OFF
from radixkv.attention.fp8 import FP8
from radixkv.errors import BackendUnavailable
from radixkv.formats import fp8
from tests.attention.cascade_helpers import ALL
from tests.attention.helpers import PLAIN, Heads, Options
from tests.attention.test_attention_errors import TABLE, int32
from tests.flashinfer.recorder import DECODE, half, recorded, step
from tests.flashinfer.test_flashinfer_contract import SHARED

needs_flashinfer = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="no flashinfer to compare with: pip install 'radixkv[cuda]'"
)


@pytest.fixture(autouse=True)
def nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radixkv.attention.flashinfer.kernels, "_prepared", set())


def test_mixed_steps_use_prefill_and_decode_steps_decode(capsys: pytest.CaptureFixture[str]) -> None:
    attention, api = recorded()
    step(attention, TABLE)
    ((arguments, keywords),) = api.named("BatchPrefillWithPagedKVCacheWrapper.plan")
    assert [a.tolist() for a in arguments[:4]] == [[0, 2, 6], [0, 2, 3], [3, 1, 0], [2, 4]]
    assert all(a.dtype == torch.int32 and a.is_contiguous() for a in arguments[:4])
    assert arguments[4:] == (6, 2, 64, 4)
    half_ = torch.float16
    types = {"q_data_type": half_, "kv_data_type": half_, "o_data_type": half_}
    assert keywords == types | {"causal": True, "sm_scale": 0.125, "window_left": -1, "logits_soft_cap": 0.0}
    step(attention, DECODE)
    ((arguments, keywords),) = api.named("BatchDecodeWithPagedKVCacheWrapper.plan")
    assert [a.tolist() for a in arguments[:3]] == [[0, 2, 3], [3, 1, 0], [2, 4]]
    assert arguments[3:] == (6, 2, 64, 4)
    assert keywords == types | {"sm_scale": 0.125, "window_left": -1, "logits_soft_cap": 0.0}
    for arguments, keywords in api.named("__init__"):
        assert arguments[1:] == ("NHD",)
        assert keywords["backend"] == "fa2"
    said = capsys.readouterr().err
    assert [said.count(f"prepares its {kind} kernels for float16") for kind in ("append", "prefill", "decode")] == [
        1
    ] * 3


@pytest.mark.parametrize(
    ("group", "tensor_cores"), [(1, False), (2, False), (3, False), (4, True), (7, True), (8, True)]
)
def test_tensor_cores_decode_large_groups(group: int, tensor_cores: bool) -> None:
    attention, api = recorded(heads=Heads(2 * group, 2, 64))
    step(attention, DECODE)
    ((_, keywords),) = api.named("BatchDecodeWithPagedKVCacheWrapper.__init__")
    assert keywords == {"use_tensor_cores": group >= 4, "backend": "fa2"}


def test_rows_are_appended_at_their_positions() -> None:
    attention, api = recorded()
    step(attention, TABLE)
    ((arguments, keywords),) = api.named("append_paged_kv_cache")
    _, _, request, position, caches, kv_indices, kv_indptr, last = arguments
    assert request.tolist() == [0, 0, 1, 1, 1, 1]
    assert position.tolist() == [4, 5, 0, 1, 2, 3]
    assert isinstance(caches, tuple)
    assert [x.data_ptr() for x in caches] == [
        x.data_ptr() for x in (attention._layers[0].kv.k, attention._layers[0].kv.v)
    ]
    assert [kv_indices.tolist(), kv_indptr.tolist(), last.tolist()] == [[3, 1, 0], [0, 2, 3], [2, 4]]
    assert all(a.dtype == torch.int32 for a in (request, position, kv_indices, kv_indptr, last))
    assert keywords == {"kv_layout": "NHD"}


def test_one_plan_for_each_combination_of_options_and_two_sets_of_wrappers() -> None:
    attention, api = recorded()
    local, whole = Options(window_left=3, sm_scale=0.5), Options(logits_soft_cap=9.0)
    for _ in range(5):
        step(attention, TABLE, local, whole, local, whole, whole)
    assert len(api.named("WithPagedKVCacheWrapper.run")) == 25
    plans = [keywords for _, keywords in api.named(".plan")]
    assert [(p["sm_scale"], p["window_left"], p["logits_soft_cap"]) for p in plans] == [
        (0.5, 3, 0.0),
        (0.125, -1, 9.0),
    ] * 5
    assert len(api.named("__init__")) == 4  # two sets of two


def test_two_steps_never_share_index_arrays() -> None:
    attention, api = recorded()
    for _ in range(4):
        step(attention, TABLE)
    places = [arguments[0].data_ptr() for arguments, _ in api.named(".plan")]
    assert places[0] == places[2] != places[1] == places[3]


def test_workspaces_grow_when_a_plan_needs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, api = recorded()
    step(attention, TABLE)
    ((buffers, _),) = api.named("reset_workspace_buffer")
    assert [len(b) for b in buffers] == [4 << 20, 1 << 18]
    assert all(b.dtype == torch.uint8 for b in buffers)
    step(attention, TABLE)  # the other set's wrapper begins with the larger workspace
    api.float_bytes = 9 << 20
    step(attention, TABLE)
    assert [len(b[0]) for b, _ in api.named("reset_workspace_buffer")] == [4 << 20, 4 << 20, 16 << 20]


def test_8_bit_caches_are_planned_appended_and_scaled_as_such() -> None:
    attention, api = recorded(kv_format=fp8(0.5, 0.25))
    attention.plan(DECODE)
    attention.append(0, half(2, 2, 64) + 3, half(2, 2, 64) + 3)
    attention.run(0, half(2, 6, 64), half(2, 6, 64))
    ((arguments, _),) = api.named("append_paged_kv_cache")
    assert [x.dtype for x in arguments[:2]] == [FP8, FP8]
    assert [x.float().unique().tolist() for x in arguments[:2]] == [[6.0], [12.0]]
    ((_, keywords),) = api.named("BatchDecodeWithPagedKVCacheWrapper.__init__")
    assert keywords["use_tensor_cores"]
    ((_, keywords),) = api.named(".plan")
    assert (keywords["q_data_type"], keywords["kv_data_type"]) == (torch.float16, FP8)
    ((_, keywords),) = api.named("WithPagedKVCacheWrapper.run")
    assert (keywords["k_scale"], keywords["v_scale"]) == (0.5, 0.25)


def test_a_cascade_runs_its_levels_and_merges_their_states() -> None:
    """Rows are in the users' order already here: q goes in as it is, and the last level writes into out."""
    attention, api = recorded(cascade=ALL)
    step(attention, SHARED)
    shared, own = api.named("BatchPrefillWithPagedKVCacheWrapper.plan")
    assert [a.tolist() for a in shared[0][:4]] == [[0, 5], [0, 2], [5, 1], [4]]
    assert [a.tolist() for a in own[0][:4]] == [[0, 3, 4, 5], [0, 1, 2, 3], [2, 3, 4], [3, 1, 4]]
    assert all(a.dtype == torch.int32 and a.is_contiguous() for a in (*shared[0][:4], *own[0][:4]))
    assert [keywords["causal"] for _, keywords in (shared, own)] == [False, True]
    runs = api.named("BatchPrefillWithPagedKVCacheWrapper.run")
    assert all(keywords["return_lse"] and len(keywords) == 3 for _, keywords in runs)
    assert [arguments[0].data_ptr() for arguments, _ in runs] == [runs[0][0][0].data_ptr()] * 2
    ((merged, nothing),) = api.named("merge_state_in_place")
    assert nothing == {}
    places = [x.data_ptr() for x in (runs[0][1]["out"], runs[0][1]["lse"], runs[1][1]["out"], runs[1][1]["lse"])]
    assert [x.data_ptr() for x in merged] == places
    assert [tuple(x.shape) for x in merged] == [(5, 6, 64), (5, 6), (5, 6, 64), (5, 6)]
    assert [x.dtype for x in merged] == [torch.float16, torch.float32] * 2


def test_rows_go_into_the_users_order_and_back() -> None:
    """Requests 0 and 2 share a page, 1 does not: 0, 2, 1 or another order that keeps users together."""
    table = PageTable(
        int32(0, 2, 3, 5), int32(0, 2, 3, 5), int32(5, 2, 3, 5, 4), int32(2, 1, 3), int32(8, 9, 12, 17, 18)
    )
    attention, api = recorded(cascade=ALL)
    attention.plan(table)
    q = torch.arange(5.0).half()[:, None, None].expand(5, 6, 64).contiguous()
    out = half(5, 6, 64)

    def keep_rows(*arguments: Any, **keywords: Any) -> None:
        keywords["out"].copy_(arguments[0])

    attention.run(0, q, out)
    for wrappers in attention._sets[attention._turn].wrappers.values():
        for wrapper in wrappers:
            wrapper.handle.run = keep_rows
    attention.run(0, q, out)
    assert torch.equal(out, q)
    rows = attention.cascade.rows.tolist()
    assert rows != list(range(5))
    assert api.named(".run")[0][0][0][:, 0, 0].tolist() == rows
    last_level = api.named(".plan")[-1][0]
    assert last_level[0].tolist() == [0, *np.cumsum([(2, 1, 2)[b] for b in attention.cascade.order])]


def test_scales_of_8_bit_caches_in_a_cascade() -> None:
    """k_scale belongs to every level's logits; v_scale is a factor of the merged sum, once."""
    attention, api = recorded(cascade=ALL, kv_format=fp8(0.5, 0.25))
    attention.plan(SHARED)
    out = half(5, 6, 64)
    attention.run(0, half(5, 6, 64), out)
    runs = [keywords for _, keywords in api.named(".run")]
    assert [keywords["k_scale"] for keywords in runs] == [0.5, 0.5]
    assert not any("v_scale" in keywords for keywords in runs)
    assert (out == 0.25).all()


def test_windows_of_a_cascade() -> None:
    """All of the segment in all windows: a level without window. All before them: no level. Cut: the plain plan."""
    attention, api = recorded(cascade=ALL, num_pages=8)
    assert attention.cascade.segments == ()
    step(attention, SHARED, *(Options(window_left=n) for n in (11, 0, 5)))
    windows = [(k["window_left"], k["causal"], len(a[2])) for a, k in api.named("PrefillWithPagedKVCacheWrapper.plan")]
    assert windows == [(-1, False, 2), (11, True, 3), (0, True, 9), (5, True, 9)]
    assert "if a window cuts it, they read it and what follows one by one" in attention.cascade.explain()


def test_what_is_not_run_as_a_cascade_is_not_explained_as_one() -> None:
    for options, remark in (
        ({"cascade": OFF}, "cascade is off"),
        (
            {"cascade": ALL, "heads": Heads(6, 2, 192)},
            "not used, cascade is off\n  cascade is for head_dim 64, 128, 256",
        ),
        ({}, "not used, too few users: 3, at least 4 wanted"),
    ):
        attention, _ = recorded(**options)
        attention.plan(SHARED)
        assert not attention.cascade.shared
        assert remark in attention.cascade.explain()


def test_windows_wider_than_the_pool_are_none() -> None:
    attention, api = recorded()
    step(attention, TABLE, *(Options(window_left=n) for n in (31, 32, 2**31 - 1)))
    assert [keywords["window_left"] for _, keywords in api.named(".plan")] == [31, -1]


def test_kernels_that_cannot_be_compiled() -> None:
    attention, api = recorded()
    api.error = RuntimeError("Could not find nvcc")
    with pytest.raises(BackendUnavailable, match="prefill kernels .* Could not find nvcc.* install the CUDA toolkit"):
        step(attention, TABLE)


def test_warm_up_runs_a_token_and_then_two() -> None:
    for page_size in (1, 4):
        attention, api = recorded(page_size=page_size)
        attention.warm_up()
        assert [name.split("With")[0] for name, _, _ in api.calls if name.endswith(".run")] == [
            "BatchDecode",
            "BatchPrefill",
        ]
        assert len(api.named("append_paged_kv_cache")) == 2
        assert len(api.named("merge_state_in_place")) == 1


@needs_flashinfer
def test_every_call_fits_the_installed_flashinfer() -> None:
    """The signature of each real function takes each recorded call."""
    import flashinfer

    attention, api = recorded()
    for table in (TABLE, DECODE):
        step(attention, table, PLAIN, Options(window_left=3, logits_soft_cap=2.0))
    api.float_bytes = 64 << 20
    step(attention, TABLE)
    eight_bit, other = recorded(kv_format="fp8")
    eight_bit.warm_up()
    shared, levels = recorded(cascade=ALL)
    step(shared, SHARED, PLAIN, Options(window_left=3))
    graphs, captured = recorded(cuda_graphs=True)
    step(graphs, DECODE)
    checked = set()
    for name, arguments, keywords in api.calls + other.calls + levels.calls + captured.calls:
        owner, _, method = name.rpartition(".")
        real = getattr(flashinfer, owner) if owner else flashinfer
        if name == "BatchDecodeWithPagedKVCacheWrapper.plan":
            method = "_plan_impl"  # plan() itself takes anything and forwards it
        inspect.signature(getattr(real, method)).bind(*([None] if owner else []), *arguments, **keywords)
        checked.add(name)
    methods = ("__init__", "plan", "run", "workspace_size", "reset_workspace_buffer")
    wrappers = ("BatchPrefillWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper")
    assert checked == {
        "append_paged_kv_cache",
        "merge_state_in_place",
        *(f"{w}.{m}" for w in wrappers for m in methods),
    }
