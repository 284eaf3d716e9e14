"""Attention on CUDA with FlashInfer's paged kernels.

A step whose requests have one row each runs the decode wrapper, any other the prefill wrapper over one ragged batch, a
step whose requests share enough a wrapper for each level of its cascade. FlashInfer takes heads, head_dim, the dtype of
the pages, scale, window and soft cap when it plans. So a step is planned once for each combination that its layers
have, when the first such layer runs, and always from the same arrays, but for layers that attend in chunks (chunks.py).
Kernels are compiled at their first use: see `FlashInferAttention.warm_up`.

All calls must come on one CUDA stream. FlashInfer checks neither devices nor row counts nor the values of tables, and
computes something with whatever it is given; everything is checked here first.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from radixkv import _core
from radixkv.attention import Options, PageTable, StepInputs
from radixkv.attention.cascade import FLASHINFER, OFF, CascadeCosts, CascadePlan, core_costs
from radixkv.attention.checks import (
    check_latent,
    check_options,
    check_rows,
    check_sinks,
    core_table,
    layer_at,
    scale_of,
)
from radixkv.attention.flashinfer.cascade import CascadeRun, Levels, copy_levels, merge, plan_cascade
from radixkv.attention.flashinfer.chunks import copy_chunks, longest
from radixkv.attention.flashinfer.graphs import DecodeGraphs, refuse_capture
from radixkv.attention.flashinfer.kernels import COMMON_HEAD_DIMS, check_layer, check_supported, preparing
from radixkv.attention.flashinfer.latent import LatentPlanner, check_latent_call
from radixkv.attention.flashinfer.plans import Kind, Planner, PlanSet, Schedule, Scratch, StepArrays, Wrapper
from radixkv.attention.fp8 import quantize, rotation
from radixkv.errors import BackendUnavailable, InvalidArgument
from radixkv.pool import LayerKV

__all__ = ["FlashInferAttention", "load"]

_ALIGN_BYTES = 16  # the kernels load rows 16 bytes at a time
_PLAIN = Options()
_WINDOWS = (
    "in a layer with a sliding window, a segment is shared if it lies in the window of every row of its users; if a "
    "window cuts it, they read it and what follows one by one; a layer that attends in chunks shares in steps whose "
    "requests are all in their first chunk"
)
_GRAPHS = "decode steps of this engine can be replayed from CUDA graphs, which have no cascade"
_NO_MERGE = f"cascade is for head_dim {', '.join(map(str, COMMON_HEAD_DIMS))}: FlashInfer merges no others"


class _Layer(NamedTuple):
    """A layer of the pool and who plans for it."""

    kv: LayerKV
    planner: Planner
    scales: dict[str, float]
    """k_scale and v_scale of 8-bit pages."""
    rotation: torch.Tensor | None
    """Of rows of q, k and v before they are used, and of out after: [head_dim, head_dim]."""


@dataclass(frozen=True)
class _Step:
    """What plan() made of a table."""

    rows: int
    decode: bool
    graphs: DecodeGraphs | None  # whose memory the step uses, if it can be replayed
    arrays: StepArrays
    schedule: Schedule
    chunks: dict[int, Schedule] = field(default_factory=dict)  # by their length; not of steps that can be replayed

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return longest(self.arrays.host, self.schedule.page_size)


class FlashInferAttention:
    """Attention over the layers of a pool on a CUDA device, which may differ in heads, head_dim and format.

    dtype (bfloat16 or float16) is that of every tensor; a layer stores the same or float8_e4m3fn. cascade says when
    keys that several requests share are read once for all of them (`cascade.OFF`: never). cuda_graphs: decode steps of
    one number of requests use the same memory every time, so that they can be captured and replayed; they have no
    cascade. kernels names FlashInfer's kernels: "fa2", or "auto" for FlashInfer's own choice. api is the module to call
    in place of flashinfer (a stand-in for tests; the device may then be any). Raises `InvalidArgument` for sizes that
    cannot work, `BackendUnavailable` for what FlashInfer or this machine lacks; it says what to change.
    """

    view_unit = 1

    def __init__(
        self,
        layers: Sequence[LayerKV],
        *,
        dtype: torch.dtype,
        cascade: CascadeCosts = FLASHINFER,
        cuda_graphs: bool = False,
        kernels: str = "fa2",
        api: Any = None,
    ) -> None:
        num_pages, page_size = self._pages = (layers[0].num_pages, layers[0].page_size)
        check_supported(dtype, kernels)
        for number, kv in enumerate(layers):
            check_layer(number, kv, dtype)
            if kv.shape.latent and cuda_graphs:
                raise BackendUnavailable(
                    f"layer {number} is latent: its steps are not captured in CUDA graphs yet, leave cuda_graphs out"
                )
        if num_pages * page_size >= 2**31:
            raise InvalidArgument(
                f"num_pages * page_size is {num_pages * page_size}: slots are int32, keep it below 2**31"
            )
        self.device = device = layers[0].k.device
        self._api = load(device) if api is None else api
        self._dtype = dtype
        self._layers = _planned_by_kind(self._api, layers, dtype, kernels)
        self._planners = tuple(dict.fromkeys(layer.planner for layer in self._layers))
        self._token_bytes = sum(kv.format.token_bytes(kv.shape) for kv in layers) // len(layers)
        merges = any(planner.common for planner in self._planners)
        self._costs = replace(cascade, granularity=1) if merges else OFF  # pages are served whole
        self._graphs = DecodeGraphs(device, num_pages) if cuda_graphs else None
        self._sets = (PlanSet(device), PlanSet(device))
        self._turn = 0
        self._step: _Step | None = None
        self._rows = 0
        self._finders = [(costs, _core.CascadeFinder(core_costs(costs))) for costs in (self._costs, OFF)]
        self._cascade = CascadePlan.derive(
            PageTable(*(np.zeros(n, dtype=np.int32) for n in (1, 1, 0, 0, 0))), page_size
        )
        self._levels: dict[int, Levels | None] = {}  # by window
        self._planned: dict[tuple[Planner, Options], Wrapper | CascadeRun] = {}

    def warm_up(self) -> None:
        """Compile and load the kernels of decode, prefill and cascade by running a token and then two.

        Overwrites the first two slots of a layer of each kind. Layers with a window or a soft cap need kernels of their
        own, which are compiled when such a layer first runs. Says on standard error what it waits for.
        """
        first = {layer.planner: number for number, layer in reversed(list(enumerate(self._layers)))}
        for rows in range(1, min(2, self._pages[0] * self._pages[1]) + 1):
            pages = -(-rows // self._pages[1])
            steps = [[0, rows], [0, pages], range(pages), [rows - (pages - 1) * self._pages[1]], range(rows)]
            self.plan(PageTable(*(np.array(a, dtype=np.int32) for a in steps)))
            for planner in self._planners:
                if isinstance(planner, LatentPlanner):
                    self._warm_up_latent(first[planner], planner, rows)
                    continue
                q, kv = (torch.zeros(s, dtype=self._dtype, device=self.device) for s in planner.shapes(rows))
                self.append(first[planner], kv, kv)
                self.run(first[planner], q, torch.empty_like(q))
        for planner in self._planners:
            if planner.common:
                states = torch.zeros((2, *planner.shapes(2)[0]), dtype=self._dtype, device=self.device)
                lses = torch.zeros(states.shape[:3], dtype=torch.float32, device=self.device)
                merge(planner, states[0], lses[0], states[1], lses[1])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def plan(self, table: PageTable | _core.Table) -> StepInputs:
        """Copy and check `table`. A table that raises `InvalidArgument` changes nothing.

        The inputs lie in memory that the step after the next one fills again; with a graph_key, the next one.
        """
        table = core_table(table, *self._pages)
        rows = table.num_rows
        decode = rows == table.num_requests
        graphs = self._graphs if self._graphs is not None and decode and rows and self._graphs.fits(table) else None
        if graphs is None:
            self._turn ^= 1
        plans = self._sets[self._turn] if graphs is None else graphs.plans
        plans.begin()
        arrays = plans.copy_step(table)
        host, device = arrays.host, arrays.device
        tables = (host.qo_indptr, host.kv_indptr, device.kv_indices, host.kv_last_page_len)
        schedule = Schedule(*tables, page_size=self._pages[1])
        self._step = _Step(rows, decode, graphs, arrays, schedule) if rows else None
        costs, finder = self._finders[graphs is not None]
        self._cascade = CascadePlan(finder.find(table), self._token_bytes, costs)
        self._levels = {}
        self._planned = {}
        if graphs is not None:
            self._planned.update(graphs.plan(rows, arrays, schedule))
        self._rows = rows
        return StepInputs(device.input_ids, device.positions, device.last_rows)

    @property
    def cascade(self) -> CascadePlan:
        """What the planned requests share, which of it is read once for all of them, and why.

        Raises `LeaseError` if the step has ended, unless its pages were asked for before.
        """
        plan = self._cascade.keep()
        if not plan.segments:
            return plan
        if self.graph_key is not None:
            return replace(plan, remark=_GRAPHS)
        others = "" if all(planner.common for planner in self._planners) else _NO_MERGE
        return replace(plan, remark="; ".join(filter(None, [_WINDOWS if plan.shared else "", others])))

    @property
    def graph_key(self) -> int | None:
        """The number of requests, if the planned step can be captured in a CUDA graph or replayed from one.

        Steps with equal keys have the same memory for everything that append and run read beside their arguments.
        """
        return self._step.rows if self._step is not None and self._step.graphs is not None else None

    @property
    def graph_window(self) -> int:
        """How many keys before its own a row sees at most in steps with the planned step's key; -1: all."""
        return 0 if self.graph_key is None or self._graphs is None else self._graphs.window_left(self.graph_key)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k, v [rows, num_kv_heads, head_dim] into the slots of the step's rows."""
        kv, planner, scales, rotation = layer_at(self._layers, layer)
        if isinstance(planner, LatentPlanner):
            self._append_latent(kv, planner, k, v)
            return
        self._check({"k": k, "v": v}, planner.shapes(self._rows)[1])
        if self._step is None:
            return
        at = self._step.arrays.device
        # A replay reads as many of kv_indices as its own step has.
        kv_indices = at.kv_indices if self._step.graphs is None else self._step.arrays.tail
        if rotation is not None:
            k, v = k.float() @ rotation, v.float() @ rotation
        if planner.eight_bit:
            k, v = quantize(k, scales["k_scale"]), quantize(v, scales["v_scale"])
        if not planner.common:
            page, offset = at.slots // self._pages[1], at.slots % self._pages[1]
            for cache, rows in ((kv.k, k), (kv.v, v)):
                if planner.eight_bit:  # as bytes: torch does not index every kind of 8-bit float
                    cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
                cache[page, offset] = rows
            return
        with preparing(f"append {planner.suffix}"):
            self._api.append_paged_kv_cache(
                k, v, at.request, at.position, (kv.k, kv.v),
                kv_indices, at.kv_indptr, at.kv_last_page_len, kv_layout="NHD",
            )  # fmt: skip

    def run(
        self,
        layer: int,
        q: torch.Tensor,
        out: torch.Tensor,
        options: Options = _PLAIN,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Attend q [rows, num_qo_heads, head_dim] to the layer's pages and write out, contiguous, of the same shape."""
        kv, planner, scales, rotation = layer_at(self._layers, layer)
        if isinstance(planner, LatentPlanner):
            self._run_latent(layer, planner, q, out, options, sinks)
            return
        self._check({"q": q, "out": out}, planner.shapes(self._rows)[0])
        check_options(options)
        if sinks is not None:
            check_sinks(sinks, planner.kind.num_qo_heads, self.device)
        sm_scale, window_left, logits_soft_cap, attention_chunk = options
        if sm_scale is None:
            sm_scale = planner.kind.head_dim**-0.5
        if sm_scale <= 0:
            raise BackendUnavailable(
                f"sm_scale is {sm_scale}: FlashInfer's softmax needs a positive factor; negate q, or use device='cpu'"
            )
        if self._step is None:
            return
        if window_left >= self._pages[0] * self._pages[1]:
            window_left = -1  # wider than the pool: the kernels add it to positions in 32 bits
        if attention_chunk and self._step.graphs is None and self._step.longest <= attention_chunk:
            attention_chunk = 0  # all rows are in the first chunk; a replay may go on to the next
        options = Options(float(sm_scale), int(window_left), float(logits_soft_cap), int(attention_chunk))
        planned = self._planned.get((planner, options))
        if planned is None:
            planned = self._planned[planner, options] = self._plan_for(planner, options, self._step)
        elif self._step.graphs is None:
            refuse_capture(self.device, "this step must not be captured, as later ones have other memory")
        if rotation is None:
            planned.run(q, (kv.k, kv.v), out, scales, sinks)
        else:
            planned.run((q.float() @ rotation).to(self._dtype), (kv.k, kv.v), out, scales, sinks)
            out.copy_(out.float() @ rotation)

    def _plan_for(self, planner: Planner, options: Options, step: _Step) -> Wrapper | CascadeRun:
        """Plan the step for layers of the planner's kind with these options."""
        refuse_capture(self.device, "the first layer with these options plans, which must not be captured")
        if step.graphs is not None:
            return step.graphs.add(step.rows, step.arrays, planner, options)
        plans, chunk = self._sets[self._turn], options.attention_chunk
        if chunk:
            if chunk not in step.chunks:
                step.chunks[chunk] = copy_chunks(plans, step.arrays.host, self._pages[1], chunk).schedule
            return planner.take(plans, step.decode, step.chunks[chunk], options)
        if self._cascade.shared and planner.common:
            window = options.window_left
            if window not in self._levels:
                self._levels[window] = copy_levels(plans, self._cascade, window)
            levels = self._levels[window]
            if levels is not None:
                return plan_cascade(planner, plans, levels, options)
        return planner.take(plans, step.decode, step.schedule, options)

    # --- latent layers ----------------------------------------------------------------------------------------------

    def _append_latent(self, kv: LayerKV, planner: LatentPlanner, k: torch.Tensor, v: torch.Tensor) -> None:
        shapes = planner.row_shapes(self._rows)
        self._check({"k": k}, shapes["k"])
        self._check({"v": v}, shapes["v"])
        check_latent(k, v)
        if self._step is not None:
            planner.append(kv, self._step.arrays.device, k)

    def _run_latent(
        self,
        layer: int,
        planner: LatentPlanner,
        q: torch.Tensor,
        out: torch.Tensor,
        options: Options,
        sinks: torch.Tensor | None,
    ) -> None:
        kv, shapes = self._layers[layer].kv, planner.row_shapes(self._rows)
        self._check({"q": q}, shapes["q"])
        self._check({"out": out}, shapes["out"])
        check_options(options)
        check_latent_call(layer, options, sinks)
        options = Options(float(scale_of(options, kv.shape)))
        if self._step is None:
            return
        planned = self._planned.get((planner, options))
        if planned is None:
            refuse_capture(self.device, "steps over latent layers must not be captured")
            planned = planner.take(self._sets[self._turn], self._step.decode, self._step.schedule, options)
            self._planned[planner, options] = planned
        planned.run(q, (kv.k, kv.v), out, {})

    def _warm_up_latent(self, layer: int, planner: LatentPlanner, rows: int) -> None:
        shapes = planner.row_shapes(rows)
        q, out, k = (torch.zeros(shapes[name], dtype=self._dtype, device=self.device) for name in ("q", "out", "k"))
        self.append(layer, k, k[..., : out.shape[2]])
        self.run(layer, q, out, Options(1.0))

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check(self, rows: dict[str, torch.Tensor], shape: tuple[int, ...]) -> None:
        """Raise unless these tensors fit the plan, and the kernels' loads."""
        unit = _ALIGN_BYTES // self._dtype.itemsize
        for name, tensor in rows.items():
            check_rows(name, tensor, shape, self._dtype, self.device)
            strides = tensor.stride()
            if tensor.data_ptr() % _ALIGN_BYTES or any(
                s % unit for s, n in zip(strides[:-1], tensor.shape, strict=False) if n > 1
            ):
                raise InvalidArgument(
                    f"{name} has strides {strides} and begins at {tensor.data_ptr():#x}: rows must begin at multiples "
                    f"of {_ALIGN_BYTES} bytes, pass {name}.contiguous()"
                )


def _planned_by_kind(api: Any, layers: Sequence[LayerKV], dtype: torch.dtype, backend: str) -> list[_Layer]:
    """The layers, each with the planner of its kind."""
    scratch = Scratch(layers[0].k.device)
    planners: dict[Kind, Planner] = {}
    planned = []
    for kv in layers:
        shape, stored = kv.shape, kv.format
        kind = Kind(shape.num_qo_heads, shape.num_kv_heads, shape.k_dim, kv.k.dtype)
        if kind not in planners and shape.latent:
            planners[kind] = LatentPlanner(api, scratch, kv, backend=backend, dtype=dtype)
        elif kind not in planners:
            planners[kind] = Planner(api, scratch, kind, backend=backend, dtype=dtype)
        planner = planners[kind]
        scales = {"k_scale": stored.k.scale, "v_scale": stored.v.scale} if planner.eight_bit else {}
        turned = rotation(shape.k_dim, kv.k.device) if stored.k.rotated else None
        planned.append(_Layer(kv, planner, scales, turned))
    return planned


def load(device: torch.device) -> Any:
    """The module flashinfer, if it can work on this device. Raises `BackendUnavailable`."""
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
