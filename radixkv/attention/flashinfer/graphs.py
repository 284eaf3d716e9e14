"""Decode steps that can be replayed from CUDA graphs.

A graph repeats the kernels that were launched while it was captured, with the same addresses. So every decode step of
the same number of requests is given the same memory: the index arrays lie at places that depend on that number alone,
and each combination of options and kind of layers keeps its wrapper, which is planned again when a step begins, before
any replay.
"""

from __future__ import annotations

import math

import torch

from radixkv import _core
from radixkv.attention import Options
from radixkv.attention.flashinfer.chunks import ChunkTables, copy_chunks
from radixkv.attention.flashinfer.plans import Planner, PlanSet, Schedule, StepArrays, Wrapper
from radixkv.errors import InvalidArgument

__all__ = ["DecodeGraphs", "refuse_capture"]

_ENTRIES_PER_PAGE = 4  # of the pool: how often requests of one step may share its pages, on average
_LEAST_ENTRIES = 1 << 16


class DecodeGraphs:
    """The memory and the wrappers of decode steps, by number of requests."""

    def __init__(self, device: torch.device, num_pages: int) -> None:
        self.plans = PlanSet(device, max(_ENTRIES_PER_PAGE * num_pages, _LEAST_ENTRIES))
        self._chunk_plans: dict[int, PlanSet] = {}  # by the length of chunks: memory of their own
        self._tables: dict[int, ChunkTables] = {}  # of the step; 0: not cut
        self._wrappers: dict[int, dict[tuple[Planner, Options], Wrapper]] = {}

    def fits(self, table: _core.Table) -> bool:
        """Whether the memory holds this step."""
        return table.staged_entries <= self.plans.entries

    def plan(self, batch: int, arrays: StepArrays, schedule: Schedule) -> dict[tuple[Planner, Options], Wrapper]:
        """Plan again what earlier steps of as many requests used; what it returns grows with `add`."""
        device = arrays.device
        self._tables = {0: ChunkTables(schedule, (device.kv_indptr, arrays.tail, device.kv_last_page_len))}
        wrappers = self._wrappers.setdefault(batch, {})
        for (planner, options), wrapper in wrappers.items():
            planner.plan(wrapper, self._cut(arrays, options.attention_chunk).schedule, options)
        self.plans.copies_queued()
        return wrappers

    def add(self, batch: int, arrays: StepArrays, planner: Planner, options: Options) -> Wrapper:
        """A wrapper for layers and options that no step of as many requests had, planned for this step."""
        schedule, buffers = self._cut(arrays, options.attention_chunk)
        wrapper = planner.new_graph_wrapper(*buffers)
        planner.plan(wrapper, schedule, options)
        self.plans.copies_queued()
        wrapper.fixed = True
        self._wrappers[batch][planner, options] = wrapper
        return wrapper

    def _cut(self, arrays: StepArrays, chunk: int) -> ChunkTables:
        """The step's tables for layers with chunks of this length, made once."""
        if chunk not in self._tables:
            page_size = self._tables[0].schedule.page_size
            if chunk not in self._chunk_plans:  # a page of the step is at most so many entries of a part
                entries = self.plans.entries * (page_size // math.gcd(page_size, chunk))
                self._chunk_plans[chunk] = PlanSet(self.plans.device, entries)
            plans = self._chunk_plans[chunk]
            plans.begin()
            self._tables[chunk] = copy_chunks(plans, arrays.host, page_size, chunk)
        return self._tables[chunk]

    def window_left(self, batch: int) -> int:
        """How many keys before its own a row sees at most in steps of as many requests, and so replays; -1: all."""
        windows = [options.lookback for _, options in self._wrappers.get(batch, {})]
        return -1 if min(windows, default=0) < 0 else max(windows, default=0)


def refuse_capture(device: torch.device, why: str) -> None:
    """Raise `InvalidArgument` if a CUDA graph is being captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise InvalidArgument(
            f"{why}: with Engine(cuda_graphs=True), run a step that has a graph_key once, then capture"
        )
