"""What the FlashInfer backend refuses before it calls anything, be the step that came before plain or a cascade."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

import radixkv.attention.flashinfer.kernels
from radixkv.attention import PageTable, check_device
from radixkv.attention.flashinfer import FlashInferAttention
from radixkv.errors import BackendUnavailable, InvalidArgument
from radixkv.formats import FORMATS, LayerFormat, RowFormat
from radixkv.pool import KVPool
from radixkv.shape import LayerShape
from tests.attention.cascade_helpers import ALL
from tests.attention.helpers import Heads, Options, layer_of
from tests.attention.test_attention_errors import BAD_TABLES, TABLE, int32
from tests.flashinfer.helpers import backend, each_target
from tests.flashinfer.recorder import DECODE, SIZES, Recorder, half, recorded


@pytest.fixture(autouse=True)
def nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radixkv.attention.flashinfer.kernels, "_prepared", set())


def tensors(rows: int = 6, device: str | torch.device = "cpu", **change: Any) -> dict[str, Any]:
    q, out = (torch.zeros(rows, 6, 64, dtype=torch.float16, device=device) for _ in range(2))
    return {"layer": 0, "q": q, "out": out} | change


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

# Three requests over pages 5 and 1, then each its own: 3 rows of a prefill, then two rows of decode.
SHARED = PageTable(
    int32(0, 3, 4, 5), int32(0, 3, 6, 9), int32(5, 1, 2, 5, 1, 3, 5, 1, 4), int32(3, 1, 4), int32(8, 9, 10, 12, 19)
)
BROKEN_CASCADES = [
    # A surplus page for each, and for the last one only.
    (
        {"kv_indptr": int32(0, 4, 8, 12), "kv_indices": int32(5, 1, 2, 0, 5, 1, 3, 0, 5, 1, 4, 0)},
        r"slots\[0\] is 8: request 0 has 4 pages and kv_last_page_len 3, so its row at position 12 belongs into slot 0",
    ),
    (
        {"kv_indptr": int32(0, 3, 6, 10), "kv_indices": int32(5, 1, 2, 5, 1, 3, 5, 1, 4, 0)},
        r"slots\[4\] is 19: request 2 has 4 pages .*, so its row at position 15 belongs into slot 3",
    ),
    ({"kv_last_page_len": int32(4, 1, 4)}, r"slots\[0\] is 8: request 0 .* position 9 belongs into slot 9"),
    ({"kv_last_page_len": int32(3, 2, 4)}, r"slots\[3\] is 12: request 1 .* position 9 belongs into slot 13"),
    ({"kv_last_page_len": int32(3, 1, 3)}, r"slots\[4\] is 19: request 2 .* position 10 belongs into slot 18"),
    ({"kv_last_page_len": int32(3, 0, 4)}, "request 1: kv_last_page_len is 0: it must be 1 to page_size = 4"),
    ({"kv_indices": int32(5, 1, 2, 5, 1, 8, 5, 1, 4)}, r"kv_indices\[5\] is 8: it must be 0 to 7"),
    ({"kv_indices": np.array([5, 1, 2, 5, 1, 3, 5, 1, 4])}, "kv_indices is int64 with 1 dimensions"),
    ({"qo_indptr": np.array([0, 3, 4, 5])}, "qo_indptr is int64"),
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


@each_target
@pytest.mark.parametrize(("change", "message"), BROKEN_CASCADES)
def test_tables_of_a_cascade(target: str, change: dict[str, Any], message: str) -> None:
    attention = backend(target, **SIZES, cascade=ALL)
    attention.plan(SHARED)
    assert [len(s.users) for s in attention.cascade.segments if s.used] == [3]
    with pytest.raises(InvalidArgument, match=message):
        attention.plan(SHARED._replace(**change))
    arguments = tensors(5, attention.device)
    arguments["out"].fill_(torch.nan)
    attention.run(**arguments)
    assert not arguments["out"].cpu().isnan().any()


BAD_CALLS = [
    ({"q": half(5, 6, 64)}, r"q has shape \(5, 6, 64\): it must be \(6, 6, 64\)"),
    ({"q": half(6, 6, 64, dtype=torch.bfloat16)}, "q is torch.bfloat16: convert it to torch.float16"),
    ({"q": half(6, 6, 64, device="meta")}, "q is on meta: move it to"),
    ({"q": half(6, 6, 128)[:, :, ::2]}, r"q has strides .*: the last must be 1, pass q.contiguous\(\)"),
    ({"q": half(6, 6, 65)[:, :, :64]}, r"q has strides \(390, 65, 1\) .*: rows must begin at multiples of 16 bytes"),
    ({"q": half(6 * 6 * 64 + 1)[1:].view(6, 6, 64)}, "rows must begin at multiples of 16 bytes"),
    ({"out": half(6, 6, 64).transpose(0, 1)}, "out has strides"),
    ({"out": half(7, 6, 64)}, "out has shape"),
    ({"options": Options(window_left=-2)}, "window_left is -2"),
    ({"options": Options(logits_soft_cap=float("nan"))}, "logits_soft_cap is nan"),
    ({"options": Options(sm_scale=float("inf"))}, "sm_scale is inf"),
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
        attention.run(**tensors(), options=Options(sm_scale=sm_scale))
    assert api.calls == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sinks": torch.zeros(6)}, "layer 0 has attention sinks, .* use device='cpu'"),
        ({"options": Options(attention_chunk=8)}, "layer 0 has chunked attention, .* use device='cpu'"),
    ],
)
def test_attention_that_flashinfer_is_not_given(change: dict[str, Any], message: str) -> None:
    attention, api = recorded()
    attention.plan(TABLE)
    with pytest.raises(BackendUnavailable, match=message):
        attention.run(**(tensors() | change))
    assert api.calls == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": half(5, 2, 64)}, "k has shape"),
        ({"v": half(6, 6, 64)}, "v has shape"),
        ({"v": half(6, 2, 64, dtype=torch.bfloat16)}, "v is torch.bfloat16"),
        ({"k": half(6, 2, 64, device="meta")}, "k is on meta"),
        ({"k": half(6, 2, 128)[:, :, ::2]}, "k has strides"),
    ],
)
def test_append(change: dict[str, Any], message: str) -> None:
    attention, api = recorded()
    attention.plan(TABLE)
    with pytest.raises(InvalidArgument, match=message):
        attention.append(0, **({"k": half(6, 2, 64), "v": half(6, 2, 64)} | change))
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
def test_a_stale_plan_is_noticed_after_a_cascade(target: str) -> None:
    """Rows, and dtypes, of another step than the planned one; the levels of the earlier step are gone."""
    attention = backend(target, **SIZES, cascade=ALL)
    for table, rows in ((SHARED, 5), (DECODE, 2), (SHARED, 5), (TABLE, 6)):
        attention.plan(table)
        assert attention.cascade.shared == (table is SHARED)
        for wrong in (2, 5, 6):
            arguments = tensors(wrong, attention.device)
            if wrong == rows:
                attention.run(**arguments)
                arguments["q"] = arguments["q"].to(torch.bfloat16)
                with pytest.raises(InvalidArgument, match="q is torch.bfloat16: convert it to torch.float16"):
                    attention.run(**arguments)
            else:
                with pytest.raises(InvalidArgument, match=rf"it must be \({rows}, 6, 64\)"):
                    attention.run(**arguments)


@each_target
def test_where_index_arrays_lie(target: str) -> None:
    """Pinned on the host, so that copies do not wait, and on the device; int32, but for the inputs."""
    attention = backend(target, **SIZES)
    attention.plan(TABLE)
    assert attention._step is not None
    assert [a.dtype for a in attention._step.arrays.host] == [torch.int32] * 6 + [torch.int64] * 3 + [torch.int32]
    for host, device in zip(attention._step.arrays.host, attention._step.arrays.device, strict=True):
        assert host.device == torch.device("cpu")
        assert device.device == attention.device
        assert host.dtype == device.dtype
        assert host.tolist() == device.tolist()
        assert target == "twin" or host.is_pinned()


@each_target
def test_an_empty_step_launches_nothing(target: str) -> None:
    attention = backend(target, **SIZES)
    attention.plan(PageTable(int32(0), int32(0), int32(), int32(), int32()))
    arguments = tensors(0, attention.device)
    attention.run(**arguments)
    nothing = half(0, 2, 64, device=attention.device)
    attention.append(0, nothing, nothing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 2**30, "device": "meta"}, "slots are int32"),
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
        ({"heads": Heads(6, 2, 80)}, "head_dim is 80: .* pad the heads with zeros, or use device='cpu'"),
    ],
)
def test_what_flashinfer_has_no_kernels_for(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendUnavailable, match=message):
        recorded(**change)


def test_layers_of_another_dtype() -> None:
    layer = layer_of(Heads(6, 2, 64), torch.bfloat16, 8, 4)
    with pytest.raises(InvalidArgument, match="stored as bfloat16: .* float16, the dtype of k and v, or float8_e4m3fn"):
        FlashInferAttention([layer], dtype=torch.float16, api=Recorder())


E4M3, HALF = RowFormat("float8_e4m3fn"), RowFormat("float16")


@pytest.mark.parametrize(
    ("shape", "stored", "message"),
    [
        (LayerShape(6, 2, 64, 128), LayerFormat(HALF, HALF), "layer 1 has keys of 64 and values of 128 dimensions"),
        (LayerShape(6, 2, 80), LayerFormat(HALF, HALF), "layer 1: head_dim is 80: "),
        (LayerShape(6, 2, 64), LayerFormat(E4M3, HALF), "layer 1 stores K as float8_e4m3fn, V as float16: "),
        *((LayerShape(6, 2, 64), FORMATS[name], f"layer 1 stores {name}: ") for name in ("int8", "k8v4", "int4")),
        (LayerShape(6, 2, 64), LayerFormat(E4M3, E4M3, (0.0,) * 128), "layer 1 stores fp8, keys with a centre: "),
    ],
)
def test_a_layer_among_others_that_flashinfer_cannot_take(shape: LayerShape, stored: LayerFormat, message: str) -> None:
    shapes, formats = [LayerShape(6, 2, 64), shape], [LayerFormat(HALF, HALF), stored]
    layers = KVPool(shapes, formats, 8, 4, torch.device("cpu")).layers
    with pytest.raises(BackendUnavailable, match=f"{message}.*use device='cpu'"):
        FlashInferAttention(layers, dtype=torch.float16, api=Recorder())


def cuda_device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")


def test_what_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(device: str) -> None:
        check_device(torch.device(device))

    with pytest.raises(BackendUnavailable, match="not on meta: use device='cuda' or device='cpu'"):
        FlashInferAttention([layer_of(**SIZES, device="meta")], dtype=torch.float16)
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
