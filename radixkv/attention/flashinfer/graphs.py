"""Decode steps that can be replayed from CUDA graphs.

A graph repeats the kernels that were launched while it was captured, with the same addresses. So every decode step of
the same number of requests is given the same memory: the index arrays lie at places that depend on that number alone,
and each combination of options and kind of layers keeps its wrapper, which is planned again when a step begins, before
any replay.
"""

from __future__ import annotations

import torch

from radixkv import _core
from radixkv.attention import Options
from radixkv.attention.flashinfer.plans import Planner, PlanSet, Schedule, StepArrays, Wrapper
from radixkv.errors import InvalidArgument

__all__ = ["DecodeGraphs", "refuse_capture"]

_ENTRIES_PER_PAGE = 4  # of the pool: how often requests of one step may share its pages, on average
_LEAST_ENTRIES = 1 << 16


class DecodeGraphs:
    """The memory and the wrappers of decode steps, by number of requests."""

    def __init__(self, device: torch.device, num_pages: int) -> None:
        self.plans = PlanSet(device, max(_ENTRIES_PER_PAGE * num_pages, _LEAST_ENTRIES))
        self._wrappers: dict[int, dict[tuple[Planner, Options], Wrapper]] = {}

    def fits(self, table: _core.Table) -> bool:
        """Whether the memory holds this step."""
        return table.staged_entries <= self.plans.entries

    def plan(self, batch: int, schedule: Schedule) -> dict[tuple[Planner, Options], Wrapper]:
        """Plan again what earlier steps of as many requests used; what it returns grows with `add`."""
        wrappers = self._wrappers.setdefault(batch, {})
        for (planner, options), wrapper in wrappers.items():
            planner.plan(wrapper, schedule, options)
        self.plans.copies_queued()
        return wrappers

    def add(self, batch: int, arrays: StepArrays, schedule: Schedule, planner: Planner, options: Options) -> Wrapper:
        """A wrapper for layers and options that no step of as many requests had, planned for this step."""
        device = arrays.device
        wrapper = planner.new_graph_wrapper(device.kv_indptr, arrays.tail, device.kv_last_page_len)
        planner.plan(wrapper, schedule, options)
        self.plans.copies_queued()
        wrapper.fixed = True
        self._wrappers[batch][planner, options] = wrapper
        return wrapper

    def window_left(self, batch: int) -> int:
        """The widest window of steps of as many requests, which a replay may have; -1: all keys."""
        windows = [options.window_left for _, options in self._wrappers.get(batch, {})]
        return -1 if min(windows, default=0) < 0 else max(windows, default=0)


def refuse_capture(device: torch.device, why: str) -> None:
    """Raise `InvalidArgument` if a CUDA graph is being captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise InvalidArgument(
            f"{why}: with Engine(cuda_graphs=True), run a step that has a graph_key once, then capture"
        )
