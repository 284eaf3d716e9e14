"""Attention on the CPU with the kernels of radixkv._core.

An output row is bit-identical whatever part of its keys was cached, whatever the page size, the page ids, the rest of
the batch and the number of threads (see csrc/attention/attention.hpp).
"""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import NoReturn

import torch

from radixkv import _core
from radixkv.attention import PageTable
from radixkv.attention.cascade import NATIVE, CascadeCosts, CascadePlan
from radixkv.attention.checks import check_int32, check_options, check_sizes
from radixkv.attention.fp8 import FP8, check_storage
from radixkv.errors import InvalidArgument

__all__ = ["NativeAttention"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (*_DTYPES, FP8)}


class NativeAttention:
    """Attention of `num_qo_heads` query heads over `num_kv_heads` key heads in a pool of pages in RAM.

    dtype (float32, bfloat16 or float16) is that of every tensor but the caches, whose dtype is kv_dtype: the same, or
    float8_e4m3fn, where k_scale and v_scale times what is stored are the values. Sums are float32 throughout.
    num_threads defaults to torch's. isa forces an instruction set; by default it is the machine's best, or the
    environment's RADIXKV_ISA.
    Keys that several requests share are read once for all of them where `cascade` says that it pays (`cascade.OFF`:
    never); it changes the time, not a bit of the result.
    One call runs at a time. Raises `InvalidArgument` for a geometry the kernels do not take: head_dim not a multiple
    of 8 or above 256, num_qo_heads not a multiple of num_kv_heads, an isa this machine lacks; `BackendUnavailable` for
    a kv_dtype that is neither.
    """

    view_unit = _core.CHUNK_KEYS  # tiles and chunks lie at absolute positions

    def __init__(
        self,
        *,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        num_threads: int | None = None,
        isa: str | None = None,
        cascade: CascadeCosts = NATIVE,
    ) -> None:
        if dtype not in _DTYPES:
            raise InvalidArgument(f"dtype is {dtype}: use torch.float32, torch.bfloat16 or torch.float16")
        self._kv_dtype = kv_dtype or dtype
        check_storage(dtype, self._kv_dtype, k_scale, v_scale)
        threads = torch.get_num_threads() if num_threads is None else num_threads
        sizes = {
            "num_qo_heads": num_qo_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "num_pages": num_pages,
            "page_size": page_size,
            "num_threads": threads,
        }
        check_sizes(sizes)
        self._plan = _core.AttentionPlan(**sizes, dtype=_NAMES[dtype], kv_dtype=_NAMES[self._kv_dtype], isa=isa or "")
        self._plan.set_costs(_core.CascadeCosts(*astuple(cascade)))
        self._costs = cascade
        self._token_bytes = 2 * num_kv_heads * head_dim * self._kv_dtype.itemsize
        self._dtype = dtype
        self._scales = (float(k_scale), float(v_scale))
        self._sm_scale = head_dim**-0.5
        self._cache_shape = (num_pages, page_size, num_kv_heads, head_dim)
        self._heads = (num_qo_heads, num_kv_heads, head_dim)
        self._set_rows(0)

    def _set_rows(self, rows: int) -> None:
        num_qo_heads, num_kv_heads, head_dim = self._heads
        self._q_shape = (rows, num_qo_heads, head_dim)
        self._kv_shape = (rows, num_kv_heads, head_dim)

    @property
    def isa(self) -> str:
        """The instruction set in use: "avx512bf16", "avx512", "avx2", "neon" or "portable"."""
        return str(self._plan.isa)

    @property
    def num_threads(self) -> int:
        """Threads that share the work, the caller's included. It may be set between calls."""
        return int(self._plan.num_threads)

    @num_threads.setter
    def num_threads(self, num_threads: int) -> None:
        if isinstance(num_threads, bool) or not isinstance(num_threads, int) or not 1 <= num_threads <= 1024:
            raise InvalidArgument(f"num_threads is {num_threads!r}: give an integer from 1 to 1024")
        self._plan.num_threads = num_threads

    def warm_up(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Nothing to do: the kernels are compiled with the package."""

    @property
    def cascade(self) -> CascadePlan:
        """What the planned requests share and what is made of it. It stays valid when the next step is planned."""
        return CascadePlan(self._plan.cascade, self._token_bytes, self._costs)

    @property
    def graph_key(self) -> None:
        """None: there are no CUDA graphs here."""

    def plan(self, table: PageTable | _core.PageTable) -> None:
        """Copy and check `table` and schedule the step. A table that raises `InvalidArgument` changes nothing."""
        if isinstance(table, _core.PageTable):
            self._plan.plan_table(table)
        else:
            for name, array in zip(PageTable._fields, table, strict=True):
                check_int32(name, array)
            self._plan.plan(*table)
        self._set_rows(self._plan.num_rows)

    def append(self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Write k, v [rows, num_kv_heads, head_dim] into the slots of the step's rows, in 8 bits as `quantize` does."""
        k_stride, v_stride, cache_stride = k.stride(), v.stride(), k_cache.stride()
        dtype, kv_dtype, shape, cache_shape = self._dtype, self._kv_dtype, self._kv_shape, self._cache_shape
        if not (
            k.shape == shape
            and v.shape == shape
            and k_cache.shape == cache_shape
            and v_cache.shape == cache_shape
            and k.dtype is dtype
            and v.dtype is dtype
            and k_cache.dtype is kv_dtype
            and v_cache.dtype is kv_dtype
            and k.is_cpu
            and v.is_cpu
            and k_cache.is_cpu
            and v_cache.is_cpu
            and k_stride[2] == v_stride[2] == cache_stride[3] == 1
            and v_cache.stride() == cache_stride
        ):
            self._refuse({"k": (k, shape), "v": (v, shape)}, k_cache, v_cache)
        self._plan.append(
            k.data_ptr(), k_stride[0], k_stride[1],
            v.data_ptr(), v_stride[0], v_stride[1],
            k_cache.data_ptr(), v_cache.data_ptr(), cache_stride[0], cache_stride[1], cache_stride[2], *self._scales,
        )  # fmt: skip

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        *,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float = 0.0,
    ) -> None:
        """Attend q [rows, num_qo_heads, head_dim] to the caches and write out, contiguous and of the same shape."""
        q_stride, cache_stride = q.stride(), k_cache.stride()
        dtype, kv_dtype, shape, cache_shape = self._dtype, self._kv_dtype, self._q_shape, self._cache_shape
        if not (
            q.shape == shape
            and out.shape == shape
            and k_cache.shape == cache_shape
            and v_cache.shape == cache_shape
            and q.dtype is dtype
            and out.dtype is dtype
            and k_cache.dtype is kv_dtype
            and v_cache.dtype is kv_dtype
            and q.is_cpu
            and out.is_cpu
            and k_cache.is_cpu
            and v_cache.is_cpu
            and q_stride[2] == cache_stride[3] == 1
            and out.is_contiguous()
            and v_cache.stride() == cache_stride
        ):
            self._refuse({"q": (q, shape), "out": (out, shape)}, k_cache, v_cache)
        if sm_scale is None:
            sm_scale = self._sm_scale
        if window_left < -1 or window_left > 2**31 - 1 or not logits_soft_cap >= 0.0 or not math.isfinite(sm_scale):
            check_options(sm_scale, window_left, logits_soft_cap)
        self._plan.run(
            q.data_ptr(), q_stride[0], q_stride[1],
            k_cache.data_ptr(), v_cache.data_ptr(), cache_stride[0], cache_stride[1], cache_stride[2],
            out.data_ptr(), sm_scale * self._scales[0], window_left, logits_soft_cap, self._scales[1],
        )  # fmt: skip

    def _refuse(
        self, rows: dict[str, tuple[torch.Tensor, tuple[int, ...]]], k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> NoReturn:
        """Say which of the tensors does not fit, and how."""
        caches = {"k_cache": (k_cache, self._cache_shape), "v_cache": (v_cache, self._cache_shape)}
        for name, (tensor, shape) in (rows | caches).items():
            if tuple(tensor.shape) != shape:
                what = (
                    "one row for each row of the plan" if name in rows else "[page, slot, head, dim] of the whole pool"
                )
                raise InvalidArgument(f"{name} has shape {tuple(tensor.shape)}: it must be {shape}, {what}")
            dtype, whose = (self._dtype, "backend") if name in rows else (self._kv_dtype, "pool")
            if tensor.dtype != dtype:
                raise InvalidArgument(f"{name} is {tensor.dtype}: convert it to {dtype}, the {whose}'s dtype")
            if not tensor.is_cpu:
                raise InvalidArgument(f"{name} is on {tensor.device}: this backend takes tensors on the CPU")
            if tensor.stride(-1) != 1:
                raise InvalidArgument(
                    f"{name} has strides {tensor.stride()}: the last must be 1, pass {name}.contiguous()"
                )
            if name == "out" and not tensor.is_contiguous():
                raise InvalidArgument(
                    f"out has strides {tensor.stride()}: it must be contiguous, pass torch.empty({shape})"
                )
        raise InvalidArgument(
            f"k_cache has strides {k_cache.stride()} and v_cache {v_cache.stride()}: they must be equal, "
            "take both from one pool"
        )
