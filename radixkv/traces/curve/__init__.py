"""The capacity curve: the exact hit rate of an LRU prefix cache at every capacity, from one pass over a trace.

It equals ``replay(..., page_aligned=True)`` at any capacity, hit for hit. LRU over pages is a stack algorithm [Mattson
1970]: order all pages ever seen from the hottest to the coldest; the pages at ranks 1..C are what a cache of C pages
holds, so a page is a hit at every capacity from its rank on. Two facts about this cache shape the stack:

* A path is ranked as a block when its request ends, root hottest, so what a later request re-ranks is a prefix of it.
  The stack is a list of blocks, one a request, each holding the end of its request's path.
* Pages can be free. A hit page is locked in place and gives its rank up (a *hole*) before any page is evicted. A page
  that is computed again (at least the last token is, and outputs are) takes a new page first and frees the old one at
  the end. A free page at rank r is free at every capacity from r on, and a new page takes the topmost hole.

So for a request of M pages of which the first ``limit`` may be locked: (A) pages below ``limit`` leave the stack as
holes, (B) M pages are pushed on top, each filling the topmost hole if there is one, (C) old copies of the other pages
become holes. A request longer than C pages needs no care: its first C pages end up on top, which is what replay keeps.

Runs of pages (radix nodes, blocks) are moved, never single pages: O(runs * log(requests)) a request.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedList

from radixkv.errors import InvalidArgument
from radixkv.traces.curve.pages import PageTree, Run, page_keys
from radixkv.traces.curve.points import CapacityCurve
from radixkv.traces.replay import Progress
from radixkv.traces.request import TraceRequest

__all__ = ["CapacityCurve", "capacity_curve"]


def capacity_curve(requests: Iterable[TraceRequest], page_size: int, progress: Progress | None = None) -> CapacityCurve:
    """The hit rate at every capacity, for pages of ``page_size`` tokens. Reads the trace once.

    Memory: the distinct pages of the trace (4 bytes a token, or a page where the trace has block ids that fit), plus
    some hundred bytes a request. Raises TraceError from the trace and InvalidArgument for a page size below 1.
    """
    if page_size < 1:
        raise InvalidArgument(f"page_size must be at least 1, not {page_size}")
    trees: dict[str, PageTree] = {}
    stack = _Stack()
    num_requests = input_tokens = 0
    for num_requests, request in enumerate(requests, 1):
        num_in = request.num_in
        input_tokens += num_in
        keys, width = page_keys(request, page_size)
        if len(keys):
            tree = trees.setdefault(request.namespace, PageTree())
            runs = tree.touch(keys, width, owner=stack.num_blocks)
            hit_limit = (num_in - 1) // page_size
            acquired = min(num_in, len(keys) // width * page_size)
            stack.serve(runs, len(keys) // width, (acquired - 1) // page_size, hit_limit)
        if progress is not None:
            progress(num_requests)
    return CapacityCurve(
        page_size=page_size,
        requests=num_requests,
        input_tokens=input_tokens,
        distinct_pages=sum(tree.num_pages for tree in trees.values()),
        hits_by_rank=stack.hits_by_rank(),
    )


class _Stack:
    """All pages ever seen, hottest first, as blocks of (holes, then pages), the newest block on top."""

    def __init__(self) -> None:
        self._slots = _PrefixSums()  # ranks (holes and pages) of each block, oldest first
        self._holes: list[int] = []  # holes at the top of each block, above its pages
        self._with_holes = SortedList()  # blocks that have holes
        self._hit_ranks: list[tuple[int, int]] = []  # runs of ranks at which a page was hit

    @property
    def num_blocks(self) -> int:
        """The number of requests served; also the block of the next one."""
        return len(self._holes)

    def serve(self, runs: list[Run], num_pages: int, lock_limit: int, hit_limit: int) -> None:
        """Re-rank the path of one request.

        ``runs`` gives the block of each page of the path that was seen before, root first; only the first
        ``lock_limit`` pages of the path can be locked, and only its first ``hit_limit`` pages can be hits.
        """
        depth = 0
        recomputed: list[Run] = []
        for block, count in runs:
            # What has left the block is the part of its path above these pages, so they are the first it still holds.
            rank = self._slots.total - self._slots.up_to(block) + self._holes[block] + 1
            if depth < hit_limit:
                self._hit_ranks.append((rank, min(count, hit_limit - depth)))
            locked = max(0, min(count, lock_limit - depth))
            self._leave(block, locked)
            if locked < count:
                recomputed.append((block, count - locked))
            depth += count
        self._push(num_pages)
        for block, count in recomputed:
            self._leave(block, count)

    def hits_by_rank(self) -> npt.NDArray[np.int64]:
        """[n + 1] how many times a page at rank 0..n (0 is none) was hit."""
        if not self._hit_ranks:
            return np.zeros(1, dtype=np.int64)
        first, count = np.array(self._hit_ranks, dtype=np.int64).T
        steps = np.zeros(int((first + count).max()) + 1, dtype=np.int64)
        np.add.at(steps, first, 1)
        np.add.at(steps, first + count, -1)
        return np.cumsum(steps)[:-1]

    def _leave(self, block: int, count: int) -> None:
        """The first ``count`` pages of a block leave it; their ranks stay as holes."""
        if count == 0:
            return
        if self._holes[block] == 0:
            self._with_holes.add(block)
        self._holes[block] += count

    def _push(self, count: int) -> None:
        """A new block of ``count`` pages on top; each fills the topmost hole while there is one."""
        unfilled = count
        while unfilled and self._with_holes:
            block = self._with_holes[-1]
            filled = min(unfilled, self._holes[block])
            self._holes[block] -= filled
            self._slots.add(block, -filled)
            if self._holes[block] == 0:
                self._with_holes.pop()
            unfilled -= filled
        self._holes.append(0)
        self._slots.append(count)


class _PrefixSums:
    """A growing list of counts with their prefix sums: a Fenwick tree. append, add and up_to are O(log n)."""

    def __init__(self) -> None:
        self._tree = [0]
        self.total = 0

    def append(self, value: int) -> None:
        """Add an entry at the end."""
        index = len(self._tree)
        below = index - (index & -index)
        self._tree.append(value + self._sum(index - 1) - self._sum(below))
        self.total += value

    def add(self, index: int, value: int) -> None:
        """Change entry ``index`` (from 0) by ``value``."""
        self.total += value
        index += 1
        while index < len(self._tree):
            self._tree[index] += value
            index += index & -index

    def up_to(self, index: int) -> int:
        """The sum of entries 0..index."""
        return self._sum(index + 1)

    def _sum(self, index: int) -> int:
        result = 0
        while index:
            result += self._tree[index]
            index &= index - 1
        return result
