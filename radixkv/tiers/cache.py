"""A PrefixCache with tiers below it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from radixkv.cache import PrefixCache

if TYPE_CHECKING:
    from radixkv.tiers.tiers import Tiers

__all__ = ["TieredCache"]


class TieredCache(PrefixCache):
    """`clear` reaches the tiers below, and `close` stores what waits first. Without tiers it is a `PrefixCache`."""

    __slots__ = ("_below",)

    def __init__(self, num_pages: int, page_size: int = 16, policy: str = "lru", *, hierarchical: bool = False) -> None:
        super().__init__(num_pages, page_size, policy, hierarchical=hierarchical)
        self._below: weakref.ref[Tiers] | None = None

    def put_above(self, tiers: Tiers) -> None:
        self._below = weakref.ref(tiers)  # they hold the cache, and the core's objects are not collected in cycles

    @property
    def _tiers(self) -> Tiers | None:
        return None if self._below is None else self._below()

    def clear(self, namespace: str | None = None) -> int:
        tiers = self._tiers
        return super().clear(namespace) if tiers is None else tiers.clear(namespace)

    def close(self) -> None:
        if (tiers := self._tiers) is not None:
            tiers.close()
        super().close()
