"""PrefixCache: which prefixes are cached, in which pages, and who holds them. No tensors, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from radixkv import _core
from radixkv._core import Lease, Pin
from radixkv.errors import InvalidArgument

__all__ = ["Lease", "Pin", "PrefixCache", "Stats"]


@dataclass(frozen=True)
class Stats:
    """Counts of a cache at one moment. ``free + private + protected + evictable == num_pages``, always."""

    num_pages: int
    page_size: int
    free: int  #: pages that hold nothing
    private: int  #: pages of one lease that are not published
    protected: int  #: published pages that a lease or a pin uses
    evictable: int  #: published pages that can be taken back
    num_nodes: int  #: runs of pages in the tree
    num_leases: int
    num_pins: int
    pinned: int  #: protected pages that a pin keeps (and perhaps leases as well)
    requests: int  #: acquired since the cache was made
    input_tokens: int  #: of these requests
    hit_tokens: int  #: of these, found in the cache
    evicted_pages: int
    committed_tokens: int

    @property
    def hit_rate(self) -> float:
        """Share of the input tokens that were found in the cache, 0.0 to 1.0."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0


class PrefixCache(_core.Cache):
    """A radix tree that maps token prefixes to refcounted pages and evicts them least recently used.

    It hands out page ids; the K and V that lie in the pages are the host's (or `Engine`'s) business.

    Calls may come from several threads. Nothing here reads a clock, draws a random number or depends on hash order:
    the same calls give the same state, page for page. A call that raises has changed nothing.

    Args:
        num_pages: pages of the pool, at least 1.
        page_size: tokens a page holds, at least 1; ``num_pages * page_size < 2**31``.

    Raises:
        InvalidArgument: a size is out of range.

    Memory: 4 bytes a token for the tokens themselves and about 1 byte more for everything else at page size 16,
    taken from the operating system as pages are first used.
    """

    def __init__(self, num_pages: int, page_size: int = 16) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidArgument(f"{name} must be an int of at least 1; got {value!r}")
        if num_pages * page_size >= 2**31:
            raise InvalidArgument(
                f"num_pages * page_size must be below 2**31; got {num_pages} * {page_size}: use several caches"
            )
        super().__init__(num_pages, page_size)

    def evict(self, num_pages: int) -> int:
        """Take back up to `num_pages` evictable pages now, coldest first; returns how many. O(1) a page."""
        if num_pages < 0:
            raise InvalidArgument(f"num_pages must be at least 0; got {num_pages}")
        return self._evict(num_pages)

    def clear(self, namespace: str | None = None) -> int:
        """Forget all prefixes, or those of one namespace; returns the number of pages freed at once.

        For weights that change under a running cache: nothing cached so far is found again. Leases and pins stay
        valid and keep their pages until they let go; what such a lease writes later is not published.
        """
        return self._clear_all() if namespace is None else self._clear(namespace)

    def stats(self) -> Stats:
        """Pages by state, and counts since the cache was made. O(live leases)."""
        return Stats(**self._stats())

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        s = self.stats()
        return (
            f"PrefixCache({s.num_pages} pages of {s.page_size}: {s.free} free, {s.private} private, "
            f"{s.protected} protected, {s.evictable} evictable)"
        )
