"""What a journal tells, put together: the tree at any step, what changed between two, and why a prompt misses.

A `Story` is told batch by batch, by a log or by a live cache's journal. It names each prefix that ever was a page's
once, so a page that was evicted and computed again is the same prefix.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from radixkv.errors import InvalidArgument
from radixkv.journal import NAMESPACE, STORED, Batch, Release
from radixkv.namespaces import seen_by

if TYPE_CHECKING:
    import numpy.typing as npt

    from radixkv._core import Tokens
    from radixkv.cache import PrefixCache

__all__ = ["Explanation", "Life", "PageState", "Story", "layers_of", "story_of"]


class PageState(NamedTuple):
    """A full page of the tree, and what it holds."""

    page: int
    parent: int
    """The page before it; -1: it is the first of its namespace."""
    namespace: str
    tokens: tuple[int, ...]


class Change(NamedTuple):
    """A page that was stored or removed at a step."""

    step: int
    stored: bool
    page: int
    prefix: int
    request: int
    time: float


class Life(NamedTuple):
    """A page from when it was stored until it was removed: it is there at steps ``born`` to ``died`` - 1."""

    prefix: int
    born: int
    died: int | None
    """None: it is there at the end."""


@dataclass
class Prefix:
    """All tokens up to the end of what was once a page."""

    parent: int
    namespace: str
    tokens: tuple[int, ...]
    changes: list[Change] = field(default_factory=list)
    uses: list[tuple[int, float]] = field(default_factory=list)  # (step, time) of the releases that used it


@dataclass(frozen=True)
class Explanation:
    """Why a prompt is cached as far as it is. `str()` says it in words."""

    num_tokens: int
    num_cached: int
    wanted: int | None = None
    """The first token that is not cached."""
    instead: int | None = None
    """The token that the most similar cached prompt has there; None: nothing cached goes on from there."""
    removed_at: int | None = None
    """The step at which the page that held the next tokens left; None: it is not known to have been there."""
    removed_by: int = 0
    """The request for which; 0: a call of evict() or clear()."""
    idle_seconds: float | None = None
    """From its last use until then."""
    pool_factor: float | None = None
    """A pool that many times as large would have kept it; None: not known, or none that was tried."""

    def text(self, decode: Callable[[list[int]], str] | None = None) -> str:
        """In words, tokens as ids or as ``decode`` has them."""
        if self.wanted is None:
            return f"all {self.num_tokens:,} tokens are cached"
        shown = (lambda token: repr(decode([token]))) if decode else str
        parts = [f"{self.num_cached:,} of {self.num_tokens:,} tokens are cached"]
        if self.instead is not None:
            parts.append(f"diverged at token {self.num_cached:,} ({shown(self.wanted)} against {shown(self.instead)})")
        else:
            parts.append(f"nothing cached goes on at token {self.num_cached:,} ({shown(self.wanted)})")
        if self.removed_at is None:
            parts.append("no page that held the rest is known")
        else:
            whom = f"evicted at step {self.removed_at:,} by request {self.removed_by:,}"
            if self.removed_by == 0:
                whom = f"taken out at step {self.removed_at:,} by evict() or clear()"
            idle = "" if self.idle_seconds is None else f", {self.idle_seconds:,.3g} s after its last use"
            parts.append(f"the page that held the rest was {whom}{idle}")
        if self.pool_factor is not None:
            parts.append(f"a pool {self.pool_factor:.1f} times as large would have kept it")
        return "; ".join(parts)

    __str__ = text


class Story:
    """What happened to a cache's pages. Grows by `add` and `add_release`."""

    def __init__(self, num_pages: int, page_size: int, hierarchical: bool = False) -> None:
        if num_pages < 1 or page_size < 1:
            raise InvalidArgument(f"a cache has pages: not {num_pages} of {page_size} tokens")
        self.num_pages, self.page_size, self.hierarchical = num_pages, page_size, hierarchical
        self.changes: list[Change] = []
        self.releases: list[Release] = []
        self.release_times: list[float] = []
        self.prefixes: list[Prefix] = []
        self.lost_releases = 0
        """Requests that ended unseen."""
        self.gaps: list[tuple[int, int]] = []
        """Steps (from, to) that were lost."""
        self.begin = self.end = 0
        """The first step that is known, and the one after the last."""
        self._found: dict[tuple[int, str, bytes], int] = {}
        self._at: dict[int, int] = {}  # page -> prefix, of those that are there
        self._names: dict[int, str] = {}
        self._dumps: list[tuple[int, dict[int, int]]] = []  # (step, page -> prefix)

    def add(self, batch: Batch, when: float = 0.0) -> None:
        """The next records, or (``batch.lost``) the tree as it was at step ``batch.cursor``."""
        step = batch.cursor - (0 if batch.lost else len(batch.op))
        if batch.lost:
            if self._dumps:
                self.gaps.append((self.end, step))
            else:
                self.begin = step
            self._at.clear()
        for i in range(len(batch.op)):
            change = self._take(batch, i, step if batch.lost else step + i, when)
            if change is not None and not batch.lost:
                self.changes.append(change)
        if batch.lost:
            self._dumps.append((step, dict(self._at)))
        self.end = batch.cursor

    def _take(self, batch: Batch, i: int, step: int, when: float) -> Change | None:
        op, page, request = int(batch.op[i]), int(batch.page[i]), int(batch.request[i])
        if op == NAMESPACE:
            self._names[int(batch.root[i])] = batch.names[i]
            return None
        if op == STORED:
            parent, above = -1, int(batch.parent[i])
            if above >= 0:
                if above not in self._at:
                    return None  # it hangs below what a journal forgot
                parent = self._at[above]
            root = int(batch.root[i])
            namespace = self.prefixes[parent].namespace if root < 0 <= parent else self._names[root]
            prefix = self._at[page] = self._prefix(parent, namespace, batch.tokens[i])
        elif page in self._at:
            prefix = self._at.pop(page)
        else:
            return None
        change = Change(step, op == STORED, page, prefix, request, when)
        self.prefixes[prefix].changes.append(change)
        return change

    def _prefix(self, parent: int, namespace: str, tokens: npt.NDArray[np.int32]) -> int:
        key = parent, namespace, tokens.tobytes()
        known = self._found.get(key)
        if known is None:
            known = self._found[key] = len(self.prefixes)
            self.prefixes.append(Prefix(parent, namespace, tuple(tokens.tolist())))
        return known

    def add_release(self, release: Release, when: float = 0.0) -> None:
        """A request that ended: its path was used. It may come before the records up to its step, or after."""
        self.releases.append(release)
        self.release_times.append(when)
        for prefix in self.path(release.tokens, release.namespace):
            self.prefixes[prefix].uses.append((release.at, when))

    def path(self, tokens: npt.NDArray[np.int32], namespace: str) -> list[int]:
        """The prefixes of these tokens that ever were pages', shortest first; of several paths the longest."""
        layers, path = self.layers(tokens, namespace), list[int]()
        prefix = layers[-1][0] if layers else -1
        while prefix >= 0:
            path.append(prefix)
            prefix = self.prefixes[prefix].parent
        return path[::-1]

    def layers(
        self, tokens: npt.NDArray[np.int32], namespace: str, among: Container[int] | None = None
    ) -> list[list[int]]:
        """`layers_of` the prefixes that ever were pages', or of those `among` them."""
        return layers_of(self._found, tokens, self.page_size, seen_by(namespace, self.hierarchical), among)

    # --- the tree at a step ---------------------------------------------------------------------------------------

    def _there(self, step: int) -> dict[int, int]:
        """Page -> prefix, after all records with numbers below ``step``."""
        if not self.begin <= step <= self.end:
            raise InvalidArgument(f"step {step}: the log has {self.begin} to {self.end}")
        for begin, end in self.gaps:
            if begin < step < end:
                raise InvalidArgument(f"step {step}: steps {begin} to {end} were lost; ask for {begin} or {end}")
        since, at = max((d for d in self._dumps if d[0] <= step), key=lambda d: d[0], default=(0, {}))
        there = dict(at)
        for change in self.changes[bisect_right(self.changes, since - 1, key=lambda c: c.step) :]:
            if change.step >= step:
                break
            if change.stored:
                there[change.page] = change.prefix
            else:
                there.pop(change.page, None)
        return there

    def state(self, step: int) -> list[PageState]:
        """The full pages of the tree after ``step`` records, by page. O(step).

        Raises InvalidArgument for a step that the log does not have.
        """
        there = self._there(step)
        page_of = {prefix: page for page, prefix in there.items()}
        found = []
        for page in sorted(there):
            prefix = self.prefixes[there[page]]
            parent = page_of[prefix.parent] if prefix.parent >= 0 else -1
            found.append(PageState(page, parent, prefix.namespace, prefix.tokens))
        return found

    def diff(self, before: int, after: int) -> tuple[list[PageState], list[PageState]]:
        """The pages that came and those that went between two steps; a page that holds something else did both."""
        old, new = self.state(before), self.state(after)
        had, has = set(old), set(new)
        return [p for p in new if p not in had], [p for p in old if p not in has]

    def lives(self) -> list[Life]:
        """Every page that ever was there, in the order in which they came, parents before children."""
        dumps, found = list(self._dumps), list[Life]()
        open_: dict[int, int] = {}  # prefix -> its place in found

        def close(prefix: int, step: int) -> None:
            place = open_.pop(prefix, None)
            if place is not None:  # in a damaged log
                found[place] = found[place]._replace(died=step)

        def begin(prefix: int, step: int) -> None:
            open_[prefix] = len(found)
            found.append(Life(prefix, step, None))

        def take_dump() -> None:
            step, there = dumps.pop(0)
            for prefix in set(open_) - set(there.values()):
                close(prefix, step)
            for prefix in there.values():
                if prefix not in open_:
                    begin(prefix, step)

        for change in self.changes:
            while dumps and dumps[0][0] <= change.step:
                take_dump()
            (begin if change.stored else close)(change.prefix, change.step + 1)
        while dumps:
            take_dump()
        return found

    # --- why ------------------------------------------------------------------------------------------------------

    def explain(
        self, tokens: Tokens, namespace: str = "", sizes: bool = True, progress: Callable[[int], None] | None = None
    ) -> Explanation:
        """Why these tokens are cached as far as they are at the end of the story.

        ``sizes``: also how large a pool would have kept the rest, by serving all its requests again, one at a time;
        where none of them was lost. ``progress`` is called with the requests served for that.
        """
        wanted = np.asarray(cast("Any", tokens), dtype=np.int32)
        return self._explain(wanted, namespace, self.end, sizes, progress)

    def explain_request(self, number: int, progress: Callable[[int], None] | None = None) -> Explanation:
        """Why a request that ended was cached as far as it was when it came, by its own prompt.

        Raises InvalidArgument where the story has no such request. ``progress`` as in `explain`.
        """
        release = next((r for r in self.releases if r.request == number), None)
        if release is None:
            known = [r.request for r in self.releases] or [0]
            raise InvalidArgument(f"request {number}: the log has {len(self.releases)}, {min(known)} to {max(known)}")
        own = (change.step for change in self.changes if change.request == number)
        step = min([release.at, *own])
        return self._explain(release.tokens[: release.num_prompt], release.namespace, step, True, progress)

    def _explain(
        self,
        wanted: npt.NDArray[np.int32],
        namespace: str,
        step: int,
        sizes: bool,
        progress: Callable[[int], None] | None,
    ) -> Explanation:
        """As it was at a step."""
        there = self._there(step)
        present = set(there.values())
        path, there_now = self.layers(wanted, namespace), self.layers(wanted, namespace, present)
        cached = len(there_now)
        ends = there_now[-1] if there_now else [-1]
        shared, instead = self._nearest(wanted[cached * self.page_size :], namespace, ends, present)
        num_cached = cached * self.page_size + shared
        if num_cached == len(wanted):
            return Explanation(len(wanted), num_cached)
        facts: dict[str, Any] = {"wanted": int(wanted[num_cached]), "instead": instead}
        if cached < len(path):
            facts |= (removal := self._removal(path[cached], step))
            if sizes and removal and not self.lost_releases:
                ever = range(len(self.prefixes))
                stored = {p for p in ever if any(c.stored and c.step < step for c in self.prefixes[p].changes)}
                known = self.layers(wanted, namespace, stored)
                facts["pool_factor"] = self._factor(wanted[: len(known) * self.page_size], namespace, step, progress)
        return Explanation(len(wanted), num_cached, **facts)

    def _nearest(
        self, rest: npt.NDArray[np.int32], namespace: str, ends: list[int], present: set[int]
    ) -> tuple[int, int | None]:
        """How many more tokens the most similar page has that follows one of these, and its first other one."""
        best, other, seen = 0, None, seen_by(namespace, self.hierarchical)
        for prefix in sorted(present):
            page = self.prefixes[prefix]
            if page.parent not in ends or page.namespace not in seen:
                continue
            most = min(len(rest), self.page_size)
            differ = [i for i in range(most) if rest[i] != page.tokens[i]]
            shared = differ[0] if differ else most
            if other is None or shared > best:
                best, other = shared, page.tokens[shared] if shared < self.page_size else None
        return best, other

    def _removal(self, prefixes: list[int], before: int) -> dict[str, Any]:
        """Which of these pages, of one place in a prompt, was the last to leave."""
        changes = [change for prefix in prefixes for change in self.prefixes[prefix].changes]
        removed = [change for change in changes if not change.stored and change.step < before]
        if not removed:
            return {}
        last = max(removed, key=lambda change: change.step)
        used = [when for step, when in self.prefixes[last.prefix].uses if step <= last.step]
        idle = max(0.0, last.time - used[-1]) if used and last.time else None
        return {"removed_at": last.step, "removed_by": last.request, "idle_seconds": idle}

    def _factor(
        self, tokens: npt.NDArray[np.int32], namespace: str, step: int, progress: Callable[[int], None] | None
    ) -> float | None:
        """The smallest pool, in tenths of this one, that has these tokens at a step; None: none up to 32 times."""
        served = 0

        def keeps(tenths: int) -> bool:
            nonlocal served
            from radixkv.cache import PrefixCache

            num_pages = -(-self.num_pages * tenths // 10)
            with PrefixCache(num_pages, self.page_size, hierarchical=self.hierarchical) as cache:
                for release in requests:
                    if len(release.tokens) <= cache.num_pages * self.page_size:
                        with cache.acquire(release.tokens, release.namespace) as lease:
                            lease.advance()
                    served += 1
                    if progress is not None:
                        progress(served)
                return cache.match(tokens, namespace) == len(tokens)

        requests = sorted((r for r in self.releases if r.at <= step), key=lambda r: r.at)
        high = 20
        while not keeps(high):
            high *= 2
            if high > 320:
                return None
        low = 10 if high == 20 else high // 2  # which does not, or is this pool
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if keeps(middle) else (middle, high)
        return high / 10


def layers_of(
    found: Mapping[tuple[int, str, bytes], int],
    tokens: npt.NDArray[np.int32],
    page_size: int,
    seen: list[str],
    among: Container[int] | None = None,
) -> list[list[int]]:
    """The pages of these tokens by their place, the first ones first, those of the upper namespaces first.

    found: (page before, -1: none; namespace; tokens) -> page. seen: the namespaces that are looked into, from the top.
    """
    layers, above = [], [-1]
    for begin in range(0, len(tokens) - page_size + 1, page_size):
        text = tokens[begin : begin + page_size].tobytes()
        above = [found[key] for parent in above for name in seen if (key := (parent, name, text)) in found]
        if among is not None:
            above = [page for page in above if page in among]
        if not above:
            break
        layers.append(above)
    return layers


def story_of(cache: PrefixCache) -> Story:
    """What the journal of a live cache still tells: its last 4 * num_pages records and its last releases.

    What was there before them and is there still is known; of what left meanwhile only what came after them.
    """
    journal = cache.journal()
    now = journal.dump()
    last = journal.read(0, now.cursor)
    story = Story(cache.num_pages, cache.page_size, cache.hierarchical)
    if last.lost:
        again = set(last.page[last.op != NAMESPACE].tolist())
        kept = [i for i in range(len(now.op)) if now.op[i] == NAMESPACE or int(now.page[i]) not in again]
        names = {new: now.names[old] for new, old in enumerate(kept) if old in now.names}
        first = last.cursor - len(last.op)
        op, page, parent, root = (column[kept] for column in (now.op, now.page, now.parent, now.root))
        story.add(Batch(op, page, parent, root, now.request[kept], now.tokens[kept], names, first, True))
    story.add(last._replace(lost=False))
    for release in journal.releases(0, journal.releases_end)[0]:
        story.add_release(release)
    return story
