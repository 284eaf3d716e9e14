"""CapacityCurve: hits by capacity, and the ways to look at them (points, CSV)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from radixkv.errors import InvalidArgument

__all__ = ["CapacityCurve"]


@dataclass(frozen=True, slots=True, eq=False)
class CapacityCurve:
    """The exact hit rate of an LRU prefix cache at every capacity, in pages of ``page_size`` tokens.

    ``hits_by_rank`` [n + 1] int64: the page hits that need a capacity of exactly 0..n pages. A capacity above n pages
    gives nothing more.
    """

    page_size: int
    requests: int
    input_tokens: int
    distinct_pages: int
    hits_by_rank: npt.NDArray[np.int64]
    _hits: npt.NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hits", np.cumsum(self.hits_by_rank))

    @property
    def max_pages(self) -> int:
        """The smallest capacity, in pages, with the hit rate of an unbounded cache."""
        return len(self._hits) - 1

    def hit_tokens(self, capacity_pages: int) -> int:
        """The input tokens that hit in a cache of ``capacity_pages`` pages. O(1)."""
        if capacity_pages < 0:
            raise InvalidArgument(f"a capacity is not negative: {capacity_pages} pages")
        return int(self._hits[min(capacity_pages, self.max_pages)]) * self.page_size

    def hit_rate(self, capacity_pages: int) -> float:
        """Hit input tokens as a share of all input tokens, 0 to 1. O(1)."""
        return self.hit_tokens(capacity_pages) / self.input_tokens if self.input_tokens else 0.0

    def points(self, max_points: int | None = None) -> list[tuple[int, float]]:
        """(capacity in pages, hit rate) wherever the rate changes, ascending; the first is capacity 0.

        With ``max_points`` (at least 2) at most so many of them, evenly spread over the logarithm of the capacity; the
        first and the last are kept.
        """
        changes = np.concatenate([[0], np.flatnonzero(self.hits_by_rank)])
        if max_points is not None and max_points < 2:
            raise InvalidArgument(f"a curve has at least 2 points, not {max_points}")
        if max_points is not None and len(changes) > max_points:
            wanted = np.geomspace(1, self.max_pages, max_points)[1:-1]
            at = np.searchsorted(changes, wanted, side="right") - 1
            changes = changes[np.unique(np.concatenate([[0], at, [len(changes) - 1]]))]
        return [(int(pages), self.hit_rate(int(pages))) for pages in changes]

    def to_dict(self, max_points: int = 200) -> dict[str, Any]:
        """The curve as a JSON object; ``points`` are [capacity in pages, hit rate] pairs."""
        return {
            "requests": self.requests,
            "input_tokens": self.input_tokens,
            "page_size": self.page_size,
            "distinct_pages": self.distinct_pages,
            "max_pages": self.max_pages,
            "max_hit_rate": self.hit_rate(self.max_pages),
            "points": [list(point) for point in self.points(max_points)],
        }

    def to_csv(self, stream: TextIO, max_points: int | None = None) -> None:
        """Write a header and a line for each of ``points(max_points)``; between two lines the rate is the former's."""
        stream.write("capacity_pages,capacity_tokens,hit_tokens,hit_rate\n")
        for pages, rate in self.points(max_points):
            stream.write(f"{pages},{pages * self.page_size},{self.hit_tokens(pages)},{rate:.6f}\n")
