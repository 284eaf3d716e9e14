"""What a store of pages below the pool implements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from radixkv.tiers.record import Bytes, Record

__all__ = ["PageStore", "Store"]


class PageStore(Protocol):
    """The pool, as the tiers see it: pages of bytes."""

    @property
    def num_pages(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    def read_pages(self, pages: npt.NDArray[np.int32], out: Sequence[Bytes]) -> None:
        """Copy pages [n] to n rows of page_bytes. Others may write to the pages meanwhile."""

    def write_pages(self, pages: npt.NDArray[np.int32], data: Sequence[Bytes]) -> None:
        """Copy n rows of page_bytes to pages [n]; others get the memory of the rows afterwards."""


class Store(Protocol):
    """Records by key. Called from threads of the tiers only; whatever it raises is a miss and counted."""

    name: str
    read_only: bool

    def leading(self, keys: Sequence[bytes]) -> int:
        """How many of these pages, from the first on, it has."""

    def read(self, keys: Sequence[bytes], memory: Sequence[Bytes]) -> list[bool]:
        """Read records, which the tiers check."""

    def touch(self, keys: Sequence[bytes]) -> None:
        """These pages, a prefix from its first page on, were used."""

    def drop(self, keys: Sequence[bytes]) -> int:
        """Their records were found damaged; returns how many it still thought to have."""

    def __contains__(self, key: bytes) -> bool: ...
    def write(self, records: Sequence[Record]) -> list[bool]: ...
    def close(self) -> None: ...
