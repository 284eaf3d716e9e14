"""Wrappers of FlashInfer, their workspaces, and the index arrays they are planned from.

FlashInfer's plan() writes into pinned memory and queues copies from it without waiting. If the host ran ahead and
planned the next step over the same memory, the step that is still queued would read the next one's schedule. So steps
alternate between two `PlanSet`s, and a set is filled again only after the copies queued from it have been made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from radixkv import _core
from radixkv.attention import Options
from radixkv.attention.flashinfer.kernels import COMMON_HEAD_DIMS, preparing

__all__ = [
    "Caches",
    "IndexArrays",
    "Kind",
    "PlanSet",
    "Planner",
    "Schedule",
    "Scratch",
    "Sinks",
    "StepArrays",
    "StepTensors",
    "Wrapper",
    "weigh",
]

Caches: TypeAlias = tuple[torch.Tensor, ...]
"""K and V of a layer, [num_pages, page_size, num_kv_heads, head_dim] both."""
Sinks: TypeAlias = torch.Tensor | None

_ALIGN = 4  # entries: every array begins at a multiple of 16 bytes
_FIRST_FLOAT_BYTES = 1 << 20
_FIRST_INT_BYTES = 1 << 18
_TENSOR_CORE_GROUP = 4  # query heads per key head from which tensor cores decode; CUDA cores take 1, 2 and 3


class Schedule(NamedTuple):
    """Arrays to plan from, all int32, in the layout of a `PageTable`: B groups of rows, each with its pages."""

    qo_indptr: torch.Tensor
    """[B + 1], on the host, as the others but kv_indices are."""
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    """[kv_indptr[B]], on the device."""
    kv_last_page_len: torch.Tensor
    page_size: int


@dataclass
class Wrapper:
    """A FlashInfer wrapper and the sizes of its workspaces."""

    handle: Any
    decode: bool
    float_workspace: torch.Tensor
    int_bytes: int = 0
    fixed: bool = False
    """Whether its workspaces must stay where they are, because a CUDA graph may have captured their places."""
    page_size: int = 0
    """Of the last plan."""

    def run(
        self, q: torch.Tensor, caches: Caches, out: torch.Tensor, scales: dict[str, float], sinks: Sinks = None
    ) -> None:
        """Attend as planned. scales: k_scale and v_scale of 8-bit caches. sinks: float32, a logit for each head."""
        if caches[0].shape[1] != self.page_size:  # planned over parts of pages
            caches = tuple(cache.view(-1, self.page_size, *cache.shape[2:]) for cache in caches)
        if sinks is None:
            self.handle.run(q, caches, out=out, **scales)
            return
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        self.handle.run(q, caches, out=out, lse=lse, return_lse=True, **scales)
        weigh(out, lse, sinks)


def weigh(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> None:
    """Let a logit for each head take part in the softmax of which out [rows, heads, head_dim] is the result.

    lse [rows, heads] is the logarithm, to the base 2, of the denominator without it. The logit has no value, so all it
    does is to take its share. To be done once a row, after all states of the row have been merged.
    """
    out.mul_(torch.sigmoid(lse * math.log(2) - sinks).unsqueeze(2))


class IndexArrays(NamedTuple):
    """The same int32 arrays twice."""

    host: list[torch.Tensor]
    """In pinned memory."""
    device: list[torch.Tensor]
    tail: torch.Tensor
    """The device's memory from the last of them on, beyond its end."""


class StepTensors(NamedTuple):
    """A step's arrays in the order in which `_core.Table.stage` writes them; int32, but for the three inputs."""

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_last_page_len: torch.Tensor
    slots: torch.Tensor
    request: torch.Tensor
    """[rows]: the request that each row belongs to."""
    position: torch.Tensor
    """[rows]: its index among the request's keys."""
    input_ids: torch.Tensor
    """int64, as the next two are: see `StepInputs`."""
    positions: torch.Tensor
    last_rows: torch.Tensor
    kv_indices: torch.Tensor

    @classmethod
    def of(cls, memory: torch.Tensor, spans: list[slice]) -> StepTensors:
        """The arrays that lie so in this memory."""
        arrays = cls(*(memory[span] for span in spans))
        return arrays._replace(
            input_ids=arrays.input_ids.view(torch.int64),
            positions=arrays.positions.view(torch.int64),
            last_rows=arrays.last_rows.view(torch.int64),
        )


class StepArrays(NamedTuple):
    """A step's arrays twice."""

    host: StepTensors
    """In pinned memory."""
    device: StepTensors
    tail: torch.Tensor
    """The device's memory from the first of kv_indices on, beyond their end."""


@dataclass
class PlanSet:
    """What one step needs to itself until the device has run it: memory for index arrays, and wrappers."""

    device: torch.device
    entries: int = 0
    """Size of the memory. While no more is asked for, the same calls give arrays at the same places."""
    wrappers: dict[tuple[Planner, bool], list[Wrapper]] = field(default_factory=dict)
    """By who plans them and whether they are for decode. A step takes one for each combination of options."""

    def __post_init__(self) -> None:
        cuda = self.device.type == "cuda"
        self._copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._pinned = cuda
        self._allocate(self.entries)
        self.taken: Counter[tuple[Planner, bool]] = Counter()

    def _allocate(self, entries: int) -> None:
        self._host = torch.empty(entries, dtype=torch.int32, pin_memory=self._pinned and entries > 0)
        self._on_device = torch.empty(entries, dtype=torch.int32, device=self.device)
        self._used = 0

    def begin(self) -> None:
        """Begin a step, once the copies that the last one queued have been made."""
        if self._copied is not None:
            self._copied.synchronize()
        self.taken.clear()
        self._used = 0

    def copy_step(self, table: _core.Table) -> StepArrays:
        """Have a step's arrays written to pinned memory, and copy them from there to the device as `copy` does."""
        entries = table.staged_entries
        begin = self._reserve(entries)
        spans = [
            slice(begin + first, begin + last)
            for first, last in table.stage(self._host.data_ptr() + 4 * begin, entries)
        ]
        self._send(begin, entries)
        tail = self._on_device[spans[-1].start :]
        return StepArrays(StepTensors.of(self._host, spans), StepTensors.of(self._on_device, spans), tail)

    def copy(self, arrays: Sequence[npt.NDArray[np.int32]]) -> IndexArrays:
        """Copy these arrays to pinned memory and from there, in one copy and without waiting, to the device."""
        ends = np.cumsum([0, *(-(-len(a) // _ALIGN) * _ALIGN for a in arrays)])
        entries = int(ends[-1])
        begins = (self._reserve(entries) + ends).tolist()
        staging = self._host.numpy()
        for begin, array in zip(begins, arrays, strict=False):
            staging[begin : begin + len(array)] = array
        self._send(begins[0], entries)
        spans = [slice(begin, begin + len(array)) for begin, array in zip(begins, arrays, strict=False)]
        tail = self._on_device[begins[len(spans) - 1] :]
        return IndexArrays([self._host[s] for s in spans], [self._on_device[s] for s in spans], tail)

    def _reserve(self, entries: int) -> int:
        """Where the next entries go. Arrays that were handed out keep the memory they lie in."""
        if self._used + entries > len(self._host):
            self._allocate(max(entries, 2 * len(self._host), 1024))
        return self._used

    def _send(self, begin: int, entries: int) -> None:
        whole = slice(begin, begin + entries)
        self._on_device[whole].copy_(self._host[whole], non_blocking=True)
        self._used = begin + entries
        self.copies_queued()

    def copies_queued(self) -> None:
        """Note that copies from this set's memory were queued: the next begin() waits for them."""
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.device))


class Scratch:
    """The memory in which running kernels keep what they split: one for all wrappers, as one kernel runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(_FIRST_FLOAT_BYTES, dtype=torch.uint8, device=device)

    def grow(self, num_bytes: int) -> None:
        """Have a buffer of this size or more. Wrappers keep the one that they were given."""
        if num_bytes > len(self.buffer):
            self.buffer = torch.empty(_power_of_two(num_bytes), dtype=torch.uint8, device=self.buffer.device)


class Kind(NamedTuple):
    """What FlashInfer plans for. Layers that are equal in this share wrappers, whatever their options and scales."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    stored: torch.dtype
    """Of the pages."""


class Planner:
    """Makes wrappers for one kind of layers, plans them, and gives them workspaces as large as their plans ask for.

    Args:
        api: the module flashinfer. scratch: of all planners. backend: "fa2" or "auto". dtype: of q and out.
    """

    def __init__(self, api: Any, scratch: Scratch, kind: Kind, *, backend: str, dtype: torch.dtype) -> None:
        self.api = api
        self.kind = kind
        self.eight_bit = kind.stored != dtype
        self.common = kind.head_dim in COMMON_HEAD_DIMS
        """Whether there are kernels that append and merge."""
        large_group = kind.num_qo_heads // kind.num_kv_heads >= _TENSOR_CORE_GROUP
        self.tensor_cores = large_group or self.eight_bit or not self.common
        """Whether decode uses them."""
        self._scratch = scratch
        self._backend = backend
        self._dtypes = {"q_data_type": dtype, "kv_data_type": kind.stored, "o_data_type": dtype}
        eight_bit = " over 8-bit K and V" if self.eight_bit else ""
        self.suffix = f"kernels for {str(dtype).removeprefix('torch.')}{eight_bit}, head_dim {kind.head_dim}"
        """Ends the name of every kernel in what `preparing` says."""

    def shapes(self, rows: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Of q and of k."""
        num_qo_heads, num_kv_heads, head_dim, _ = self.kind
        return (rows, num_qo_heads, head_dim), (rows, num_kv_heads, head_dim)

    def take(self, plans: PlanSet, decode: bool, schedule: Schedule, options: Options, causal: bool = True) -> Wrapper:
        """A wrapper of this set that the step does not use yet, planned."""
        wrappers, number = plans.wrappers.setdefault((self, decode), []), plans.taken[self, decode]
        if number == len(wrappers):
            wrappers.append(self._new_wrapper(decode))
        self.plan(wrappers[number], schedule, options, causal)
        plans.taken[self, decode] += 1
        plans.copies_queued()
        return wrappers[number]

    def new_graph_wrapper(self, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, last: torch.Tensor) -> Wrapper:
        """A decode wrapper whose kernels read these arrays of the device and nothing else that moves."""
        handle = self.api.BatchDecodeWithPagedKVCacheWrapper(
            self._scratch.buffer,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self.tensor_cores,
            paged_kv_indptr_buffer=kv_indptr,
            paged_kv_indices_buffer=kv_indices,
            paged_kv_last_page_len_buffer=last,
            backend=self._backend,
        )
        return Wrapper(handle, True, self._scratch.buffer)

    def plan(self, wrapper: Wrapper, schedule: Schedule, options: Options, causal: bool = True) -> None:
        """Plan a wrapper; causal: whether rows see their own position and what is before it, or all keys."""
        arguments, keywords = self._arguments(wrapper.decode, schedule, options, causal)
        wrapper.page_size = schedule.page_size
        kind = "prefill" if self.tensor_cores or not wrapper.decode else "decode"
        kind += " window" if options.window_left >= 0 else ""
        kind += " soft cap" if options.logits_soft_cap > 0 else ""
        with preparing(f"{kind} {self.suffix}"):
            if wrapper.int_bytes == 0:
                self._grow(wrapper, arguments, keywords)
            try:
                wrapper.handle.plan(*arguments, **keywords)
            except RuntimeError:  # the workspace that an earlier step was content with may be too small for this one
                if wrapper.fixed or not self._grow(wrapper, arguments, keywords):
                    raise
                wrapper.handle.plan(*arguments, **keywords)

    def _new_wrapper(self, decode: bool) -> Wrapper:
        if decode:
            handle = self.api.BatchDecodeWithPagedKVCacheWrapper(
                self._scratch.buffer, "NHD", use_tensor_cores=self.tensor_cores, backend=self._backend
            )
        else:
            handle = self.api.BatchPrefillWithPagedKVCacheWrapper(self._scratch.buffer, "NHD", backend=self._backend)
        return Wrapper(handle, decode, self._scratch.buffer)

    def _arguments(
        self, decode: bool, schedule: Schedule, options: Options, causal: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What plan() and workspace_size() of either wrapper take."""
        keywords = options._asdict() | self._dtypes
        del keywords["attention_chunk"]  # the schedule is of one chunk for each group
        *tables, page_size = schedule
        sizes = (*self.kind[:3], page_size)
        if decode:
            return (*tables[1:], *sizes), keywords
        return (*tables, *sizes), keywords | {"causal": causal}

    def _grow(self, wrapper: Wrapper, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
        """Give the wrapper the workspace this plan asks for; False if it has that already.

        The float workspace is scratch of the running kernel and so shared by all wrappers; the other one holds a
        wrapper's schedule.
        """
        float_bytes, int_bytes = wrapper.handle.workspace_size(*arguments, **keywords)
        if float_bytes <= len(wrapper.float_workspace) and int_bytes <= wrapper.int_bytes:
            return False
        self._scratch.grow(float_bytes)
        wrapper.float_workspace = self._scratch.buffer
        wrapper.int_bytes = max(_power_of_two(int_bytes), wrapper.int_bytes, _FIRST_INT_BYTES)
        int_workspace = torch.empty(wrapper.int_bytes, dtype=torch.uint8, device=wrapper.float_workspace.device)
        wrapper.handle.reset_workspace_buffer(wrapper.float_workspace, int_workspace)
        return True


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
