"""The clairvoyant bound: no cache of whole pages, whatever its policy, hits more than one that knows the future.

Belady's rule over pages: when the cache is full, give up the page whose next use is farthest away, the deepest of a
path first (which keeps the cache prefix-closed). As in replay, the whole path of a request stays resident while it is
served. Unlike in replay a page that is computed again needs no second page meanwhile, so the figure is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from sortedcontainers import SortedList

from radixkv.errors import InvalidArgument
from radixkv.traces.curve.pages import PageTree, page_keys
from radixkv.traces.replay import Progress
from radixkv.traces.request import TraceRequest

__all__ = ["clairvoyant_hit_rates"]


def clairvoyant_hit_rates(
    requests: Iterable[TraceRequest], page_size: int, capacities: Sequence[int], progress: Progress | None = None
) -> list[float]:
    """The highest possible hit rate (0 to 1) at each capacity in pages. Reads the trace once.

    Hits are counted as in page-aligned replay. ``progress`` is called with the number of requests done, which are those
    of the trace once more than there are capacities. Raises TraceError from the trace and InvalidArgument for a page
    size below 1.
    """
    if page_size < 1:
        raise InvalidArgument(f"page_size must be at least 1, not {page_size}")
    future = _Future(requests, page_size, progress)
    return [future.hit_pages(pages) * page_size / max(1, future.input_tokens) for pages in capacities]


Use: TypeAlias = tuple[int, int, int]
"""A run of pages of one path that the same request uses next: (that request, depth of the first page, pages)."""


class _Future:
    """When each page of each request is used next: runs of pages of one path with the same next request."""

    def __init__(self, requests: Iterable[TraceRequest], page_size: int, progress: Progress | None) -> None:
        self._progress, self._done = progress, 0
        self.input_tokens = 0
        self._lengths: list[tuple[int, int]] = []  # per request: its pages, and how many of them can be hits
        self._next_uses: list[list[Use]] = []  # per request: its pages that are used again
        trees: dict[str, PageTree] = {}
        for number, request in enumerate(requests):
            self.input_tokens += request.num_in
            keys, width = page_keys(request, page_size)
            self._lengths.append((len(keys) // width, (request.num_in - 1) // page_size))
            self._next_uses.append([])
            tree = trees.setdefault(request.namespace, PageTree())
            depth = 0
            for owner, count in tree.touch(keys, width, number) if len(keys) else ():
                self._next_uses[owner].append((number, depth, count))
                depth += count
            self._tell()

    def hit_pages(self, capacity: int) -> int:
        """The pages hit by a clairvoyant cache of ``capacity`` pages. O(runs * log(runs))."""
        resident: SortedList[Use] = SortedList()  # soonest next use first
        used = hits = 0
        for number, (num_pages, hit_limit) in enumerate(self._lengths):
            while resident and resident[0][0] == number:
                _, depth, count = resident.pop(0)
                hits += max(0, min(count, hit_limit - depth))
                used -= count
            used -= _trim(resident, used - max(0, capacity - num_pages))
            for use in self._next_uses[number]:
                resident.add(use)
                used += use[2]
            used -= _trim(resident, used - capacity)
            self._tell()
        return hits

    def _tell(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done)


def _trim(resident: SortedList[Use], excess: int) -> int:
    """Give up ``excess`` pages, if above 0, farthest next use and deepest first; returns how many were given up."""
    left = max(0, excess)
    while left:
        user, depth, count = resident.pop()
        if count > left:
            resident.add((user, depth, count - left))
        left -= min(left, count)
    return max(0, excess)
