"""What each policy of eviction gives on a trace, beside what none can exceed.

Hit rates of page-aligned replay at a few shares of the trace's footprint: LRU; LRU told where sessions end (`hint`);
the "hazard" policy, without and with the hints (`both`); and the clairvoyant bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from radixkv.cache import PrefixCache
from radixkv.errors import InvalidArgument
from radixkv.traces.curve import capacity_curve
from radixkv.traces.curve.clairvoyant import clairvoyant_hit_rates
from radixkv.traces.replay import Progress, replay, session_ends
from radixkv.traces.request import TraceRequest

__all__ = ["LOSS", "POLICIES", "SHARES", "Cell", "Comparison", "compare_policies"]

SHARES = (1, 2, 5, 10, 20, 50)
"""Percent of the distinct pages of the trace."""

POLICIES = {"hint": ("lru", True), "hazard": ("hazard", False), "both": ("hazard", True)}
"""Besides LRU: the cache's policy, and whether it is told where sessions end."""

LOSS = 0.003
"""A hit rate that is lower than LRU's by more than this is a loss."""


@dataclass(frozen=True)
class Cell:
    """One capacity: hit rates, 0 to 1, by name of the policy ("lru" and those of POLICIES) and the bound."""

    percent_of_footprint: int
    capacity_pages: int
    rates: dict[str, float]
    clairvoyant: float

    @property
    def gap(self) -> float:
        """What is left to the bound above the best of the policies."""
        return self.clairvoyant - max(self.rates.values())


@dataclass(frozen=True)
class Comparison:
    """What `compare_policies` found."""

    requests: int
    page_size: int
    distinct_pages: int
    cells: list[Cell]
    no_hints: str
    """Why the trace gives no hints; empty where it does."""

    def worst(self, policy: str) -> tuple[float, Cell]:
        """What a policy gains over LRU (a loss is negative) where it does worst, and where that is."""
        return min(((c.rates[policy] - c.rates["lru"], c) for c in self.cells), key=lambda found: found[0])

    def losing(self) -> dict[str, tuple[float, Cell]]:
        """The policies that lose more than LOSS somewhere, as `worst` says."""
        worst = {policy: self.worst(policy) for policy in self.cells[0].rates}
        return {policy: found for policy, found in worst.items() if found[0] < -LOSS}

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        cells = [
            {
                "percent_of_footprint": c.percent_of_footprint,
                "capacity_pages": c.capacity_pages,
                **c.rates,
                "clairvoyant": c.clairvoyant,
                "gap": c.gap,
            }
            for c in self.cells
        ]
        losing = {p: {"gain": gain, "capacity_pages": c.capacity_pages} for p, (gain, c) in self.losing().items()}
        return {
            "requests": self.requests,
            "page_size": self.page_size,
            "distinct_pages": self.distinct_pages,
            "no_hints": self.no_hints,
            "losing": losing,
            "cells": cells,
        }


def compare_policies(
    requests: Sequence[TraceRequest],
    page_size: int,
    progress: Callable[[int, int], object] | None = None,
    shares: Sequence[int] = SHARES,
) -> Comparison:
    """Replay the trace with each policy at each share of its footprint.

    ``progress`` is called with the number of requests that were served, and that will be, in all passes together.
    Raises InvalidArgument for a page size below 1 and for a trace in which no request fills a page.
    """
    try:
        session_ends(requests)
        no_hints = ""
    except InvalidArgument as error:
        no_hints = str(error).split(":")[0]
    policies = {name: how for name, how in POLICIES.items() if not (how[1] and no_hints)}
    passes = _Passes(len(requests), 2 + len(shares) * (1 + len(policies)), progress)
    curve = capacity_curve(requests, page_size, passes.next())
    if curve.distinct_pages == 0:
        raise InvalidArgument(f"no request of the trace fills a page of {page_size} tokens: give smaller pages")
    capacities = [max(1, curve.distinct_pages * share // 100) for share in shares]
    bounds = clairvoyant_hit_rates(requests, page_size, capacities, passes.next(1 + len(shares)))
    cells = []
    for share, pages, bound in zip(shares, capacities, bounds, strict=True):
        rates = {"lru": curve.hit_rate(pages)}
        for name, (policy, hints) in policies.items():
            make = partial(PrefixCache, policy=policy)
            result = replay(requests, pages * page_size, page_size, True, passes.next(), make, hints)
            rates[name] = result.hit_rate
        cells.append(Cell(share, pages, rates, bound))
    return Comparison(len(requests), page_size, curve.distinct_pages, cells, no_hints)


class _Passes:
    """Puts the progress of one pass after the other together."""

    def __init__(self, length: int, count: int, progress: Callable[[int, int], object] | None) -> None:
        self._length, self._total, self._progress = length, length * count, progress
        self._begun = 0

    def next(self, passes: int = 1) -> Progress:
        """For the next pass, or the next ones that are counted as one."""
        before = self._begun
        self._begun += passes * self._length

        def tell(done: int) -> None:
            if self._progress is not None:
                self._progress(before + done, self._total)

        return tell
