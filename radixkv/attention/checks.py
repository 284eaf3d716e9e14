"""Checks of what callers hand to a backend. Every message gives the numbers and what would fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from radixkv import _core
from radixkv.attention import PageTable
from radixkv.errors import InvalidArgument

__all__ = ["check_int32", "check_options", "check_sizes", "core_table"]

_INT32 = np.dtype(np.int32)


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


def core_table(table: PageTable | _core.Table, num_pages: int, page_size: int) -> _core.Table:
    """The core's table: an engine's own, or these arrays, copied. Raises `InvalidArgument` unless it fits this pool.

    Beyond ranges and lengths: each row's slot must be the slot of its position in its request's pages. That ties the
    slots to pages and kv_last_page_len, so a surplus page or a length that is off by one cannot pass.
    """
    if isinstance(table, PageTable):
        for name, array in zip(PageTable._fields, table, strict=True):
            check_int32(name, array)
        return _core.ArrayTable(*table, num_pages, page_size)
    if (table.num_pages, table.page_size) != (num_pages, page_size):
        raise InvalidArgument(
            f"the page table is of {table.num_pages} pages of {table.page_size} tokens: this attention is for "
            f"{num_pages} of {page_size}"
        )
    return table
