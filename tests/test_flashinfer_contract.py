"""What the FlashInfer backend refuses before it calls anything, and exactly what it calls.

FlashInfer is replaced by a recorder here, so this runs everywhere. Where FlashInfer is installed, every recorded call
is bound to the signature of the real function.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from typing import Any

import numpy as np
import pytest
import torch

import radixkv.attention.flashinfer_kernels
from radixkv.attention import PageTable
from radixkv.attention.flashinfer import FlashInferAttention
from radixkv.attention.fp8 import FP8
from radixkv.errors import BackendUnavailable, InvalidArgument
from tests.flashinfer_helpers import backend, each_target
from tests.test_attention_errors import BAD_TABLES, TABLE, int32

SIZES: dict[str, Any] = {
    "num_qo_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 64,
    "num_pages": 8,
    "page_size": 4,
    "dtype": torch.float16,
}
DECODE = PageTable(int32(0, 1, 2), int32(0, 2, 3), int32(3, 1, 0), int32(2, 4), int32(5, 3))
needs_flashinfer = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="no flashinfer to compare with: pip install 'radixkv[cuda]'"
)


@pytest.fixture(autouse=True)
def nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radixkv.attention.flashinfer_kernels, "_prepared", set())


class Recorder:
    """Stands in for flashinfer: notes every call as (name, positional, keywords)."""

    def __init__(self, float_bytes: int = 3 << 20) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.float_bytes, self.error = float_bytes, None
        self.BatchPrefillWithPagedKVCacheWrapper = self._wrapper("BatchPrefillWithPagedKVCacheWrapper")
        self.BatchDecodeWithPagedKVCacheWrapper = self._wrapper("BatchDecodeWithPagedKVCacheWrapper")

    def append_paged_kv_cache(self, *arguments: Any, **keywords: Any) -> None:
        self.calls.append(("append_paged_kv_cache", arguments, keywords))

    def _wrapper(self, name: str) -> Any:
        def make(*arguments: Any, **keywords: Any) -> RecordedWrapper:
            self.calls.append((f"{name}.__init__", arguments, keywords))
            return RecordedWrapper(self, name, len(arguments[0]))

        return make

    def named(self, end: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of the calls whose name ends so."""
        return [(arguments, keywords) for name, arguments, keywords in self.calls if name.endswith(end)]


class RecordedWrapper:
    def __init__(self, api: Recorder, name: str, float_bytes: int) -> None:
        self.api, self.name, self.float_bytes = api, name, float_bytes

    def note(self, method: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.api.calls.append((f"{self.name}.{method}", arguments, keywords))

    def workspace_size(self, *arguments: Any, **keywords: Any) -> tuple[int, int]:
        self.note("workspace_size", arguments, keywords)
        return self.api.float_bytes, 4096

    def reset_workspace_buffer(self, *arguments: Any) -> None:
        self.note("reset_workspace_buffer", arguments, {})
        self.float_bytes = len(arguments[0])

    def plan(self, *arguments: Any, **keywords: Any) -> None:
        if self.api.error is not None:
            raise self.api.error
        if self.float_bytes < self.api.float_bytes:
            raise RuntimeError("Buffer overflow")
        self.note("plan", arguments, keywords)

    def run(self, *arguments: Any, **keywords: Any) -> None:
        self.note("run", arguments, keywords)
        keywords["out"].fill_(1.0)


def recorded(**sizes: Any) -> tuple[FlashInferAttention, Recorder]:
    api = Recorder()
    return FlashInferAttention(**(SIZES | sizes), device=torch.device("cpu"), api=api), api


def tensors(rows: int = 6, device: str | torch.device = "cpu", **change: Any) -> dict[str, Any]:
    cache = torch.zeros(2, 8, 4, 2, 64, dtype=torch.float16, device=device)
    q, out = (torch.zeros(rows, 6, 64, dtype=torch.float16, device=device) for _ in range(2))
    return {"q": q, "k_cache": cache[0], "v_cache": cache[1], "out": out} | change


def half(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(*shape, **({"dtype": torch.float16} | options))


def test_the_plan_says_that_this_backend_shares_nothing():
    backend, _ = recorded(num_pages=8)
    assert backend.cascade.segments == ()
    shared = PageTable(int32(0, 1, 2), int32(0, 2, 4), int32(5, 1, 5, 2), int32(1, 1), int32(4, 8))
    backend.plan(shared)
    [segment] = backend.cascade.segments
    assert (segment.users, segment.used) == ((0, 1), False)


# --- what is refused ------------------------------------------------------------------------------------------------

BROKEN_CONTRACTS = [
    # A surplus page: request 0 has 6 tokens, 2 of them new, on 3 pages of 4.
    (
        {"kv_indptr": int32(0, 3, 4), "kv_indices": int32(3, 1, 2, 0)},
        r"slots\[0\] is 4: request 0 has 3 pages and kv_last_page_len 2, so its row at position 8 belongs into slot 8",
    ),
    ({"kv_last_page_len": int32(3, 4)}, r"slots\[0\] is 4: request 0 .* position 5 belongs into slot 5"),
    ({"kv_last_page_len": int32(1, 4)}, r"slots\[0\] is 4: request 0 .* position 3 belongs into slot 15"),
    ({"kv_indices": int32(3, 2, 0)}, r"slots\[0\] is 4: request 0 .* belongs into slot 8"),
    ({"kv_indices": np.array([3, 1, 0])}, "kv_indices is int64 with 1 dimensions"),
    ({"kv_indptr": np.array([0, 2, 3])}, "kv_indptr is int64"),
]


@each_target
@pytest.mark.parametrize(("change", "message"), BAD_TABLES + BROKEN_CONTRACTS)
def test_tables(target: str, change: dict[str, Any], message: str) -> None:
    attention = backend(target, **SIZES)
    attention.plan(TABLE)
    with pytest.raises(InvalidArgument, match=message):
        attention.plan(TABLE._replace(**change))
    arguments = tensors(device=attention.device)
    arguments["out"].fill_(torch.nan)
    attention.run(**arguments)  # the earlier plan still stands
    assert not arguments["out"].cpu().isnan().any()


BAD_CALLS = [
    ({"q": half(5, 6, 64)}, r"q has shape \(5, 6, 64\): it must be \(6, 6, 64\)"),
    ({"q": half(6, 6, 64, dtype=torch.bfloat16)}, "q is torch.bfloat16: it must be torch.float16"),
    ({"q": half(6, 6, 64, device="meta")}, "q is on meta: move it to"),
    ({"q": half(6, 6, 128)[:, :, ::2]}, r"q has strides .*: the last must be 1, pass q.contiguous\(\)"),
    ({"q": half(6, 6, 65)[:, :, :64]}, r"q has strides \(390, 65, 1\) .*: rows must begin at multiples of 16 bytes"),
    ({"q": half(6 * 6 * 64 + 1)[1:].view(6, 6, 64)}, "rows must begin at multiples of 16 bytes"),
    ({"out": half(6, 6, 64).transpose(0, 1)}, "out has strides"),
    ({"out": half(7, 6, 64)}, "out has shape"),
    ({"k_cache": half(7, 4, 2, 64)}, "k_cache has shape"),
    ({"k_cache": half(8, 4, 2, 64, device="meta")}, "k_cache is on meta"),
    ({"v_cache": half(8, 4, 2, 64, dtype=torch.bfloat16)}, "v_cache is torch.bfloat16"),
    ({"v_cache": half(8, 2, 4, 64).transpose(1, 2)}, "they must be equal"),
    ({"window_left": -2}, "window_left is -2"),
    ({"logits_soft_cap": float("nan")}, "logits_soft_cap is nan"),
    ({"sm_scale": float("inf")}, "sm_scale is inf"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CALLS)
def test_run(change: dict[str, Any], message: str) -> None:
    attention, api = recorded()
    attention.plan(TABLE)
    with pytest.raises(InvalidArgument, match=message):
        attention.run(**(tensors() | change))
    assert api.calls == []


@pytest.mark.parametrize("sm_scale", [0.0, -0.1])
def test_scales_that_flashinfer_cannot_take(sm_scale: float) -> None:
    attention, api = recorded()
    attention.plan(TABLE)
    with pytest.raises(BackendUnavailable, match="needs a positive factor"):
        attention.run(**tensors(), sm_scale=sm_scale)
    assert api.calls == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": half(5, 2, 64)}, "k has shape"),
        ({"v": half(6, 6, 64)}, "v has shape"),
        ({"v": half(6, 2, 64, dtype=torch.bfloat16)}, "v is torch.bfloat16"),
        ({"k": half(6, 2, 64, device="meta")}, "k is on meta"),
        ({"k": half(6, 2, 128)[:, :, ::2]}, "k has strides"),
        ({"k_cache": half(8, 4, 2, 32)}, "k_cache has shape"),
    ],
)
def test_append(change: dict[str, Any], message: str) -> None:
    attention, api = recorded()
    attention.plan(TABLE)
    caches = {name: value for name, value in tensors().items() if name.endswith("cache")}
    with pytest.raises(InvalidArgument, match=message):
        attention.append(**(caches | {"k": half(6, 2, 64), "v": half(6, 2, 64)} | change))
    assert api.calls == []


@each_target
def test_a_stale_plan_is_noticed(target: str) -> None:
    """Rows of another step do not fit the plan; neither does anything before the first plan."""
    attention = backend(target, **SIZES)
    with pytest.raises(InvalidArgument, match=r"it must be \(0, 6, 64\)"):
        attention.run(**tensors(device=attention.device))
    attention.plan(TABLE)
    attention.plan(DECODE)
    with pytest.raises(InvalidArgument, match=r"q has shape \(6, 6, 64\): it must be \(2, 6, 64\)"):
        attention.run(**tensors(device=attention.device))


@each_target
def test_where_index_arrays_lie(target: str) -> None:
    """Pinned on the host, so that copies do not wait, and on the device; all int32."""
    attention = backend(target, **SIZES)
    attention.plan(TABLE)
    assert attention._step is not None
    for host, device in zip(attention._step.arrays.host, attention._step.arrays.device, strict=True):
        assert host.device == torch.device("cpu")
        assert device.device == attention.device
        assert host.dtype == device.dtype == torch.int32
        assert host.tolist() == device.tolist()
        assert target == "twin" or host.is_pinned()


@each_target
def test_an_empty_step_launches_nothing(target: str) -> None:
    attention = backend(target, **SIZES)
    attention.plan(PageTable(int32(0), int32(0), int32(), int32(), int32()))
    arguments = tensors(0, attention.device)
    attention.run(**arguments)
    nothing = half(0, 2, 64, device=attention.device)
    attention.append(nothing, nothing, arguments["k_cache"], arguments["v_cache"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 4}, "num_qo_heads is 6 and num_kv_heads is 4"),
        ({"num_pages": 0}, "num_pages is 0"),
        ({"page_size": 2.0}, "page_size is 2.0: give an integer"),
        ({"page_size": 2**30}, "slots are int32"),
        ({"kernels": "fa9"}, "kernels is 'fa9': use 'fa2' or 'auto'"),
    ],
)
def test_sizes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        recorded(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "dtype is torch.float32: .* convert the model, or use device='cpu'"),
        ({"head_dim": 80}, "head_dim is 80: .* pad the heads with zeros, or use device='cpu'"),
    ],
)
def test_what_flashinfer_has_no_kernels_for(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendUnavailable, match=message):
        recorded(**change)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"kv_dtype": torch.float8_e5m2},
            BackendUnavailable,
            "kv_dtype is torch.float8_e5m2: use torch.float16, .*e4m3",
        ),
        ({"kv_dtype": torch.bfloat16}, BackendUnavailable, "kv_dtype is torch.bfloat16"),
        ({"kv_dtype": FP8, "k_scale": 0.0}, InvalidArgument, "k_scale is 0.0: use a positive finite factor"),
        ({"kv_dtype": FP8, "v_scale": float("nan")}, InvalidArgument, "v_scale is nan"),
        ({"k_scale": 0.5}, InvalidArgument, "k_scale is 0.5 and kv_dtype torch.float16"),
    ],
)
def test_storage(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        recorded(**change)


def test_8_bit_caches_are_not_mixed_up_with_others() -> None:
    attention, _ = recorded(kv_dtype=FP8)
    attention.plan(TABLE)
    with pytest.raises(InvalidArgument, match="k_cache is torch.float16: it must be torch.float8_e4m3fn"):
        attention.run(**tensors())


def cuda_device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")


def test_what_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(device: str) -> None:
        FlashInferAttention(**SIZES, device=torch.device(device))

    with pytest.raises(BackendUnavailable, match="not on meta: use device='cuda' or device='cpu'"):
        make("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="finds no CUDA device: check nvidia-smi"):
        make("cuda")
    cuda_device(monkeypatch, (7, 5))
    with pytest.raises(BackendUnavailable, match=r"T4 has compute capability 7.5; .* need 8.0"):
        make("cuda")
    cuda_device(monkeypatch)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'radixkv\[cuda\]', or use device='cpu'"):
        make("cuda")
    old = type("flashinfer", (), {"__version__": "0.6.18.dev1"})
    monkeypatch.setitem(sys.modules, "flashinfer", old)
    with pytest.raises(BackendUnavailable, match=r"FlashInfer 0.6.18.dev1 is too old"):
        make("cuda")


# --- what is called -------------------------------------------------------------------------------------------------


def step(attention: FlashInferAttention, table: PageTable, *options: dict[str, Any]) -> None:
    """A step with one layer for each of the options."""
    attention.plan(table)
    rows = len(table.slots)
    heads = attention._heads
    cache = half(2, 8, 4, heads[1], 64)
    for layer in options or ({},):
        kv = half(rows, heads[1], 64)
        attention.append(kv, kv, cache[0], cache[1])
        out = half(rows, heads[0], 64)
        attention.run(half(rows, heads[0], 64), cache[0], cache[1], out, **layer)
        assert (out == 1).all()


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
    attention, api = recorded(num_qo_heads=2 * group)
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
    assert [kv_indices.tolist(), kv_indptr.tolist(), last.tolist()] == [[3, 1, 0], [0, 2, 3], [2, 4]]
    assert all(a.dtype == torch.int32 for a in (request, position, kv_indices, kv_indptr, last))
    assert keywords == {"kv_layout": "NHD"}


def test_one_plan_for_each_combination_of_options_and_two_sets_of_wrappers() -> None:
    attention, api = recorded()
    local, whole = {"window_left": 3, "sm_scale": 0.5}, {"logits_soft_cap": 9.0}
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
    attention, api = recorded(kv_dtype=FP8, k_scale=0.5, v_scale=0.25)
    attention.plan(DECODE)
    cache = half(2, 8, 4, 2, 64).to(FP8)
    attention.append(half(2, 2, 64) + 3, half(2, 2, 64) + 3, cache[0], cache[1])
    attention.run(half(2, 6, 64), cache[0], cache[1], half(2, 6, 64))
    ((arguments, _),) = api.named("append_paged_kv_cache")
    assert [x.dtype for x in arguments[:2]] == [FP8, FP8]
    assert [x.float().unique().tolist() for x in arguments[:2]] == [[6.0], [12.0]]
    ((_, keywords),) = api.named("BatchDecodeWithPagedKVCacheWrapper.__init__")
    assert keywords["use_tensor_cores"]
    ((_, keywords),) = api.named(".plan")
    assert (keywords["q_data_type"], keywords["kv_data_type"]) == (torch.float16, FP8)
    ((_, keywords),) = api.named("WithPagedKVCacheWrapper.run")
    assert (keywords["k_scale"], keywords["v_scale"]) == (0.5, 0.25)


def test_windows_wider_than_the_pool_are_none() -> None:
    attention, api = recorded()
    step(attention, TABLE, {"window_left": 31}, {"window_left": 32}, {"window_left": 2**31 - 1})
    assert [keywords["window_left"] for _, keywords in api.named(".plan")] == [31, -1]


def test_kernels_that_cannot_be_compiled() -> None:
    attention, api = recorded()
    api.error = RuntimeError("Could not find nvcc")
    with pytest.raises(BackendUnavailable, match="prefill kernels .* Could not find nvcc.* install the CUDA toolkit"):
        step(attention, TABLE)


def test_warm_up_runs_a_token_and_then_two() -> None:
    for page_size in (1, 4):
        attention, api = recorded(page_size=page_size)
        cache = half(2, 8, page_size, 2, 64)
        attention.warm_up(cache[0], cache[1])
        assert [name.split("With")[0] for name, _, _ in api.calls if name.endswith(".run")] == [
            "BatchDecode",
            "BatchPrefill",
        ]
        assert len(api.named("append_paged_kv_cache")) == 2


@needs_flashinfer
def test_every_call_fits_the_installed_flashinfer() -> None:
    """The signature of each real function takes each recorded call."""
    import flashinfer

    attention, api = recorded()
    for table in (TABLE, DECODE):
        step(attention, table, {}, {"window_left": 3, "logits_soft_cap": 2.0})
    api.float_bytes = 64 << 20
    step(attention, TABLE)
    eight_bit, other = recorded(kv_dtype=FP8)
    eight_bit.warm_up(*half(2, 8, 4, 2, 64).to(FP8))
    checked = set()
    for name, arguments, keywords in api.calls + other.calls:
        owner, _, method = name.rpartition(".")
        real = getattr(flashinfer, owner) if owner else flashinfer
        if name == "BatchDecodeWithPagedKVCacheWrapper.plan":
            method = "_plan_impl"  # plan() itself takes anything and forwards it
        inspect.signature(getattr(real, method)).bind(*([None] if owner else []), *arguments, **keywords)
        checked.add(name)
    methods = ("__init__", "plan", "run", "workspace_size", "reset_workspace_buffer")
    wrappers = ("BatchPrefillWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper")
    assert checked == {"append_paged_kv_cache", *(f"{w}.{m}" for w in wrappers for m in methods)}
