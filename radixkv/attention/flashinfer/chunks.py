"""Layers that attend in chunks: each request is cut where a chunk begins, and every part sees the pages of its chunk.

FlashInfer has windows, which move with the row, but nothing that stands still while the rows move on. So the rows of a
request that lie in one chunk are a group of their own, whose pages begin where the chunk does. Where that is inside a
page, the pool is taken as one of smaller pages: of the largest size of which page and chunk are both multiples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from radixkv.attention.cascade import indptr, runs
from radixkv.attention.flashinfer.plans import PlanSet, Schedule, StepTensors

__all__ = ["ChunkTables", "copy_chunks", "longest"]


class ChunkTables(NamedTuple):
    """A step's page tables, cut into chunks of one length."""

    schedule: Schedule
    buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """On the device: kv_indptr, kv_indices with the memory beyond their end, and kv_last_page_len."""


def copy_chunks(plans: PlanSet, host: StepTensors, page_size: int, chunk: int) -> ChunkTables:
    """Cut a step's tables and copy them. In an empty set of enough memory they lie where the number of groups says."""
    kv_indptr, last, qo_indptr, kv_indices, unit = _cut(host, page_size, chunk)
    arrays = plans.copy([kv_indptr, last, qo_indptr, kv_indices])
    schedule = Schedule(arrays.host[2], arrays.host[0], arrays.device[3], arrays.host[1], unit)
    return ChunkTables(schedule, (arrays.device[0], arrays.tail, arrays.device[1]))


def longest(host: StepTensors, page_size: int) -> int:
    """Tokens of the step's longest request, dropped ones included."""
    _, before, lengths = _spans(host, page_size)
    return int((before + lengths).max(initial=0))


def _spans(host: StepTensors, page_size: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Of each request: its first new row and its end, in its pages, and how many tokens it dropped before these."""
    qo_indptr, kv_indptr = host.qo_indptr.numpy().astype(np.int64), host.kv_indptr.numpy().astype(np.int64)
    lengths = (np.diff(kv_indptr) - 1) * page_size + host.kv_last_page_len.numpy()
    first = lengths - np.diff(qo_indptr)
    if not len(host.positions):  # a table of arrays knows no other positions
        return first, np.zeros_like(first), lengths
    return first, host.positions.numpy()[qo_indptr[:-1]] - first, lengths


def _cut(
    host: StepTensors, page_size: int, chunk: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32], int]:
    """kv_indptr, kv_last_page_len, qo_indptr and kv_indices of the parts, and the page size that these are for."""
    unit = math.gcd(page_size, chunk)
    first, before, lengths = _spans(host, page_size)
    newest = (before + lengths - 1) // chunk
    oldest = np.minimum((before + first) // chunk, newest)
    counts = newest - oldest + 1
    request = np.repeat(np.arange(len(counts)), counts)
    begin = np.maximum(runs(oldest, counts) * chunk - before[request], 0)
    end = np.minimum((runs(oldest, counts) + 1) * chunk - before[request], lengths[request])
    rows = end - np.maximum(begin, first[request])
    units = -(-end // unit) - begin // unit
    at = runs(begin // unit, units)
    per_page = page_size // unit
    pages = host.kv_indices.numpy()[np.repeat(host.kv_indptr.numpy()[request], units) + at // per_page]
    kv_indices = (pages * per_page + at % per_page).astype(np.int32)
    return indptr(units), ((end - 1) % unit + 1).astype(np.int32), indptr(rows), kv_indices, unit
