"""Attention on the CPU with the kernels of radixkv._core.

An output row is bit-identical whatever part of its keys was cached, whatever the page size, the page ids, the rest of
the batch and the number of threads (see csrc/attention/attention.hpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

import torch

from radixkv import _core
from radixkv.attention import Options, PageTable, StepInputs, StoredRows
from radixkv.attention.cascade import NATIVE, CascadeCosts, CascadePlan
from radixkv.attention.checks import (
    check_latent,
    check_options,
    check_rows,
    check_sinks,
    check_threads,
    core_table,
    layer_at,
    scale_of,
)
from radixkv.errors import InvalidArgument
from radixkv.pool import LayerKV

__all__ = ["NativeAttention"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = Options()
_CPU = torch.device("cpu")


class NativeAttention:
    """Attention over the layers of a pool in RAM, which may differ in heads, dimensions and format.

    dtype (float32, bfloat16 or float16) is that of every tensor; what is stored is the same or float8_e4m3fn. Sums are
    float32 throughout. num_threads defaults to torch's. isa forces an instruction set; by default it is the machine's
    best, or the environment's RADIXKV_ISA. A latent layer takes v as k[..., :v_dim], and an sm_scale.
    Keys that several requests share are read once for all of them where `cascade` says that it pays (`cascade.OFF`:
    never); it changes the time, not a bit of the result.
    One call runs at a time. Raises `InvalidArgument` for what the kernels do not take: dimensions that are no multiple
    of 8 or above 576, an isa this machine lacks, num_pages * page_size of 2**31 or more.
    """

    view_unit = _core.CHUNK_KEYS  # tiles and chunks lie at absolute positions

    def __init__(
        self,
        layers: Sequence[LayerKV],
        *,
        dtype: torch.dtype,
        num_threads: int | None = None,
        isa: str | None = None,
        cascade: CascadeCosts = NATIVE,
    ) -> None:
        if dtype not in _DTYPES:
            raise InvalidArgument(f"dtype is {dtype}: use torch.float32, torch.bfloat16 or torch.float16")
        threads = torch.get_num_threads() if num_threads is None else num_threads
        check_threads(threads)
        self._layers = list(layers)  # keeps the memory alive that the plan has the addresses of
        self._pages = (layers[0].num_pages, layers[0].page_size)
        name = str(dtype).removeprefix("torch.")
        self._plan = _core.AttentionPlan([kv.core for kv in layers], name, *self._pages, threads, isa or "")
        self._plan.set_costs(_core.CascadeCosts(*astuple(cascade)))
        self._costs = cascade
        self._token_bytes = sum(kv.format.token_bytes(kv.shape) for kv in layers) // len(layers)
        self._dtype = dtype
        self._rows = 0

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
        check_threads(num_threads)
        self._plan.num_threads = num_threads

    def stored(self, layer: int) -> tuple[StoredRows, StoredRows]:
        """What append has stored in 8 or 4 bits of a layer's keys, and of its values, since the backend was made."""
        layer_at(self._layers, layer)
        k, v = self._plan.counts(layer)
        return StoredRows.of(k), StoredRows.of(v)

    def warm_up(self) -> None:
        """Nothing to do: the kernels are compiled with the package."""

    @property
    def cascade(self) -> CascadePlan:
        """What the planned requests share and what is made of it; it stays valid when the step has ended.

        Raises `LeaseError` if it has ended already, and its pages are no longer known.
        """
        return CascadePlan(self._plan.cascade, self._token_bytes, self._costs).keep()

    @property
    def graph_key(self) -> None:
        """None: there are no CUDA graphs here."""

    @property
    def graph_window(self) -> int:
        """0, as nothing is replayed."""
        return 0

    def plan(self, table: PageTable | _core.Table) -> StepInputs:
        """Check `table` and schedule the step. A table that raises `InvalidArgument` changes nothing."""
        table = core_table(table, *self._pages)
        self._plan.plan(table)
        self._rows = self._plan.num_rows
        return StepInputs(*map(torch.from_numpy, (table.input_ids, table.positions, table.last_rows)))

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k and v into the slots of the step's rows, in the layer's format."""
        shape, rows, dtype = layer_at(self._layers, layer).shape, self._rows, self._dtype
        k_shape, v_shape = (rows, shape.num_kv_heads, shape.k_dim), (rows, shape.num_kv_heads, shape.v_dim)
        k_stride, v_stride = k.stride(), v.stride()
        if not (
            k.shape == k_shape
            and v.shape == v_shape
            and k.dtype is dtype
            and v.dtype is dtype
            and k.is_cpu
            and v.is_cpu
            and k_stride[2] == v_stride[2] == 1
        ):
            check_rows("k", k, k_shape, dtype, _CPU)
            check_rows("v", v, v_shape, dtype, _CPU)
        if shape.latent:
            check_latent(k, v)
        self._plan.append(layer, k.data_ptr(), k_stride[0], k_stride[1], v.data_ptr(), v_stride[0], v_stride[1])

    def run(
        self,
        layer: int,
        q: torch.Tensor,
        out: torch.Tensor,
        options: Options = _PLAIN,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Attend q to the layer's pages and write out."""
        shape, rows, dtype = layer_at(self._layers, layer).shape, self._rows, self._dtype
        q_shape, out_shape = (rows, shape.num_qo_heads, shape.k_dim), (rows, shape.num_qo_heads, shape.v_dim)
        q_stride = q.stride()
        if not (
            q.shape == q_shape
            and out.shape == out_shape
            and q.dtype is dtype
            and out.dtype is dtype
            and q.is_cpu
            and out.is_cpu
            and q_stride[2] == 1
            and out.is_contiguous()
        ):
            check_rows("q", q, q_shape, dtype, _CPU)
            check_rows("out", out, out_shape, dtype, _CPU)
        check_options(options)
        sm_scale = scale_of(options, shape)
        if sinks is not None:
            check_sinks(sinks, shape.num_qo_heads, _CPU)
        at = 0 if sinks is None else sinks.data_ptr()
        self._plan.run(layer, q.data_ptr(), q_stride[0], q_stride[1], out.data_ptr(), sm_scale, *options[1:], at)
