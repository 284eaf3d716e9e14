"""Cascade: the K and V that several requests of one step share are read once for all of them.

From a step's page table the native core derives the shared segments: runs of pages that two or more requests begin
with, by identity of the pages, at any depth and in any number of families. A cost model decides which of them pay. The
native backend runs the plan with a bit-identical result; for FlashInfer `CascadePlan.levels` gives its CSR arrays.

    plan = CascadePlan.derive(table, page_size=16, costs=FLASHINFER)
    q = q[plan.rows]                      # users of a segment become neighbours
    for level in plan.levels():           # the last is each request's own rest, causal
        ...                               # attend with these arrays, merge the states

A segment is of whole pages. Where a shared prefix ends inside a page, its full pages are shared, and what is left of it
stands in a page of each user's own: the cache copies such a page for every lease that goes on from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from radixkv import _core
from radixkv.attention import PageTable
from radixkv.attention.checks import core_table
from radixkv.memory import format_bytes

__all__ = ["FLASHINFER", "NATIVE", "OFF", "CascadeCosts", "CascadePlan", "Level", "Segment", "core_costs"]

_ANY_POOL = 2**31 - 1  # pages: a table that is not for a pool of a known size
_VERDICTS = ("used", "too few users", "too short", "does not pay", "too many levels")


@dataclass(frozen=True)
class CascadeCosts:
    """When a shared segment pays. The unit is the time that reading one token's K and V takes.

    A segment of n tokens with u users, who have r new rows together, saves (u - 1) * n and costs launch_tokens +
    merge_tokens * r. The defaults are the native backend's.
    """

    min_users: int = 2
    """Segments of fewer users are not used."""
    min_tokens: int = 64
    """Nor are segments that are shorter than this."""
    launch_tokens: float = 64.0
    """What one more unit of work costs: a barrier and a work item here, a kernel launch on a GPU."""
    merge_tokens: float = 160.0
    """What carrying the state of one row from segment to segment costs. The native default is where decoding began to
    gain when measured: at 384 shared tokens for two requests, at 192 for eight."""
    max_levels: int = 0
    """Used segments on one request's path, counted from the root; 0: any number."""
    max_rows: int = 16
    """Requests with more new rows share nothing, because they are bound by arithmetic; 0: no limit."""
    granularity: int = 64
    """Tokens a backend handles at once: it serves a segment's tokens rounded down to a multiple."""


NATIVE = CascadeCosts()
"""Costs of the CPU backend: 64 tokens are a tile, which is the finest cut that keeps the bits."""

FLASHINFER = CascadeCosts(
    min_users=4, min_tokens=512, launch_tokens=4096.0, merge_tokens=4.0, max_levels=2, max_rows=0, granularity=1
)
"""A start for GPUs: a launch of some microseconds is worth thousands of tokens' reading. Tune it on the device."""


OFF = CascadeCosts(min_users=2**31 - 1)
"""No cascade: every request reads its own."""


def core_costs(costs: CascadeCosts) -> _core.CascadeCosts:
    """The same for the core."""
    return _core.CascadeCosts(*astuple(costs))


class Segment(NamedTuple):
    """A run of pages that all of its users, and no other request of the step, have after its parent's pages."""

    users: tuple[int, ...]
    """Requests, by their place in the table."""
    page_begin: int
    """Place of its first page in its users' lists of pages."""
    page_end: int
    first_page: int
    """Where a backend begins: before page_begin if the segments above are not used."""
    token_begin: int
    """What it serves, rounded down to the costs' granularity."""
    token_end: int
    parent: int | None
    """Index of the segment that it continues."""
    level: int
    """How many used segments lie above it."""
    used: bool
    reason: str
    """Why it is or is not used."""

    tokens_saved: int
    """Tokens whose K and V need not be read again, if it is used."""
    price: float
    """What that costs, in tokens' worth of reading."""


class Level(NamedTuple):
    """One level's arrays in FlashInfer's layout: a group of permuted rows for each stretch of pages."""

    qo_indptr: npt.NDArray[np.int32]
    kv_indptr: npt.NDArray[np.int32]
    kv_indices: npt.NDArray[np.int32]
    kv_last_page_len: npt.NDArray[np.int32]


@dataclass(frozen=True)
class CascadePlan:
    """The shared segments of one step and which of them are used. It does not change with later steps."""

    core: _core.Cascade
    """Its pages are copied when they are first asked for, which the step must be open for: see `keep`."""
    token_bytes: int = 0
    """Bytes of one token's K and V in one layer, for `explain`."""
    costs: CascadeCosts = field(default=NATIVE)
    remark: str = ""
    """What else the backend has to say: the last line of `explain`."""

    @classmethod
    def derive(
        cls,
        table: PageTable,
        page_size: int,
        costs: CascadeCosts = NATIVE,
        token_bytes: int = 0,
        remark: str = "",
    ) -> CascadePlan:
        """Raises `InvalidArgument` for a table that a backend would refuse."""
        finder = _core.CascadeFinder(core_costs(costs))
        return cls(finder.find(core_table(table, _ANY_POOL, page_size)), token_bytes, costs, remark)

    def keep(self) -> CascadePlan:
        """This plan, with its pages copied. Raises `LeaseError` if the step has ended."""
        _ = self._kv_indices
        return self

    @cached_property
    def order(self) -> npt.NDArray[np.int32]:
        """[B]: a permutation of the requests in which the users of every segment are neighbours."""
        return self.core.order

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """[rows]: the rows in that order; row i of the levels is row rows[i] of the table."""
        return runs(self._qo_indptr[:-1][self.order], self._row_counts[self.order])

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Every shared segment, used or not; parents come before their children."""
        found = []
        for (
            user_begin,
            user_end,
            begin,
            end,
            first,
            first_token,
            last_token,
            parent,
            level,
            verdict,
            *sums,
        ) in self.core.segments:
            users = tuple(self.order[user_begin:user_end].tolist())
            above = None if parent < 0 else parent
            reason = _VERDICTS[verdict]
            found.append(
                Segment(users, begin, end, first, first_token, last_token, above, level, verdict == 0, reason, *sums)
            )
        return tuple(found)

    @property
    def shared(self) -> bool:
        """Whether any segment is used."""
        return self.core.levels > 0

    @property
    def tokens_saved(self) -> int:
        """Tokens whose K and V are not read again, of all used segments."""
        return self.core.tokens_saved

    @property
    def tokens_read(self) -> int:
        """Tokens whose K and V a layer reads when every request reads its own."""
        return self.core.tokens_read

    def levels(self, window_left: int = -1) -> list[Level]:
        """One level for each depth of used segments, and a last one with what is left to every request.

        All levels have the same rows in the same order (`rows`). Those without a segment on a level are in a group of
        no page there, with kv_last_page_len 0; the last level's groups hold at least the new rows.

        window_left: how many keys before its own a query sees, -1 for all. FlashInfer knows a row's position on the
        last level only, so there a window applies as it is, and a shared level must do without. A segment that lies in
        the window of every row of its users is shared all the same; one that lies before all of these windows is left
        out; one that a window cuts, and what follows it, stays each user's own. No segment left: one level.
        """
        shared = self.core.shared_pages
        by_depth: dict[int, list[Segment]] = {}
        if window_left < 0:
            for s in self.segments:
                if s.used:
                    by_depth.setdefault(s.level, []).append(s)
        else:
            shared = np.zeros_like(shared)
            for s, inside in self._uncut(window_left):
                shared[list(s.users)] = s.page_end
                if inside:
                    by_depth.setdefault(s.level, []).append(s)
            if not by_depth:
                shared[:] = 0
        return [self._shared_level(by_depth[depth]) for depth in sorted(by_depth)] + [self._last_level(shared)]

    def _uncut(self, window_left: int) -> Iterator[tuple[Segment, bool]]:
        """The used segments that no row's window cuts, nor one above them; True: all in every window, False: in none.

        Parents come before their children.
        """
        uncut = set()
        for index, s in enumerate(self.segments):
            above = s.parent
            while above is not None and not self.segments[above].used:
                above = self.segments[above].parent
            if not s.used or not (above is None or above in uncut):
                continue
            users = list(s.users)
            oldest = int((self._lengths - self._row_counts)[users].min()) - window_left
            newest = int(self._lengths[users].max()) - 1 - window_left
            inside = newest <= s.first_page * self.core.page_size
            if inside or s.page_end * self.core.page_size <= oldest:
                uncut.add(index)
                yield s, inside

    def _shared_level(self, segments: list[Segment]) -> Level:
        place_of = np.argsort(self.order)
        groups: list[tuple[int, int, int]] = []  # place in the order where it ends, first of its kv_indices, pages
        done = 0
        for place, s in sorted((int(place_of[s.users[0]]), s) for s in segments):
            if place > done:
                groups.append((place, 0, 0))
            done = place + len(s.users)
            groups.append((done, int(self._kv_indptr[s.users[0]]) + s.first_page, s.page_end - s.first_page))
        if done < len(self.order):
            groups.append((len(self.order), 0, 0))
        ends, begins, counts = np.array(groups).T
        return Level(
            indptr(self._row_counts[self.order])[[0, *ends]],
            indptr(counts),
            self._kv_indices[runs(begins, counts)],
            np.where(counts > 0, self.core.page_size, 0).astype(np.int32),
        )

    def _last_level(self, shared: npt.NDArray[np.int32]) -> Level:
        begins = (self._kv_indptr[:-1] + shared)[self.order]
        counts = self._kv_indptr[1:][self.order] - begins
        pages = self._kv_indices[runs(begins, counts)]
        last = self.core.kv_last_page_len[self.order]
        return Level(indptr(self._row_counts[self.order]), indptr(counts), pages, last)

    @cached_property
    def _qo_indptr(self) -> npt.NDArray[np.int32]:
        return self.core.qo_indptr

    @cached_property
    def _kv_indptr(self) -> npt.NDArray[np.int32]:
        return self.core.kv_indptr

    @cached_property
    def _kv_indices(self) -> npt.NDArray[np.int32]:
        return self.core.kv_indices

    @cached_property
    def _row_counts(self) -> npt.NDArray[np.int32]:
        return np.diff(self._qo_indptr)

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int64]:
        pages = np.diff(self._kv_indptr).astype(np.int64)
        return (pages - 1) * self.core.page_size + self.core.kv_last_page_len

    def explain(self) -> str:
        """What the requests of the step share, what is made of it and why, in a few lines."""
        requests = len(self.order)
        if not self.segments:
            many = f" (those of more than {self.costs.max_rows} new rows aside)" if self.costs.max_rows else ""
            why = f"no two{many} share a full page before their new rows"
            return f"{requests} requests: {why}, each reads its own K and V" + self._remark
        read, saved = self.tokens_read, self.tokens_saved
        lines = [
            f"{requests} requests, {len(self.segments)} shared segments, {sum(s.used for s in self.segments)} used in "
            f"{self.core.levels} levels: a layer reads K and V of {read - saved} tokens instead of {read}"
            + (f", {format_bytes(saved * self.token_bytes)} less" if self.token_bytes else "")
        ]
        for index, s in enumerate(self.segments):
            after = "the root" if s.parent is None else f"segment {s.parent}"
            tokens = s.token_end - s.token_begin
            bytes_saved = f" ({format_bytes(s.tokens_saved * self.token_bytes)})" if self.token_bytes else ""
            lines.append(
                f"  segment {index} after {after}: {len(s.users)} users {_some(s.users)}, pages {s.page_begin} to "
                f"{s.page_end - 1}, serves {tokens} tokens: {self._why(s, bytes_saved)}"
            )
        return "\n".join(lines) + self._remark

    @property
    def _remark(self) -> str:
        return f"\n  {self.remark}" if self.remark else ""

    def _why(self, s: Segment, bytes_saved: str) -> str:
        costs, tokens = self.costs, s.token_end - s.token_begin
        if costs.min_users == OFF.min_users:
            return "not used, cascade is off"
        if s.used:
            saves = f"saves reading {s.tokens_saved} tokens{bytes_saved}"
            return f"used at level {s.level}, {saves} for the price of {s.price:g}"
        details = {
            _VERDICTS[1]: f"{len(s.users)}, at least {costs.min_users} wanted",
            _VERDICTS[2]: f"{tokens} tokens in units of {costs.granularity}, at least {costs.min_tokens} wanted",
            _VERDICTS[3]: f"would save {s.tokens_saved} tokens for the price of {s.price:g}",
            _VERDICTS[4]: f"at most {costs.max_levels}",
        }
        return f"not used, {s.reason}: {details[s.reason]}"


def indptr(counts: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def runs(begins: npt.NDArray[Any], counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """begins[0], begins[0] + 1, ... counts[0] of them, then those of begins[1] and so on."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.repeat(begins - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0)


def _some(users: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, users[:8]))
    return f"({shown}, ...)" if len(users) > 8 else f"({shown})"
