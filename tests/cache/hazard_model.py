"""The reference with the "hazard" policy: which page leaves, page by page, with no node, list of nodes or hash."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.cache.model import Misuse, Model, ModelLease, Name, Page

CLASSES, BINS, PERIOD, DECAY, PRIOR, GHOSTS = 48, 48, 256, 0.95, 100.0, 8
ENDED = -1


@dataclass
class Use:
    """What the policy knows of a page: when it was last let go, how often it was used, before its eviction as well."""

    touched: int
    uses: int = 0
    before: int = 0
    of: int = 0  # class
    list: int = 0  # the list it is on, or would be if nothing came after it: a class, or ENDED


@dataclass
class Estimate:
    """The counts and the index that they give: `csrc/cache/hazard.hpp` has the words for it."""

    num_pages: int
    taken: int = 0
    requests: int = 0
    uses: list[list[float]] = field(default_factory=lambda: [[0.0] * BINS for _ in range(CLASSES)])
    lost: list[list[float]] = field(default_factory=lambda: [[0.0] * BINS for _ in range(CLASSES)])
    waiting: list[list[float]] = field(default_factory=lambda: [[0.0] * BINS for _ in range(CLASSES)])
    index: list[list[float]] = field(default_factory=lambda: [[0.0] * BINS for _ in range(CLASSES)])

    def bin(self, touched: int) -> int:
        """The age of what was touched then, in 64ths of a turnover; from 4 of them on in quarters of an octave."""
        scaled = max(0, self.taken - touched) * 256 // self.num_pages
        if scaled < 4:
            return 0
        octave = scaled.bit_length() - 3
        return min(1 + 4 * octave + (scaled >> octave) % 4, BINS - 1)

    def estimate(self) -> None:
        widths = [1 / 64] + [2.0 ** ((b - 1) // 4) / 4 / 64 for b in range(1, BINS)]
        left = [self.at_risk(of) for of in range(CLASSES)]
        pooled = []
        for b in range(BINS):
            risk = sum(left[of][b] for of in range(CLASSES))
            pooled.append(sum(self.uses[of][b] for of in range(CLASSES)) / risk if risk else 0.0)
        for of in range(CLASSES):
            hazard = [(self.uses[of][b] + PRIOR * pooled[b]) / (left[of][b] + PRIOR) for b in range(BINS)]
            for begin in range(BINS):
                best, hits, time, alive = 0.0, 0.0, 0.0, 1.0
                for b in range(begin, BINS):
                    hits += alive * hazard[b]
                    time += alive * (1 - hazard[b] / 2) * widths[b]
                    alive *= 1 - hazard[b]
                    best = max(best, hits / time)
                self.index[of][begin] = best
            self.uses[of] = [DECAY * count for count in self.uses[of]]
            self.lost[of] = [DECAY * count for count in self.lost[of]]
            self.waiting[of] = [0.0] * BINS

    def at_risk(self, of: int) -> list[float]:
        """Of each age, how many of a class got at least so old."""
        left, found = 0.0, [0.0] * BINS
        for b in reversed(range(BINS)):
            left += self.uses[of][b] + self.lost[of][b] + self.waiting[of][b]
            found[b] = left
        return found


def class_of(uses: int, end: bool, cached: int, total: int, inner: bool) -> int:
    often = 3 if uses >= 5 else 2 if uses >= 3 else uses - 1
    known = 0 if 10 * cached < total else 1 if 10 * cached < 6 * total else 2
    return ((often * 2 + end) * 3 + known) * 2 + inner


class HazardModel(Model):
    """Leaves only are listed; a page becomes one when the last page after it is evicted."""

    def __init__(self, num_pages: int, page_size: int, hierarchical: bool = False) -> None:
        super().__init__(num_pages, page_size, hierarchical)
        self.estimate = Estimate(num_pages)
        self.of: dict[Page, Use] = {}
        self.started: dict[int, int] = {}  # id of a lease -> the clock when it began
        self.leaves: list[list[Page]] = [[] for _ in range(CLASSES)]  # coldest first
        self.ghosts: list[tuple[Name, Use] | None] = [None] * (GHOSTS * num_pages)
        self.next_ghost = 0

    # --- the lists ------------------------------------------------------------------------------------------------

    def unlist(self, page: Page) -> None:
        for order in (self.ended, *self.leaves):
            if page in order:
                order.remove(page)

    def is_leaf(self, page: Page) -> bool:
        return not page.locks and page in self.tree.values() and not self.below(page)

    def unlock(self, pages: list[Page]) -> None:
        for page in reversed(pages):
            page.locks -= 1
            if page.locks == 0 and page not in self.detached:
                use = self.of[page]
                use.touched, use.list = self.estimate.taken, use.of
                if self.is_leaf(page):
                    self.leaves[use.list].append(page)
            self.bury(page)

    def lock(self, pages: list[Page]) -> None:
        for page in pages:
            self.of.setdefault(page, Use(self.estimate.taken))
        super().lock(pages)

    def victim(self) -> Page | None:
        if self.ended:
            return self.ended[0]
        tell = self.estimate
        heads = [(of, self.of[leaves[0]].touched) for of, leaves in enumerate(self.leaves) if leaves]
        ranked = [(tell.index[of][tell.bin(touched)], touched, of) for of, touched in heads]
        return self.leaves[min(ranked)[2]][0] if ranked else None

    def evict(self, count: int, namespace: str | None = None, itself: bool = False) -> list[Page]:
        taken: list[Page] = []
        while len(taken) < count and (page := self.victim()) is not None:
            above = self.path_to(page)[:-1]
            if not page.holds:
                taken.append(page)
                if len(page.own) % self.page_size == 0:
                    self.remember(page)
            self.unpublish(page)
            if above and self.is_leaf(above[-1]):
                self.list_bared(above[-1])
        return taken

    def list_bared(self, page: Page) -> None:
        use = self.of[page]
        order = self.ended if use.list == ENDED else self.leaves[use.list]
        older = sum(1 for other in order if use.list != ENDED and self.of[other].touched < use.touched)
        order.insert(older, page)

    def set_quota(self, namespace: str, floor: int, ceiling: int) -> None:
        raise Misuse  # only least recently used pages have quotas

    def end_session(self, end: Page, namespace: str) -> None:
        kept = 0
        for page in reversed(self.path_to(end)):
            if page.locks or page.branched or len(self.below(page)) > kept:
                return
            self.of[page].list = ENDED
            if self.is_leaf(page):
                self.unlist(page)
                self.ended.append(page)
            kept = 1

    # --- what the estimate is told -----------------------------------------------------------------------------------

    def take(self, namespace: str, need: int) -> list[Page]:
        evicted = super().take(namespace, need)
        self.estimate.taken += need
        return evicted

    def acquire(self, namespace: str, tokens: list[int]) -> ModelLease:
        now = self.estimate.taken
        lease = super().acquire(namespace, tokens)
        self.started[id(lease)] = now
        return lease

    def fork(self, lease: ModelLease) -> ModelLease:
        now = self.estimate.taken
        child = super().fork(lease)
        self.started[id(child)] = now
        return child

    def publish(self, name: Name) -> Page:
        before, tell = 0, self.estimate
        if len(name[-1][1]) % self.page_size == 0:
            for place, ghost in enumerate(self.ghosts):
                if ghost is not None and ghost[0] == name:
                    before = ghost[1].uses
                    tell.uses[ghost[1].of][tell.bin(ghost[1].touched)] += 1
                    self.ghosts[place] = None
        page = super().publish(name)
        self.of[page] = Use(tell.taken, before=before)
        return page

    def remember(self, page: Page) -> None:
        use = self.of[page]
        self.ghosts = [None if g is not None and g[0] == page.name else g for g in self.ghosts]
        gone = self.ghosts[self.next_ghost]
        if gone is not None:
            self.estimate.lost[gone[1].of][self.estimate.bin(gone[1].touched)] += 1
        self.ghosts[self.next_ghost] = (page.name, Use(use.touched, max(1, use.uses), of=use.of))
        self.next_ghost = (self.next_ghost + 1) % len(self.ghosts)

    def ending(self, lease: ModelLease) -> None:
        path = [*lease.path, *([lease.tail] if lease.tail else [])]
        if lease.cleared or (path and path[-1] in self.detached):
            return
        tell, since = self.estimate, self.started[id(lease)]
        for page in reversed(path):
            use = self.of[page]
            if use.uses:
                tell.uses[use.of][tell.bin(use.touched + tell.taken - since)] += 1
            use.uses += 1 if use.uses else use.before + 1
            inner = page is not path[-1] or bool(self.below(page))
            use.of = class_of(use.uses, page is path[-1], lease.cached, len(lease.tokens), inner)
            use.touched = tell.taken
        tell.requests += 1
        if tell.requests % PERIOD == 0:
            self.take_census()

    def take_census(self) -> None:
        tell = self.estimate
        idle = [self.of[page] for page in (*self.tree.values(), *self.detached) if not page.locks]
        for use in idle + [ghost[1] for ghost in self.ghosts if ghost is not None]:
            tell.waiting[use.of][tell.bin(use.touched)] += 1
        tell.estimate()
