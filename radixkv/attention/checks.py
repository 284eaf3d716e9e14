"""Checks of what callers hand to a backend. Every message gives the numbers and what would fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from radixkv import _core
from radixkv.attention import Options, PageTable
from radixkv.errors import InvalidArgument
from radixkv.shape import LayerShape

__all__ = [
    "check_int32",
    "check_latent",
    "check_options",
    "check_rows",
    "check_sinks",
    "check_threads",
    "core_table",
    "layer_at",
    "scale_of",
]

_INT32 = np.dtype(np.int32)
_Layer = TypeVar("_Layer")


def check_int32(name: str, array: Any) -> None:
    """Raise unless `array` is a contiguous one-dimensional int32 numpy array."""
    ok = isinstance(array, np.ndarray) and array.dtype == _INT32 and array.ndim == 1 and array.flags.c_contiguous
    if not ok:
        kind = f"{array.dtype} with {array.ndim} dimensions" if hasattr(array, "dtype") else type(array).__name__
        raise InvalidArgument(f"{name} is {kind}: pass a contiguous one-dimensional int32 numpy array")


def layer_at(layers: Sequence[_Layer], layer: int) -> _Layer:
    """The layer of this number; `InvalidArgument` where there is none."""
    if not 0 <= layer < len(layers):
        raise InvalidArgument(f"layer {layer}: the pool has layers 0 to {len(layers) - 1}")
    return layers[layer]


def check_threads(num_threads: object) -> None:
    """Raise unless it is a number of threads."""
    if isinstance(num_threads, bool) or not isinstance(num_threads, int) or not 1 <= num_threads <= 1024:
        raise InvalidArgument(f"num_threads is {num_threads!r}: give an integer from 1 to 1024")


def check_options(options: Options) -> None:
    """Raise unless run() can be given these."""
    sm_scale, window_left, logits_soft_cap, attention_chunk = options
    if not -1 <= window_left <= 2**31 - 1:
        raise InvalidArgument(f"window_left is {window_left}: use -1 for no window, else 0 or more keys")
    if not 0 <= attention_chunk <= 2**31 - 1:
        raise InvalidArgument(f"attention_chunk is {attention_chunk}: use 0 for none, else 1 or more keys")
    if not logits_soft_cap >= 0.0:
        raise InvalidArgument(f"logits_soft_cap is {logits_soft_cap}: use 0 for none, else a positive cap")
    if sm_scale is not None and not math.isfinite(sm_scale):
        raise InvalidArgument(f"sm_scale is {sm_scale}: use a finite factor, or None for k_dim**-0.5")


def scale_of(options: Options, shape: LayerShape) -> float:
    """The factor of q·k in a layer of this shape. In a latent one it must be given: its rows are not its heads'."""
    if options.sm_scale is not None:
        return options.sm_scale
    if shape.latent:
        raise InvalidArgument(
            f"sm_scale is None in a latent layer, whose rows of {shape.k_dim} are no head's: give the factor of the "
            "model's heads, which is (qk_nope_head_dim + qk_rope_head_dim)**-0.5, times what its rope adds"
        )
    return float(shape.k_dim**-0.5)


def check_rows(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise unless a tensor of rows is what a backend takes: q, k, v and out; `out` must be contiguous."""
    if tuple(tensor.shape) != shape:
        raise InvalidArgument(
            f"{name} has shape {tuple(tensor.shape)}: it must be {shape}, one row for each row of the plan"
        )
    if tensor.dtype != dtype:
        raise InvalidArgument(f"{name} is {tensor.dtype}: convert it to {dtype}, the backend's dtype")
    if tensor.device != device:
        raise InvalidArgument(f"{name} is on {tensor.device}: move it to {device}, where the pool is")
    if tensor.stride(-1) != 1:
        raise InvalidArgument(f"{name} has strides {tensor.stride()}: the last must be 1, pass {name}.contiguous()")
    if name == "out" and not tensor.is_contiguous():
        raise InvalidArgument(f"out has strides {tensor.stride()}: it must be contiguous, pass torch.empty({shape})")


def check_latent(k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise unless a latent layer's v is where its k begins: it is stored as a part of it."""
    if v.data_ptr() != k.data_ptr() or v.stride()[::2] != k.stride()[::2]:
        raise InvalidArgument(
            f"v of a latent layer has memory of its own: it is the first {v.shape[2]} numbers of k and stored with it, "
            f"pass k[..., :{v.shape[2]}]"
        )


def check_sinks(sinks: torch.Tensor, num_qo_heads: int, device: torch.device) -> None:
    """Raise unless these are a logit for each query head."""
    if tuple(sinks.shape) != (num_qo_heads,) or sinks.dtype != torch.float32 or not sinks.is_contiguous():
        raise InvalidArgument(
            f"sinks are {tuple(sinks.shape)} in {sinks.dtype} with strides {sinks.stride()}: pass a contiguous float32 "
            f"tensor [{num_qo_heads}], a logit for each query head"
        )
    if sinks.device != device:
        raise InvalidArgument(f"sinks are on {sinks.device}: move them to {device}, where the pool is")


def core_table(table: PageTable | _core.Table, num_pages: int, page_size: int) -> _core.Table:
    """The core's table: an engine's own, or these arrays, copied. Raises `InvalidArgument` unless it fits this pool.

    Beyond ranges and lengths: each row's slot must be the slot of its position in its request's pages. That ties the
    slots to pages and kv_last_page_len, so a surplus page or a length that is off by one cannot pass.
    """
    if isinstance(table, PageTable):
        for name, array in zip(PageTable._fields, table, strict=True):
            check_int32(name, array)
        return _core.ArrayTable(*table, num_pages, page_size)
    if (table.num_pages, table.page_size) != (num_pages, page_size):
        raise InvalidArgument(
            f"the page table is of {table.num_pages} pages of {table.page_size} tokens: this attention is for "
            f"{num_pages} of {page_size}"
        )
    return table
