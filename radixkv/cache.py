"""PrefixCache: which prefixes are cached, in which pages, and who holds them. No tensors, no torch."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from radixkv import _core
from radixkv._core import Lease, Pin
from radixkv.errors import InvalidArgument
from radixkv.journal import Journal

if TYPE_CHECKING:
    from radixkv._core import Tokens
    from radixkv.journal_log import LogWriter
    from radixkv.journal_story import Explanation

__all__ = ["BestMatch", "Fit", "Lease", "NamespaceUse", "Pin", "PrefixCache", "Stats", "WhatIf", "best_match"]


_MOST_DRAWN = 200  # nodes, in a notebook


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
    forks: int  #: leases that `Lease.fork` made
    input_tokens: int  #: of these requests
    hit_tokens: int  #: of these, found in the cache
    evicted_pages: int
    committed_tokens: int

    @property
    def hit_rate(self) -> float:
        """Share of the input tokens that were found in the cache, 0.0 to 1.0."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0


@dataclass(frozen=True)
class NamespaceUse:
    """What a namespace of a cache did and has. Of pages and quota, see `PrefixCache.set_quota`."""

    requests: int  #: acquired since it is known
    input_tokens: int  #: of these requests
    hit_tokens: int  #: of these, found in the cache
    pages: int  #: that it has published, or that its leases have taken; not those of namespaces below it
    leases: int
    floor: int  #: pages that no other namespace's request evicts; 0: none
    ceiling: int | None  #: pages that it may have; None: no limit

    @property
    def hit_rate(self) -> float:
        """Share of the input tokens that were found in the cache, 0.0 to 1.0."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0


@dataclass(frozen=True)
class Fit:
    """What a prompt would take of a cache at one moment. True where it fits."""

    needed: int  #: pages that `acquire` would take, besides those of the prompt that are cached
    free: int  #: pages that hold nothing
    evictable: int  #: pages that could be taken back for it: not those that it would use itself
    cached: int  #: tokens of the prompt that are cached; one is always left to compute

    def __bool__(self) -> bool:
        return self.needed <= self.free + self.evictable


@dataclass(frozen=True)
class WhatIf:
    """What larger pools would have hit of the requests since the first `PrefixCache.curve`."""

    num_pages: int
    input_tokens: int
    hit_tokens: int
    larger: dict[float, int]
    """Pages as a multiple of num_pages -> tokens that so large a pool would have hit."""

    @property
    def hit_rates(self) -> dict[float, float]:
        """Multiple of num_pages, 1.0 first -> hit rate, 0.0 to 1.0."""
        counts = {1.0: self.hit_tokens, **self.larger}
        return {factor: hits / self.input_tokens if self.input_tokens else 0.0 for factor, hits in counts.items()}

    def __sub__(self, earlier: WhatIf) -> WhatIf:
        """What came after an earlier answer of the same cache: of the last hour, say."""
        larger = {factor: hits - earlier.larger[factor] for factor, hits in self.larger.items()}
        inputs, hits = self.input_tokens - earlier.input_tokens, self.hit_tokens - earlier.hit_tokens
        return WhatIf(self.num_pages, inputs, hits, larger)

    def __str__(self) -> str:
        rates = self.hit_rates
        better = ", ".join(f"{100 * rates[factor]:.1f} with {factor:g} times the pages" for factor in self.larger)
        return f"hit rate {100 * rates[1.0]:.1f} %; {better}"


class PrefixCache(_core.Cache):
    """A radix tree that maps token prefixes to refcounted pages and evicts them least recently used.

    It hands out page ids; the K and V that lie in the pages are the host's (or `Engine`'s) business.

    Calls may come from several threads. Nothing here reads a clock, draws a random number or depends on hash order:
    the same calls give the same state, page for page. A call that raises has changed nothing.

    Args:
        num_pages: pages of the pool, at least 1.
        page_size: tokens a page holds, 1 to 2**26, 16 by default; ``num_pages * page_size < 2**31``.
        policy: what is evicted first: "lru", the least recently used; or "hazard", what is the least likely to be used
            soon, by how pages like it were used before. `radixkv policies` says what it would gain on a trace.
        hierarchical: "a/b" finds what "a" published as well, and "a/b/c" what both did; never the other way round, nor
            "a/c" what "a/b" did. What a request publishes is its own namespace's. Off: such names are names as any.

    Raises:
        InvalidArgument: a size is out of range, or there is no such policy.

    Memory: 4 bytes a token for the tokens themselves and about 1 byte more for everything else at page size 16,
    taken from the operating system as pages are first used. The policy "hazard" takes about 360 bytes a page more: it
    remembers the last 8 * num_pages pages that it evicted.
    """

    __slots__ = ("__weakref__",)

    def stats(self) -> Stats:
        """Pages by state, and counts since the cache was made. O(live leases)."""
        return Stats(**self._stats())

    def namespaces(self) -> dict[str | None, NamespaceUse]:
        """What each namespace did and has, in alphabetical order. O(namespaces).

        Known are those that have a page, a lease or a quota, or one below them, and the last 1,024 others that were
        used; None has the counts of all that are forgotten, so that the sums are those of `stats()`.
        """
        return {entry[0]: NamespaceUse(*entry[1:]) for entry in self._namespaces()}

    def would_fit(self, tokens: Tokens, namespace: str = "") -> Fit:
        """Whether `acquire` would find the pages for this prompt, and what it would find cached. Changes nothing.

        Raises:
            InvalidTokens, InvalidArgument: as `acquire`. LeaseError: the cache is closed.
        """
        return Fit(*self._would_fit(tokens, namespace))

    def journal(self) -> Journal:
        """What enters and leaves the tree and which requests end, from now on: see `radixkv.journal`.

        Raises:
            LeaseError: the cache is closed.
        """
        return Journal(self)

    def record(self, path: str) -> LogWriter:
        """Write what happens to the tree, and which requests end, to an operation log from now on: `radixkv log FILE`.

        Raises:
            TraceError: the file cannot be made. LeaseError: the cache is closed.
        """
        from radixkv.journal_log import LogWriter

        return LogWriter(self, path)

    def curve(self) -> WhatIf:
        """What larger pools would have hit; counted from the first call on.

        For LRU it is what those pools would have done with the same requests, as far as leases and pins do not overlap:
        no page is tried out, its place among the evicted ones says it. With policy "hazard" and with hints it is an
        estimate. Of eight pools with more than 2**10 pages a sample is followed, which tests hold to two points of hit
        rate. For prompts in pieces it is near: what the first pieces evict has left before the next one is seen.
        Costs two hashes of each page that is computed, and 8 bytes a page of the pool; nothing for a hit.
        """
        factors, (inputs, hits, *larger) = self._what_if()
        return WhatIf(self.num_pages, inputs, hits, dict(zip(factors, larger, strict=True)))

    def explain(self, tokens: Tokens, namespace: str = "") -> Explanation:
        """Why these tokens are cached as far as they are, by what the journal still tells; ``str()`` says it in words.

        The journal tells what came since the first `journal()`, `record()` or `explain()`, and of that the last
        4 * num_pages changes. For times, and for how large a pool would have kept the tokens, ask a log (`record`).
        Reads the whole journal: a tool for people, not for every request.
        """
        from radixkv.journal_story import story_of

        self.match(tokens, namespace)  # refuses what are no tokens
        return story_of(self).explain(tokens, namespace, sizes=False)

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a PrefixCache cannot be pickled or copied: it counts the pages of one pool. Make a new one; snapshot() is "
            "a copy of its tree, and radixkv.traces records its traffic"
        )

    def __repr__(self) -> str:
        s = self.stats()
        return (
            f"PrefixCache({s.num_pages} pages of {s.page_size}: {s.free} free, {s.private} private, "
            f"{s.protected} protected, {s.evictable} evictable)"
        )

    def to_html(self, decode: Callable[[list[int]], str] | None = None) -> str:
        """The tree as one HTML page that needs nothing else; `decode`, as a tokenizer's, makes text of its tokens.

        Raises InvalidArgument for a tree of more tokens than a page shows, `radixkv.observe.tree_html.MAX_TOKENS`.
        """
        from radixkv.observe.tree_html import tree_html

        return tree_html(self.snapshot(), decode)

    def _repr_svg_(self) -> str | None:
        """The tree as a picture, in a notebook; none where it is too large to look at."""
        from radixkv.observe.tree_svg import tree_svg

        return tree_svg(self.snapshot()) if self.stats().num_nodes <= _MOST_DRAWN else None

    def _repr_html_(self) -> str:
        """What `repr` says and the picture, in a notebook."""
        picture = self._repr_svg_() or f"The tree has {self.stats().num_nodes} nodes: see to_html()."
        return f"<div><code>{html.escape(repr(self))}</code><br>{picture}</div>"


@dataclass(frozen=True)
class BestMatch:
    """The cache to send a prompt to."""

    index: int  #: among the caches that were asked
    cached: int  #: tokens of the prompt that it has


def best_match(caches: Sequence[PrefixCache], tokens: Tokens, namespace: str = "") -> BestMatch:
    """For a router: which of these caches has the longest prefix of a prompt. Changes nothing in any of them.

    Of equal ones the one with the most pages free or evictable, then the first. How busy each is, the router knows.

    Raises:
        InvalidArgument: no caches. InvalidTokens: as `PrefixCache.match`. LeaseError: one is closed.
    """
    if not caches:
        raise InvalidArgument("best_match of no caches: give at least one PrefixCache")
    ranked = []
    for index, cache in enumerate(caches):
        stats = cache.stats()
        ranked.append((-cache.match(tokens, namespace), -(stats.free + stats.evictable), index))
    cached, _, index = min(ranked)
    return BestMatch(index, -cached)
