"""Attention on CUDA with FlashInfer's paged kernels.

A step whose requests have one row each runs the decode wrapper, any other the prefill wrapper over one ragged batch.
FlashInfer takes scale, window and soft cap when it plans, so a step is planned once for each combination that its
layers use, when the first such layer runs. Kernels are compiled at their first use: see `FlashInferAttention.warm_up`.

All calls must come on one CUDA stream. FlashInfer checks neither devices nor row counts nor the values of tables, and
computes something with whatever it is given; everything is checked here first.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from ..errors import BackendUnavailable, InvalidArgument
from . import PageTable
from .cascade import OFF, CascadePlan
from .checks import check_options, check_sizes, check_table
from .flashinfer_plans import IndexArrays, PlanSet, Wrapper
from .fp8 import FP8, check_storage, quantize

__all__ = ["FlashInferAttention"]

_HEAD_DIMS = (64, 128, 192, 256)  # FA2's swizzle needs multiples of 64: it computes garbage with 96, silently
_COMMON_HEAD_DIMS = (64, 128, 256)  # what the append kernel and decode without tensor cores take
_TENSOR_CORE_GROUP = 4  # query heads per key head from which tensor cores decode; CUDA cores take 1, 2 and 3
_FIRST_FLOAT_BYTES = 1 << 20
_FIRST_INT_BYTES = 1 << 18
_ALIGN_BYTES = 16  # the kernels load rows 16 bytes at a time

_prepared: set[str] = set()
"""Kernels that this process has used before."""


class _Options(NamedTuple):
    """What FlashInfer takes when it plans and layers of one model may differ in."""

    sm_scale: float
    window_left: int
    logits_soft_cap: float


class _Step(NamedTuple):
    """What plan() made of a table."""

    decode: bool
    rows: int
    arrays: IndexArrays  # the table's, then request and position of each row


class FlashInferAttention:
    """Attention of `num_qo_heads` query heads over `num_kv_heads` key heads in a pool of pages on a CUDA device.

    dtype (bfloat16 or float16) is that of every tensor but the caches, whose dtype is kv_dtype: the same, or
    float8_e4m3fn, where k_scale and v_scale times what is stored are the values.
    kernels names FlashInfer's kernels: "fa2", or "auto" for
    FlashInfer's own choice. api is the module to call in place of flashinfer (a stand-in for tests; device may then
    be any). Raises `InvalidArgument` for sizes that cannot work, `BackendUnavailable` for what FlashInfer or this
    machine lacks; it says what to change.
    """

    view_unit = 1

    def __init__(
        self,
        *,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        kernels: str = "fa2",
        api: Any = None,
    ) -> None:
        _check_sizes(num_qo_heads, num_kv_heads, num_pages, page_size)
        _check_supported(dtype, head_dim, kernels)
        self._kv_dtype = kv_dtype or dtype
        check_storage(dtype, self._kv_dtype, k_scale, v_scale)
        self._fp8 = self._kv_dtype == FP8
        self._scales = {"k_scale": k_scale, "v_scale": v_scale} if self._fp8 else {}
        self._api = _load(device) if api is None else api
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.kernels = kernels
        self._dtype = dtype
        self._heads = (num_qo_heads, num_kv_heads, head_dim)
        self._pages = (num_pages, page_size)
        self._cache_shape = (num_pages, page_size, num_kv_heads, head_dim)
        self._append_kernel = head_dim in _COMMON_HEAD_DIMS
        large_group = num_qo_heads // num_kv_heads >= _TENSOR_CORE_GROUP
        self.tensor_cores = large_group or self._fp8 or head_dim not in _COMMON_HEAD_DIMS
        self._float_workspace = torch.empty(_FIRST_FLOAT_BYTES, dtype=torch.uint8, device=device)
        self._sets = (PlanSet(device), PlanSet(device))
        self._turn = 0
        self._step: _Step | None = None
        self._planned: dict[_Options, Wrapper] = {}
        self._set_rows(0)

    def _set_rows(self, rows: int) -> None:
        num_qo_heads, num_kv_heads, head_dim = self._heads
        self._q_shape = (rows, num_qo_heads, head_dim)
        self._kv_shape = (rows, num_kv_heads, head_dim)

    def warm_up(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Compile and load the kernels of decode and prefill by running a token and then two.

        Overwrites the first two slots of the caches. Layers with a window or a soft cap need kernels of their own,
        which are compiled when such a layer first runs. Says on standard error what it waits for.
        """
        for rows in range(1, min(2, self._pages[0] * self._pages[1]) + 1):
            pages = -(-rows // self._pages[1])
            steps = [[0, rows], [0, pages], range(pages), [rows - (pages - 1) * self._pages[1]], range(rows)]
            self.plan(PageTable(*(np.array(a, dtype=np.int32) for a in steps)))
            q = torch.zeros(self._q_shape, dtype=self._dtype, device=self.device)
            kv = torch.zeros(self._kv_shape, dtype=self._dtype, device=self.device)
            self.append(kv, kv, k_cache, v_cache)
            self.run(q, k_cache, v_cache, torch.empty_like(q))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def plan(self, table: PageTable) -> None:
        """Copy and check `table`. A table that raises `InvalidArgument` changes nothing."""
        places = check_table(table, *self._pages)
        rows = len(places.request)
        turn = self._turn ^ 1
        arrays = self._sets[turn].fill([*table, *places])
        self._turn = turn
        self._step = _Step(rows == len(table.kv_last_page_len), rows, arrays) if rows else None
        self._planned = {}
        self._set_rows(rows)

    @property
    def cascade(self) -> CascadePlan:
        """What the planned requests share. This backend does not run it: no segment is used."""
        empty = [torch.zeros(n, dtype=torch.int32) for n in (1, 1, 0, 0, 0)]
        arrays = self._step.arrays.host[:5] if self._step is not None else empty
        return CascadePlan.derive(PageTable(*(a.numpy() for a in arrays)), self._pages[1], OFF)

    def append(self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Write k, v [rows, num_kv_heads, head_dim] into the slots of the step's rows."""
        self._check({"k": k, "v": v}, self._kv_shape, k_cache, v_cache)
        if self._step is None:
            return
        _, kv_indptr, kv_indices, last_page_len, slots, request, position = self._step.arrays.device
        if self._fp8:
            k, v = quantize(k, self._scales["k_scale"]), quantize(v, self._scales["v_scale"])
        if not self._append_kernel:
            page, offset = slots // self._pages[1], slots % self._pages[1]
            for cache, rows in ((k_cache, k), (v_cache, v)):
                if self._fp8:  # as bytes: torch does not index every kind of 8-bit float
                    cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
                cache[page, offset] = rows
            return
        with self._compiling("append"):
            self._api.append_paged_kv_cache(
                k, v, request, position, (k_cache, v_cache), kv_indices, kv_indptr, last_page_len, kv_layout="NHD"
            )

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
        self._check({"q": q, "out": out}, self._q_shape, k_cache, v_cache)
        if sm_scale is None:
            sm_scale = self._heads[2] ** -0.5
        check_options(sm_scale, window_left, logits_soft_cap)
        if sm_scale <= 0:
            raise BackendUnavailable(
                f"sm_scale is {sm_scale}: FlashInfer's softmax needs a positive factor; negate q, or use device='cpu'"
            )
        if self._step is None:
            return
        if window_left >= self._pages[0] * self._pages[1]:
            window_left = -1  # wider than the pool: the kernels add it to positions in 32 bits
        options = _Options(float(sm_scale), int(window_left), float(logits_soft_cap))
        wrapper = self._planned.get(options) or self._plan_for(options, self._step)
        wrapper.handle.run(q, (k_cache, v_cache), out=out, **self._scales)

    # --- planning ---------------------------------------------------------------------------------------------------

    def _plan_for(self, options: _Options, step: _Step) -> Wrapper:
        """A wrapper of this step's set, planned for these options."""
        plans = self._sets[self._turn]
        wrappers, number = plans.wrappers[step.decode], plans.taken[step.decode]
        if number == len(wrappers):
            wrappers.append(self._new_wrapper(step.decode))
        wrapper = wrappers[number]
        arguments, keywords = self._plan_arguments(options, step)
        tensor_cores = not step.decode or self.tensor_cores
        kind = ("prefill" if tensor_cores else "decode") + (" window" if options.window_left >= 0 else "")
        with self._compiling(kind + (" soft cap" if options.logits_soft_cap > 0 else "")):
            if wrapper.int_bytes == 0:
                self._grow(wrapper, arguments, keywords)
            try:
                wrapper.handle.plan(*arguments, **keywords)
            except RuntimeError:  # the workspace that an earlier step was content with may be too small for this one
                if not self._grow(wrapper, arguments, keywords):
                    raise
                wrapper.handle.plan(*arguments, **keywords)
        plans.taken[step.decode] += 1
        plans.copies_queued()
        self._planned[options] = wrapper
        return wrapper

    def _new_wrapper(self, decode: bool) -> Wrapper:
        if decode:
            handle = self._api.BatchDecodeWithPagedKVCacheWrapper(
                self._float_workspace, "NHD", use_tensor_cores=self.tensor_cores, backend=self.kernels
            )
        else:
            handle = self._api.BatchPrefillWithPagedKVCacheWrapper(self._float_workspace, "NHD", backend=self.kernels)
        return Wrapper(handle, self._float_workspace)

    def _plan_arguments(self, options: _Options, step: _Step) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What plan() and workspace_size() of either wrapper take."""
        qo_indptr, kv_indptr, _, last_page_len = step.arrays.host[:4]
        kv_indices = step.arrays.device[2]
        sizes = (*self._heads, self._pages[1])
        keywords = options._asdict() | {
            "q_data_type": self._dtype,
            "kv_data_type": self._kv_dtype,
            "o_data_type": self._dtype,
        }
        if step.decode:
            return (kv_indptr, kv_indices, last_page_len, *sizes), keywords
        return (qo_indptr, kv_indptr, kv_indices, last_page_len, *sizes), keywords | {"causal": True}

    def _grow(self, wrapper: Wrapper, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
        """Give the wrapper the workspace this plan asks for; False if it has that already.

        The float workspace is scratch of the running kernel and so shared by all wrappers; the other one holds a
        wrapper's schedule.
        """
        float_bytes, int_bytes = wrapper.handle.workspace_size(*arguments, **keywords)
        if float_bytes <= len(wrapper.float_workspace) and int_bytes <= wrapper.int_bytes:
            return False
        if float_bytes > len(self._float_workspace):
            size = _power_of_two(float_bytes)
            self._float_workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        wrapper.float_workspace = self._float_workspace
        wrapper.int_bytes = max(_power_of_two(int_bytes), wrapper.int_bytes, _FIRST_INT_BYTES)
        int_workspace = torch.empty(wrapper.int_bytes, dtype=torch.uint8, device=self.device)
        wrapper.handle.reset_workspace_buffer(self._float_workspace, int_workspace)
        return True

    @contextmanager
    def _compiling(self, kernels: str) -> Iterator[None]:
        """Say on standard error that kernels are compiled or loaded, the first time they are used."""
        types = str(self._dtype).removeprefix("torch.") + (" over 8-bit K and V" if self._fp8 else "")
        name = f"{kernels} kernels for {types}, head_dim {self._heads[2]}"
        if name in _prepared:
            yield
            return
        print(f"radixkv: FlashInfer prepares its {name} (minutes where they must be compiled)", file=sys.stderr)
        begin = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError) as error:
            raise BackendUnavailable(
                f"FlashInfer cannot prepare its {name}: {error}. It compiles them with nvcc and ninja: install the "
                "CUDA toolkit, or the package flashinfer-jit-cache of FlashInfer's own version"
            ) from error
        _prepared.add(name)
        print(f"radixkv: ready after {time.perf_counter() - begin:.1f} s", file=sys.stderr)

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check(
        self, rows: dict[str, torch.Tensor], shape: tuple[int, ...], k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> None:
        """Raise unless these tensors fit the plan and the pool."""
        for name, tensor in rows.items():
            if tensor.shape != shape:
                _refuse_shape(name, tensor, shape, "one row for each row of the plan")
            self._check_tensor(name, tensor, self._dtype)
            if name == "out" and not tensor.is_contiguous():
                raise InvalidArgument(
                    f"out has strides {tensor.stride()}: it must be contiguous, pass torch.empty({shape})"
                )
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            if cache.shape != self._cache_shape:
                _refuse_shape(name, cache, self._cache_shape, "[page, slot, head, dim] of the whole pool")
            self._check_tensor(name, cache, self._kv_dtype)
        if k_cache.stride() != v_cache.stride():
            raise InvalidArgument(
                f"k_cache has strides {k_cache.stride()} and v_cache {v_cache.stride()}: they must be equal, "
                "take both from one pool"
            )

    def _check_tensor(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        if tensor.dtype != dtype:
            raise InvalidArgument(f"{name} is {tensor.dtype}: it must be {dtype}, what this backend was made for")
        if tensor.device != self.device:
            raise InvalidArgument(f"{name} is on {tensor.device}: move it to {self.device}, the pool's device")
        strides = tensor.stride()
        if strides[-1] != 1:
            raise InvalidArgument(f"{name} has strides {strides}: the last must be 1, pass {name}.contiguous()")
        unit = _ALIGN_BYTES // dtype.itemsize
        if tensor.data_ptr() % _ALIGN_BYTES or any(
            s % unit for s, n in zip(strides[:-1], tensor.shape, strict=False) if n > 1
        ):
            raise InvalidArgument(
                f"{name} has strides {strides} and begins at {tensor.data_ptr():#x}: rows must begin at multiples of "
                f"{_ALIGN_BYTES} bytes, pass {name}.contiguous()"
            )


def _load(device: torch.device) -> Any:
    """The module flashinfer, if it can work here."""
    if device.type != "cuda":
        raise BackendUnavailable(f"FlashInfer runs on CUDA devices, not on {device}: use device='cuda' or device='cpu'")
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            f"device is {device}, but torch {torch.__version__} finds no CUDA device: check nvidia-smi and that torch "
            "is built for CUDA, or use device='cpu'"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise BackendUnavailable(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; FlashInfer's kernels need "
            "8.0 (Ampere) or later: use device='cpu'"
        )
    try:
        module = importlib.import_module("flashinfer")
    except ImportError as error:
        raise BackendUnavailable(
            f"attention on {device} needs FlashInfer ({error}): pip install 'radixkv[cuda]', or use device='cpu'"
        ) from error
    found = str(module.__version__)
    if tuple(int(part) for part in found.split(".")[:2]) < (0, 7):
        raise BackendUnavailable(f"FlashInfer {found} is too old: pip install -U 'radixkv[cuda]' for 0.7 or later")
    return module


def _check_sizes(num_qo_heads: int, num_kv_heads: int, num_pages: int, page_size: int) -> None:
    sizes = {"num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads, "num_pages": num_pages, "page_size": page_size}
    check_sizes(sizes)
    if num_qo_heads % num_kv_heads:
        raise InvalidArgument(
            f"num_qo_heads is {num_qo_heads} and num_kv_heads is {num_kv_heads}: the first must be a multiple of the "
            "second"
        )
    if num_pages * page_size >= 2**31:
        raise InvalidArgument(f"num_pages * page_size is {num_pages * page_size}: slots are int32, keep it below 2**31")


def _check_supported(dtype: torch.dtype, head_dim: int, kernels: str) -> None:
    if dtype not in (torch.bfloat16, torch.float16):
        raise BackendUnavailable(
            f"dtype is {dtype}: FlashInfer has kernels for torch.bfloat16 and torch.float16; convert the model, or use "
            "device='cpu', which also takes torch.float32"
        )
    if head_dim not in _HEAD_DIMS:
        raise BackendUnavailable(
            f"head_dim is {head_dim}: FlashInfer's kernels are used with {', '.join(map(str, _HEAD_DIMS))}; pad the "
            "heads with zeros, or use device='cpu'"
        )
    if kernels not in ("fa2", "auto"):
        raise InvalidArgument(f"kernels is {kernels!r}: use 'fa2' or 'auto'")


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _refuse_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], what: str) -> NoReturn:
    raise InvalidArgument(f"{name} has shape {tuple(tensor.shape)}: it must be {shape}, {what}")
