"""The reference: what the engine means, in plain Python over single pages. Slow, literal, and knows no page ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

Name: TypeAlias = "tuple[tuple[str, tuple[int, ...]], ...]"
"""Of a page: the namespace and the tokens of each page from the start of the sequence to this one."""

NO_CEILING = 2**63 - 1


class Exhausted(Exception):
    pass


class Misuse(Exception):
    pass


@dataclass(eq=False)
class Page:
    name: Name
    locks: int = 0
    holds: int = 0
    pins: int = 0
    branched: bool = False  # two pages followed it, or one below it, at the same time, once

    @property
    def namespace(self) -> str:
        return self.name[-1][0]

    @property
    def own(self) -> tuple[int, ...]:
        return self.name[-1][1]


@dataclass(eq=False)
class ModelLease:
    namespace: str
    tokens: list[int]
    path: list[Page] = field(default_factory=list)  # its full published pages, root first
    tail: Page | None = None  # its open page, if a commit published it
    source: Page | None = None  # the page it has yet to copy from
    copied: int = 0  # where in its sequence that copy ends
    written: int = 0
    cached: int = 0
    cleared: bool = False
    pages: int = 0  # in all, dropped ones included
    dropped: int = 0  # of them, from the first on: no longer in its view

    @property
    def end(self) -> Name:
        return self.path[-1].name if self.path else ()

    @property
    def private(self) -> int:
        return self.pages - max(len(self.path), self.dropped) - (self.tail is not None)


class Model:
    def __init__(self, num_pages: int, page_size: int, hierarchical: bool = False) -> None:
        self.num_pages, self.page_size, self.hierarchical = num_pages, page_size, hierarchical
        self.free = num_pages
        self.tree: dict[Name, Page] = {}
        self.order: list[Page] = []  # unlocked published pages, coldest first
        self.ended: list[Page] = []  # those of ended sessions, which leave before them
        self.detached: list[Page] = []  # out of the tree, but held or locked
        self.leases: list[ModelLease] = []
        self.pins: list[list[Page]] = []
        self.quotas: dict[str, tuple[int, int]] = {}  # top namespace: floor, ceiling
        self.counts: dict[str, list[int]] = {}  # namespace: requests, input tokens, hit tokens

    # --- pages by state -------------------------------------------------------------------------------------------

    def states(self) -> dict[str, int]:
        kept = [*self.tree.values(), *self.detached]
        guarded = sum(1 for p in kept if p.locks or p.holds)
        return {
            "free": self.free,
            "private": sum(lease.private for lease in self.leases),
            "protected": guarded,
            "evictable": len(kept) - guarded,
            "pinned": sum(1 for p in kept if p.pins),
        }

    def count_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    # --- looking up -----------------------------------------------------------------------------------------------

    def chain(self, namespace: str) -> list[str]:
        """The namespaces that a request of this one sees, the top one first."""
        if not self.hierarchical:
            return [namespace]
        parts = namespace.split("/")
        return ["/".join(parts[: i + 1]) for i in range(len(parts))]

    def nearest(self, above: Name, namespace: str, rest: list[int]) -> tuple[Page | None, int]:
        """Of a namespace's pages that follow `above`, the one that shares the most leading tokens with `rest`.

        Ties go by the bits of `rest` (0 past its end) wherever the candidates differ: a rule without history.
        """
        pages = [p for name, p in self.tree.items() if name[:-1] == above and p.namespace == namespace]

        def bit(tokens: list[int] | tuple[int, ...], i: int) -> int:
            return tokens[i // 32] >> (31 - i % 32) & 1 if i // 32 < len(tokens) else 0

        i = 0
        while len(pages) > 1:
            if len({bit(p.own, i) for p in pages}) > 1:
                pages = [p for p in pages if bit(p.own, i) == bit(rest, i)]
            i += 1
        if not pages:
            return None, 0
        own = pages[0].own
        shared = 0
        while shared < min(len(own), len(rest)) and own[shared] == rest[shared]:
            shared += 1
        return pages[0], shared

    def nearest_seen(self, above: Name, namespace: str, rest: list[int]) -> tuple[Page | None, int]:
        """The same in all namespaces that this one sees; of equal ones that of the upper."""
        found = [self.nearest(above, one, rest) for one in self.chain(namespace)]
        return max(found, key=lambda f: f[1])

    def match(self, namespace: str, tokens: list[int]) -> tuple[list[Page], Page | None, int]:
        """(full pages, page that holds the next tokens, how many of them), of the longest path that it sees."""
        chain, size = self.chain(namespace), self.page_size

        def ends(above: Name, level: int) -> list[tuple[Name, Page | None, int]]:
            """Where its paths end that go on in chain[level] or below; those that stay longest above come first."""
            rest = tokens[len(above) * size :]
            name = (*above, (chain[level], tuple(rest[:size])))
            if len(rest) >= size and name in self.tree:
                found = ends(name, level)
            else:
                found = [(above, *self.nearest(above, chain[level], rest))]
            for lower in range(level + 1, len(chain)):
                found += ends(above, lower)
            return found

        above, source, shared = max(ends((), 0), key=lambda end: len(end[0]) * size + end[2])
        return [self.tree[above[: i + 1]] for i in range(len(above))], source if shared else None, shared

    # --- quotas: of top namespaces, with all below them ------------------------------------------------------------

    def top(self, namespace: str) -> str:
        return self.chain(namespace)[0]

    def pages_of(self, top: str) -> list[Page]:
        return [p for p in [*self.tree.values(), *self.detached] if self.top(p.namespace) == top]

    def used(self, top: str) -> int:
        return len(self.pages_of(top)) + sum(x.private for x in self.leases if self.top(x.namespace) == top)

    def evictable(self, top: str) -> int:
        return sum(1 for p in self.pages_of(top) if not p.locks and not p.holds)

    def set_quota(self, namespace: str, floor: int, ceiling: int) -> None:
        quotas = {**self.quotas, namespace: (floor, ceiling)}
        if self.top(namespace) != namespace or sum(q[0] for q in quotas.values()) > self.num_pages:
            raise Misuse
        self.quotas = quotas

    def room(self, namespace: str, lost: int = 0) -> int:
        """Pages that it can get, if `lost` of its evictable ones are about to be used."""
        own = self.top(namespace)
        room = self.free - lost
        for top in {self.top(p.namespace) for p in self.tree.values()} | {self.top(p.namespace) for p in self.detached}:
            floor = self.quotas.get(top, (0, 0))[0] if top != own else 0
            room += min(self.evictable(top), max(0, self.used(top) - floor))
        ceiling = self.quotas.get(own, (0, NO_CEILING))[1]
        return max(0, min(room, ceiling - self.used(own) + self.evictable(own) - lost))

    # --- locks, holds, eviction -----------------------------------------------------------------------------------

    def lock(self, pages: list[Page]) -> None:
        for page in pages:
            page.locks += 1
            self.unlist(page)

    def unlist(self, page: Page) -> None:
        for order in (self.order, self.ended):
            if page in order:
                order.remove(page)

    def unlock(self, pages: list[Page]) -> None:
        for page in reversed(pages):  # leaf first, root last
            page.locks -= 1
            if page.locks == 0 and page not in self.detached:
                self.order.append(page)
            self.bury(page)

    def bury(self, page: Page) -> None:
        if page in self.detached and not page.locks and not page.holds:
            self.detached.remove(page)
            self.free += 1

    def unpublish(self, page: Page) -> None:
        del self.tree[page.name]
        self.unlist(page)
        self.detached.append(page)
        self.bury(page)

    def evict(self, count: int, namespace: str | None = None, itself: bool = False) -> list[Page]:
        """For a namespace's request only what it may, or its own only; the host may take anything."""

        def allowed(page: Page) -> bool:
            top = self.top(page.namespace)
            if namespace is None or top == self.top(namespace):
                return True
            return not itself and self.used(top) > self.quotas.get(top, (0, 0))[0]

        taken: list[Page] = []
        while len(taken) < count:
            page = next((p for p in [*self.ended, *self.order] if allowed(p)), None)
            if page is None:
                break
            if not page.holds:
                taken.append(page)
            self.unpublish(page)
        return taken

    def take(self, namespace: str, need: int) -> list[Page]:
        if need > self.room(namespace):
            raise Exhausted
        own = self.top(namespace)
        surplus = self.used(own) + need - self.quotas.get(own, (0, NO_CEILING))[1]
        evicted = self.evict(surplus, namespace, itself=True)
        evicted += self.evict(need - self.free, namespace)
        self.free -= need
        return evicted

    # --- leases ---------------------------------------------------------------------------------------------------

    def acquire(self, namespace: str, tokens: list[int]) -> ModelLease:
        if self.count_for(len(tokens)) > self.num_pages:
            raise Exhausted
        path, source, partial = self.match(namespace, tokens[:-1])
        lost = sum(1 for p in path if not p.locks and not p.holds)
        need = self.count_for(len(tokens)) - len(path)
        if need > self.room(namespace, lost):
            raise Exhausted
        lease = ModelLease(namespace, list(tokens), path, pages=self.count_for(len(tokens)))
        self.lock(path)
        evicted = self.take(namespace, need)
        if source is not None and source not in evicted:
            lease.source = source
            source.holds += 1
        lease.written = lease.cached = lease.copied = len(path) * self.page_size + partial
        self.leases.append(lease)
        counts = self.counts.setdefault(namespace, [0, 0, 0])
        for i, more in enumerate((1, len(tokens), lease.cached)):
            counts[i] += more
        return lease

    def extend(self, lease: ModelLease, tokens: list[int], prompt: bool = False) -> None:
        if not tokens:
            return
        total = self.count_for(len(lease.tokens) + len(tokens))
        if total - max(0, lease.dropped - len(lease.path)) > self.num_pages:
            raise Exhausted
        tail, need = lease.tail, total - lease.pages
        no_page_for_a_copy = need == self.room(lease.namespace)
        if tail is not None and no_page_for_a_copy and tail.locks == 1 and not tail.pins and not tail.holds:
            lease.tail = None
            self.tree.pop(tail.name) if tail not in self.detached else self.detached.remove(tail)
        self.take(lease.namespace, need + (lease.tail is not None))
        lease.pages = total
        if lease.tail is not None:  # a published page never changes: go on in a copy
            lease.source = lease.tail
            lease.source.holds += 1
            lease.copied = len(lease.tokens)
            self.unlock([lease.tail])
            lease.tail = None
        lease.tokens += tokens
        self.counts[lease.namespace][1] += len(tokens) if prompt else 0

    def advance(self, lease: ModelLease, n: int) -> None:
        self.drop_source(lease)
        lease.written += n

    def drop_source(self, lease: ModelLease) -> None:
        if lease.source is not None:
            lease.source.holds -= 1
            self.bury(lease.source)
            lease.source = None

    def drop(self, lease: ModelLease, n: int) -> None:
        private = lease.private
        lease.dropped = max(lease.dropped, n // self.page_size)
        self.free += private - lease.private

    def truncate(self, lease: ModelLease, n: int) -> None:
        published = len(lease.tokens) if lease.tail is not None else len(lease.path) * self.page_size
        pending = lease.copied if lease.source is not None else 0
        if not max(1, lease.cached, published, pending, lease.dropped * self.page_size) <= n <= len(lease.tokens):
            raise Misuse
        private = lease.private
        lease.pages = self.count_for(n)
        self.free += private - lease.private
        lease.tokens, lease.written = lease.tokens[:n], min(lease.written, n)

    def commit(self, lease: ModelLease, closing: bool = False, namespace: str | None = None) -> Page | None:
        """Returns another request's page, if there is one, that has the tokens of the lease's open page.

        namespace: one above the lease's, whose these pages were; nothing is of it that comes after one of a lower.
        """
        if lease.cleared or lease.tail is not None or lease.source is not None or lease.dropped > len(lease.path):
            return None
        size = self.page_size
        while len(lease.path) < lease.written // size:
            tokens = lease.tokens[len(lease.path) * size : (len(lease.path) + 1) * size]
            above = lease.path[-1].namespace if lease.path else self.top(lease.namespace)
            own = max(above, namespace or lease.namespace, key=len)  # of two on one path the longer is the lower
            page, shared = self.nearest_seen(lease.end, own, tokens)
            if page is not None and shared == size:  # published by another request first: the duplicate is freed
                self.free += 1
                self.lock([page])
                lease.path.append(page)
            else:
                lease.path.append(self.publish((*lease.end, (own, tuple(tokens)))))
        if lease.written % size and (closing or lease.written == len(lease.tokens)):
            tokens = lease.tokens[len(lease.path) * size : lease.written]
            page, shared = self.nearest_seen(lease.end, lease.namespace, tokens)
            if shared < len(tokens):
                lease.tail = self.publish((*lease.end, (lease.namespace, tuple(tokens))))
            elif closing:
                assert page is not None
                self.lock([page])
                self.unlock([page])
                return page if len(page.own) == len(tokens) else None
        return None

    def publish(self, name: Name) -> Page:
        page = Page(name)
        for end in range(1, len(page.own)):  # an open page with fewer of the same tokens is replaced
            shorter = self.tree.get((*name[:-1], (page.namespace, page.own[:end])))
            if shorter is not None:
                for pinned in self.pins:
                    if pinned[-1] is shorter:  # the pin moves on
                        pinned[-1] = page
                        for change, p in ((1, page), (-1, shorter)):
                            p.locks += change
                            p.pins += change
                self.unpublish(shorter)
        self.tree[name] = page
        self.lock([page])
        above = self.path_to(page)[:-1]
        if above and len(self.below(above[-1])) > 1:
            for p in above:
                p.branched = True
        return page

    def path_to(self, page: Page) -> list[Page]:
        return [self.tree[page.name[: i + 1]] for i in range(len(page.name))]

    def below(self, page: Page) -> list[Page]:
        return [p for name, p in self.tree.items() if name[:-1] == page.name]

    def release(self, lease: ModelLease, commit: bool, cold: bool = False) -> None:
        found = self.commit(lease, closing=True) if commit else None
        self.drop_source(lease)
        self.free += lease.private
        path = [*lease.path, *([lease.tail] if lease.tail else [])]
        self.ending(lease)
        self.unlock(path)
        self.leases.remove(lease)
        end = found or (path[-1] if path else None)
        if cold and end is not None and self.tree.get(end.name) is end:
            self.end_session(end, lease.namespace)

    def ending(self, lease: ModelLease) -> None:
        """For a policy that learns from what has ended."""

    def end_session(self, end: Page, namespace: str) -> None:
        """The pages that no other request ever branched off leave first, the last of them before the others."""
        kept = 0
        for page in reversed(self.path_to(end)):
            if page.namespace != namespace or page.locks or page.branched or len(self.below(page)) > kept:
                return
            self.unlist(page)
            self.ended.append(page)
            kept = 1

    def fork(self, lease: ModelLease) -> ModelLease:
        if lease.written != len(lease.tokens) or lease.source is not None or lease.cleared:
            raise Misuse
        if lease.dropped > len(lease.path):
            raise Misuse
        rest = lease.written % self.page_size
        if (rest > 0) > self.room(lease.namespace):
            raise Exhausted
        self.commit(lease)
        child = ModelLease(lease.namespace, list(lease.tokens), list(lease.path), pages=lease.pages)
        child.written = child.cached = child.copied = lease.written
        child.dropped = lease.dropped
        self.lock(child.path)
        if rest:
            tokens = lease.tokens[len(lease.path) * self.page_size :]
            source = lease.tail or self.nearest_seen(lease.end, lease.namespace, tokens)[0]
            assert source is not None
            if source not in self.take(lease.namespace, 1):
                child.source = source
                source.holds += 1
        self.leases.append(child)
        return child

    # --- pins and clearing ----------------------------------------------------------------------------------------

    def pin(self, namespace: str, tokens: list[int]) -> list[Page]:
        path, source, shared = self.match(namespace, tokens)
        if len(path) * self.page_size + shared < len(tokens):
            raise Misuse
        pages = path + ([source] if source is not None else [])
        most = self.num_pages - max(1, self.num_pages // 8)
        if self.states()["pinned"] + sum(1 for p in pages if not p.pins) > most:
            raise Exhausted
        self.lock(pages)
        for page in pages:
            page.pins += 1
        self.pins.append(pages)
        return pages

    def unpin(self, pages: list[Page]) -> None:
        for page in pages:
            page.pins -= 1
        self.unlock(pages)
        self.pins = [p for p in self.pins if p is not pages]

    def clear(self, namespace: str) -> None:
        for lease in self.leases:
            lease.cleared |= namespace in self.chain(lease.namespace)
        for page in [p for p in self.tree.values() if namespace in self.chain(p.namespace)]:
            self.unpublish(page)
