"""What the native attention refuses, and that a refusal changes nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from radixkv import _core
from radixkv.attention import PageTable
from radixkv.attention.native import NativeAttention
from radixkv.errors import InvalidArgument
from radixkv.shape import LayerShape
from tests.attention.helpers import Heads, Options, layer_of

HEADS = Heads(6, 2, 64)


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


# Two requests: 6 tokens on pages 3, 1 of which 2 are new, and 4 tokens on page 0 of which 4 are new.
TABLE = PageTable(int32(0, 2, 6), int32(0, 2, 3), int32(3, 1, 0), int32(2, 4), int32(4, 5, 0, 1, 2, 3))


# What every backend refuses, with the same words.
BAD_TABLES: list[tuple[dict[str, Any], str]] = [
    ({"qo_indptr": int32(1, 2, 6)}, r"qo_indptr\[0\] is 1"),
    ({"qo_indptr": int32(0, 7, 6)}, r"qo_indptr\[2\] is 6 after 7"),
    ({"qo_indptr": int32(0, 6)}, "qo_indptr has 2 entries: it must have 3"),
    ({"qo_indptr": int32(0, 0, 6)}, "request 0 has no new row"),
    ({"qo_indptr": int32(0, 1, 6)}, "request 1 has 5 new rows but a length of 4"),
    ({"kv_indptr": int32(0, 2)}, "kv_indptr has 2 entries: it must have 3"),
    ({"kv_indptr": int32(0, 4, 3)}, r"kv_indptr\[2\] is 3 after 4"),
    ({"kv_indptr": int32(0, 2, -1)}, "kv_indices has 3 entries: it must have 0"),
    ({"kv_indptr": int32(0, 2, 2), "kv_indices": int32(3, 1)}, "request 1 has 4 rows and no page"),
    ({"kv_indices": int32(3, 1)}, "kv_indices has 2 entries: it must have 3"),
    ({"kv_indices": int32(3, 8, 0)}, r"kv_indices\[1\] is 8: it must be 0 to 7"),
    ({"kv_indices": int32(3, 1, -1)}, r"kv_indices\[2\] is -1"),
    ({"kv_last_page_len": int32(0, 4)}, "request 0: kv_last_page_len is 0: it must be 1 to page_size = 4"),
    ({"kv_last_page_len": int32(2, 5)}, "request 1: kv_last_page_len is 5"),
    ({"slots": int32(4, 5, 0, 1, 2)}, "slots has 5 entries for 6 rows"),
    ({"slots": int32(4, 5, 0, 1, 2, 32)}, r"slots\[5\] is 32: it must be 0 to 31"),
    ({"slots": int32(-1, 5, 0, 1, 2, 3)}, r"slots\[0\] is -1"),
    ({"slots": np.zeros(6, dtype=np.int64)}, "slots is int64 with 1 dimensions"),
    ({"kv_indices": int32(3, 0, 1, 0, 0, 0)[::2]}, "kv_indices is int32"),
    ({"qo_indptr": [0, 2, 6]}, "qo_indptr is list"),
]


def backend_of(
    heads: Heads = HEADS,
    num_pages: int = 8,
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> NativeAttention:
    return NativeAttention([layer_of(heads, torch.float32, num_pages, page_size)], dtype=dtype, **options)


def planned() -> NativeAttention:
    backend = backend_of(num_threads=1)
    backend.plan(TABLE)
    return backend


def tensors() -> dict[str, torch.Tensor]:
    return {"q": torch.zeros(6, 6, 64), "out": torch.zeros(6, 6, 64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": Heads(6, 2, 12)}, "layer 0: k_dim is 12: it must be a multiple of 8 from 8 to 576"),
        ({"heads": Heads(6, 2, 584)}, "k_dim is 584"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"num_threads": 5000}, "num_threads is 5000: give an integer from 1 to 1024"),
        ({"isa": "mmx"}, "isa is 'mmx': this machine supports .*portable"),
    ],
)
def test_backends_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        backend_of(**change)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((6, 2, 0), "k_dim must be an int from 1"),
        ((7, 2, 64), "num_qo_heads must be a multiple of num_kv_heads; got 7 and 2"),
        ((0, 2, 64), "num_qo_heads must be an int from 1"),
        ((6, 2.0, 64), "num_kv_heads must be an int from 1 .* got 2.0"),
        ((6, 2, 64, -8), "v_dim must be an int from 1"),
    ],
)
def test_shapes_that_are_refused(sizes: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        LayerShape(*sizes)


@pytest.mark.parametrize(("change", "message"), BAD_TABLES)
def test_table(change: dict[str, Any], message: str) -> None:
    backend = planned()
    with pytest.raises(InvalidArgument, match=message):
        backend.plan(TABLE._replace(**change))
    backend.run(0, **tensors())  # the earlier plan still stands


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 6, 64)}, r"q has shape \(5, 6, 64\): it must be \(6, 6, 64\)"),
        ({"q": torch.zeros(6, 2, 64)}, "q has shape"),
        ({"q": torch.zeros(6, 384)}, "q has shape"),
        ({"q": torch.zeros(6, 6, 64, dtype=torch.bfloat16)}, "q is torch.bfloat16: convert it to torch.float32"),
        ({"q": torch.zeros(6, 6, 64, device="meta")}, "q is on meta"),
        ({"q": torch.zeros(6, 6, 128)[:, :, ::2]}, r"q has strides .*: the last must be 1, pass q.contiguous\(\)"),
        ({"out": torch.zeros(6, 6, 64).transpose(0, 1)}, "out has strides"),
        ({"out": torch.zeros(7, 6, 64)}, "out has shape"),
        ({"options": Options(window_left=-2)}, "window_left is -2"),
        ({"options": Options(window_left=2**31)}, "window_left is 2147483648"),
        ({"options": Options(logits_soft_cap=-1.0)}, "logits_soft_cap is -1.0"),
        ({"options": Options(logits_soft_cap=float("nan"))}, "logits_soft_cap is nan"),
        ({"options": Options(sm_scale=float("inf"))}, "sm_scale is inf"),
        ({"options": Options(attention_chunk=-1)}, "attention_chunk is -1"),
        ({"sinks": torch.zeros(2)}, r"sinks are \(2,\) in torch.float32 .*float32 tensor \[6\]"),
        ({"sinks": torch.zeros(6, dtype=torch.bfloat16)}, "sinks are .* in torch.bfloat16"),
        ({"sinks": torch.zeros(12)[::2]}, r"sinks are .* with strides \(2,\)"),
        ({"sinks": torch.zeros(6, device="meta")}, "sinks are on meta"),
    ],
)
def test_run(change: dict[str, Any], message: str) -> None:
    arguments = tensors()
    arguments["out"].fill_(7.0)
    with pytest.raises(InvalidArgument, match=message):
        planned().run(0, **(arguments | change))
    assert (arguments["out"] == 7.0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(5, 2, 64)}, "k has shape"),
        ({"v": torch.ones(6, 6, 64)}, "v has shape"),
        ({"v": torch.ones(6, 2, 64, dtype=torch.float64)}, "v is torch.float64"),
        ({"k": torch.ones(6, 2, 128)[:, :, ::2]}, "k has strides"),
    ],
)
def test_append(change: dict[str, Any], message: str) -> None:
    layer = layer_of(HEADS, torch.float32, 8, 4)
    layer.k.zero_(), layer.v.zero_()
    backend = NativeAttention([layer], dtype=torch.float32)
    backend.plan(TABLE)
    with pytest.raises(InvalidArgument, match=message):
        backend.append(0, **({"k": torch.ones(6, 2, 64), "v": torch.ones(6, 2, 64)} | change))
    assert not layer.k.any()
    assert not layer.v.any()


def test_threads_setter() -> None:
    backend = planned()
    for bad in (0, -3, 1025, True, 1.5):
        with pytest.raises(InvalidArgument, match="num_threads is"):
            backend.num_threads = bad  # type: ignore[assignment]
    assert backend.num_threads == 1


def test_empty_step() -> None:
    backend = backend_of()
    backend.plan(PageTable(int32(0), int32(0), int32(), int32(), int32()))
    arguments = tensors() | {"q": torch.zeros(0, 6, 64), "out": torch.zeros(0, 6, 64)}
    backend.run(0, **arguments)


def test_nothing_is_planned_at_first() -> None:
    with pytest.raises(InvalidArgument, match=r"it must be \(0, 6, 64\)"):
        backend_of().run(0, **tensors())


def test_no_such_layer() -> None:
    for layer in (-1, 1, 5):
        with pytest.raises(InvalidArgument, match=f"layer {layer}: the pool has layers 0 to 0"):
            planned().run(layer, **tensors())
        with pytest.raises(InvalidArgument, match=f"layer {layer}: the pool has layers 0 to 0"):
            planned().append(layer, torch.ones(6, 2, 64), torch.ones(6, 2, 64))


def test_isa_from_the_environment() -> None:
    """RADIXKV_ISA chooses the kernel, and an unknown name is refused where a kernel is first needed."""
    code = "from radixkv import _core; print(_core.isa())"
    for isa in _core.isas():
        done = subprocess.run(
            [sys.executable, "-c", code], env={"RADIXKV_ISA": isa}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == isa
    done = subprocess.run([sys.executable, "-c", code], env={"RADIXKV_ISA": "vax"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "RADIXKV_ISA is 'vax': this machine supports" in done.stderr
