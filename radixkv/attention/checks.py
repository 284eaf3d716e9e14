"""Checks of what callers hand to a backend. Every message gives the numbers and what would fit."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from radixkv.attention import PageTable
from radixkv.errors import InvalidArgument

__all__ = ["RowPlaces", "check_int32", "check_options", "check_sizes", "check_table"]


_INT32 = np.dtype(np.int32)


class RowPlaces(NamedTuple):
    """Where each row of a table stands, both int32 [rows]."""

    request: npt.NDArray[np.int32]
    """The request it belongs to."""
    position: npt.NDArray[np.int32]
    """Its index in the request's sequence."""


def check_int32(name: str, array: Any) -> None:
    """Raise unless `array` is a contiguous one-dimensional int32 numpy array."""
    ok = isinstance(array, np.ndarray) and array.dtype == _INT32 and array.ndim == 1 and array.flags.c_contiguous
    if not ok:
        kind = f"{array.dtype} with {array.ndim} dimensions" if hasattr(array, "dtype") else type(array).__name__
        raise InvalidArgument(f"{name} is {kind}: pass a contiguous one-dimensional int32 numpy array")


def check_sizes(sizes: dict[str, int]) -> None:
    """Raise `InvalidArgument` unless every size is an int from 1 to 2**31 - 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise InvalidArgument(f"{name} is {value!r}: give an integer from 1 to 2**31 - 1")


def check_options(sm_scale: float, window_left: int, logits_soft_cap: float) -> None:
    """Raise unless run() can be given these."""
    if not -1 <= window_left <= 2**31 - 1:
        raise InvalidArgument(f"window_left is {window_left}: use -1 for no window, else 0 or more keys")
    if not logits_soft_cap >= 0.0:
        raise InvalidArgument(f"logits_soft_cap is {logits_soft_cap}: use 0 for none, else a positive cap")
    if not math.isfinite(sm_scale):
        raise InvalidArgument(f"sm_scale is {sm_scale}: use a finite factor, or None for head_dim**-0.5")


def check_table(table: PageTable, num_pages: int, page_size: int) -> RowPlaces:
    """Raise unless the table describes a step over a pool of these pages; else where its rows stand.

    Beyond ranges and lengths: each row's slot must be the slot of its position in its request's pages. That ties the
    slots to pages and kv_last_page_len, so a surplus page or a length that is off by one cannot pass.
    """
    for name, array in zip(PageTable._fields, table, strict=True):
        check_int32(name, array)
    qo_indptr, kv_indptr, kv_indices, last, slots = table
    batch = len(last)
    _check_entries("qo_indptr", qo_indptr, batch + 1)
    _check_entries("kv_indptr", kv_indptr, batch + 1)
    _check_entries("kv_indices", kv_indices, max(0, int(kv_indptr[-1])))
    _check_indptr("qo_indptr", qo_indptr)
    _check_indptr("kv_indptr", kv_indptr)
    rows, pages = np.diff(qo_indptr), np.diff(kv_indptr)
    length = (pages.astype(np.int64) - 1) * page_size + last
    _check_requests(rows, pages, last, length, page_size)
    _check_range("kv_indices", kv_indices, num_pages)
    _check_range("slots", slots, num_pages * page_size)
    if len(slots) != qo_indptr[-1]:
        raise InvalidArgument(f"slots has {len(slots)} entries for {qo_indptr[-1]} rows: give one slot for each row")
    request = np.repeat(np.arange(batch, dtype=np.int32), rows)
    position = np.arange(len(slots)) + (length - qo_indptr[1:])[request]
    expected = kv_indices[kv_indptr[:-1][request] + position // page_size] * page_size + position % page_size
    wrong = np.flatnonzero(expected != slots)
    if len(wrong):
        r = int(wrong[0])
        raise InvalidArgument(
            f"slots[{r}] is {slots[r]}: request {request[r]} has {pages[request[r]]} pages and kv_last_page_len "
            f"{last[request[r]]}, so its row at position {position[r]} belongs into slot {expected[r]}: give "
            "ceil(length / page_size) pages and the length with the new rows"
        )
    return RowPlaces(request, position.astype(np.int32))


def _check_entries(name: str, array: npt.NDArray[np.int32], entries: int) -> None:
    if len(array) != entries:
        raise InvalidArgument(f"{name} has {len(array)} entries: it must have {entries}")


def _check_indptr(name: str, indptr: npt.NDArray[np.int32]) -> None:
    if indptr[0] != 0:
        raise InvalidArgument(f"{name}[0] is {indptr[0]}: it must be 0")
    falls = np.flatnonzero(indptr[1:] < indptr[:-1])
    if len(falls):
        i = int(falls[0])
        raise InvalidArgument(f"{name}[{i + 1}] is {indptr[i + 1]} after {indptr[i]}: it must not decrease")


def _check_requests(
    rows: npt.NDArray[np.int32],
    pages: npt.NDArray[np.int32],
    last: npt.NDArray[np.int32],
    length: npt.NDArray[np.int64],
    page_size: int,
) -> None:
    bad = np.flatnonzero((rows == 0) | (pages == 0) | (last < 1) | (last > page_size) | (length < rows))
    if len(bad) == 0:
        return
    b = int(bad[0])
    if rows[b] == 0:
        raise InvalidArgument(f"request {b} has no new row: leave it out of the step")
    if pages[b] == 0:
        raise InvalidArgument(f"request {b} has {rows[b]} rows and no page: give it ceil(length / page_size) pages")
    if not 1 <= last[b] <= page_size:
        raise InvalidArgument(f"request {b}: kv_last_page_len is {last[b]}: it must be 1 to page_size = {page_size}")
    raise InvalidArgument(
        f"request {b} has {rows[b]} new rows but a length of {length[b]}: its length includes the new rows"
    )


def _check_range(name: str, ids: npt.NDArray[np.int32], limit: int) -> None:
    outside = np.flatnonzero((ids < 0) | (ids >= limit))
    if len(outside):
        i = int(outside[0])
        raise InvalidArgument(f"{name}[{i}] is {ids[i]}: it must be 0 to {limit - 1}")
