"""Cascade with FlashInfer: one launch for each level of a `CascadePlan`, and the states merged.

A level attends the rows of all users of a segment to its pages, which are read once, and gives a state for each row:
the output over these keys alone and the logarithm of its softmax's denominator (LSE). States of one row over different
keys merge into the state over all of them. FlashInfer's own wrapper for this lacks scales, windows and out=, so the
levels are run one by one here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from radixkv.attention import Options
from radixkv.attention.cascade import CascadePlan
from radixkv.attention.flashinfer.kernels import preparing
from radixkv.attention.flashinfer.plans import Caches, Planner, PlanSet, Schedule, Sinks, Wrapper, weigh

__all__ = ["CascadeRun", "Levels", "copy_levels", "merge", "plan_cascade"]


class Levels(NamedTuple):
    """The levels of one step for one window. They are of pages, and so the same for every layer with this window."""

    shared: list[Schedule]
    own: Schedule
    """The last level: each request's own rest, its new rows included."""
    order: tuple[torch.Tensor, torch.Tensor] | None
    """int32 [rows] each: the row that each of the levels' rows is, and the inverse. None: they are the same rows."""


@dataclass
class CascadeRun:
    """The planned levels of one step for layers of one kind with the same options. Used as a `Wrapper` is."""

    shared: list[Wrapper]
    """A wrapper for each shared level."""
    own: Wrapper
    """That of the last level, causal."""
    order: tuple[torch.Tensor, torch.Tensor] | None
    """As in `Levels`."""
    planner: Planner

    def run(
        self, q: torch.Tensor, caches: Caches, out: torch.Tensor, scales: dict[str, float], sinks: Sinks = None
    ) -> None:
        """Attend as planned. q and out as for `Wrapper.run`; q is copied once where rows must be put in order."""
        if self.order is not None:
            q = q.index_select(0, self.order[0])
        state = out if self.order is None else torch.empty_like(out)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        level_state, level_lse = torch.empty_like(state), torch.empty_like(lse)
        # k_scale belongs to the logits, and so to each LSE. v_scale is a factor of the sum: it can wait until the end.
        keys_only = {"k_scale": scales["k_scale"]} if scales else {}
        self.own.handle.run(q, caches, out=state, lse=lse, return_lse=True, **keys_only)
        for wrapper in self.shared:
            wrapper.handle.run(q, caches, out=level_state, lse=level_lse, return_lse=True, **keys_only)
            merge(self.planner, state, lse, level_state, level_lse)
        if scales and scales["v_scale"] != 1:
            state.mul_(scales["v_scale"])
        if sinks is not None:
            weigh(state, lse, sinks)
        if self.order is not None:
            torch.index_select(state, 0, self.order[1], out=out)


def merge(
    planner: Planner, state: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """Make a state [rows, heads, head_dim] with its lse [rows, heads] in float32 that over its keys and the other's."""
    with preparing(f"merge {planner.suffix}"):
        planner.api.merge_state_in_place(state, lse, other, other_lse)


def copy_levels(plans: PlanSet, plan: CascadePlan, window_left: int) -> Levels | None:
    """Copy the levels that layers with this window have; None if nothing is shared, as may be with a window."""
    levels = plan.levels(window_left)
    if len(levels) == 1:
        return None
    rows = plan.rows
    in_order = bool((rows[1:] > rows[:-1]).all())
    places = [] if in_order else [rows.astype(np.int32), np.argsort(rows).astype(np.int32)]
    arrays = plans.copy([array for level in levels for array in level] + places)
    schedules = []
    for i in range(len(levels)):
        qo_indptr, kv_indptr, _, last = arrays.host[4 * i : 4 * i + 4]
        schedules.append(Schedule(qo_indptr, kv_indptr, arrays.device[4 * i + 2], last, plan.core.page_size))
    order: Any = None if in_order else tuple(arrays.device[-2:])
    return Levels(schedules[:-1], schedules[-1], order)


def plan_cascade(planner: Planner, plans: PlanSet, levels: Levels, options: Options) -> CascadeRun:
    """Plan the levels for layers of the planner's kind with these options."""
    everything = options._replace(window_left=-1)
    shared = [planner.take(plans, False, s, everything, causal=False) for s in levels.shared]
    return CascadeRun(shared, planner.take(plans, False, levels.own, options), levels.order, planner)
