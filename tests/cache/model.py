"""The reference: what the engine means, in plain Python over single pages. Slow, literal, and knows no page ids."""

from __future__ import annotations

from dataclasses import dataclass, field


class Exhausted(Exception):
    pass


class Misuse(Exception):
    pass


@dataclass(eq=False)
class Page:
    """A published page, named by its namespace and the tokens from the start of the sequence to its own end."""

    name: tuple[str, tuple[int, ...]]
    locks: int = 0
    holds: int = 0
    pins: int = 0
    branched: bool = False  # two pages followed it, or one below it, at the same time, once


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
    def private(self) -> int:
        return self.pages - max(len(self.path), self.dropped) - (self.tail is not None)


class Model:
    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.free = num_pages
        self.tree: dict[tuple[str, tuple[int, ...]], Page] = {}
        self.order: list[Page] = []  # unlocked published pages, coldest first
        self.ended: list[Page] = []  # those of ended sessions, which leave before them
        self.detached: list[Page] = []  # out of the tree, but held or locked
        self.leases: list[ModelLease] = []
        self.pins: list[list[Page]] = []

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

    def nearest(self, namespace: str, prefix: list[int], rest: list[int]) -> tuple[Page | None, int]:
        """Of the pages that follow `prefix`, the one that shares the most leading tokens with `rest`.

        Ties go by the bits of `rest` (0 past its end) wherever the candidates differ: a rule without history.
        """
        at = len(prefix)
        pages = [
            p
            for (ns, t), p in self.tree.items()
            if ns == namespace and at < len(t) <= at + self.page_size and list(t[:at]) == prefix
        ]

        def bit(tokens: list[int] | tuple[int, ...], i: int) -> int:
            return tokens[i // 32] >> (31 - i % 32) & 1 if i // 32 < len(tokens) else 0

        i = 0
        while len(pages) > 1:
            if len({bit(p.name[1][at:], i) for p in pages}) > 1:
                pages = [p for p in pages if bit(p.name[1][at:], i) == bit(rest, i)]
            i += 1
        if not pages:
            return None, 0
        own = pages[0].name[1][at:]
        shared = 0
        while shared < min(len(own), len(rest)) and own[shared] == rest[shared]:
            shared += 1
        return pages[0], shared

    def match(self, namespace: str, tokens: list[int]) -> tuple[list[Page], Page | None, int]:
        """(full pages, page that holds the next tokens, how many of them)"""
        path: list[Page] = []
        size = self.page_size
        while (key := (namespace, tuple(tokens[: (len(path) + 1) * size]))) in self.tree and len(key[1]) % size == 0:
            if len(key[1]) != (len(path) + 1) * size:
                break
            path.append(self.tree[key])
        at = len(path) * size
        source, shared = self.nearest(namespace, tokens[:at], tokens[at:])
        return path, source if shared else None, shared

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

    def evict(self, count: int) -> list[Page]:
        taken: list[Page] = []
        while len(taken) < count and (self.ended or self.order):
            page = (self.ended or self.order)[0]
            if not page.holds:
                taken.append(page)
            self.unpublish(page)
        return taken

    def take(self, need: int, lost: int = 0) -> list[Page]:
        if need > self.free + self.states()["evictable"] - lost:
            raise Exhausted
        evicted = self.evict(need - self.free)
        self.free -= need
        return evicted

    # --- leases ---------------------------------------------------------------------------------------------------

    def acquire(self, namespace: str, tokens: list[int]) -> ModelLease:
        if self.count_for(len(tokens)) > self.num_pages:
            raise Exhausted
        path, source, partial = self.match(namespace, tokens[:-1])
        lost = sum(1 for p in path if not p.locks and not p.holds)
        need = self.count_for(len(tokens)) - len(path)
        if need > self.free + self.states()["evictable"] - lost:
            raise Exhausted
        lease = ModelLease(namespace, list(tokens), path, pages=self.count_for(len(tokens)))
        self.lock(path)
        evicted = self.take(need)
        if source is not None and source not in evicted:
            lease.source = source
            source.holds += 1
        lease.written = lease.cached = lease.copied = len(path) * self.page_size + partial
        self.leases.append(lease)
        return lease

    def extend(self, lease: ModelLease, tokens: list[int]) -> None:
        if not tokens:
            return
        total = self.count_for(len(lease.tokens) + len(tokens))
        if total - max(0, lease.dropped - len(lease.path)) > self.num_pages:
            raise Exhausted
        tail, need = lease.tail, total - lease.pages
        no_page_for_a_copy = need == self.free + self.states()["evictable"]
        if tail is not None and no_page_for_a_copy and tail.locks == 1 and not tail.pins and not tail.holds:
            lease.tail = None
            self.tree.pop(tail.name) if tail not in self.detached else self.detached.remove(tail)
        self.take(need + (lease.tail is not None))
        lease.pages = total
        if lease.tail is not None:  # a published page never changes: go on in a copy
            lease.source = lease.tail
            lease.source.holds += 1
            lease.copied = len(lease.tokens)
            self.unlock([lease.tail])
            lease.tail = None
        lease.tokens += tokens

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

    def commit(self, lease: ModelLease, closing: bool = False) -> Page | None:
        """Returns another request's page, if there is one, that has the tokens of the lease's open page."""
        if lease.cleared or lease.tail is not None or lease.source is not None or lease.dropped > len(lease.path):
            return None
        size = self.page_size
        while len(lease.path) < lease.written // size:
            name = (lease.namespace, tuple(lease.tokens[: (len(lease.path) + 1) * size]))
            if name in self.tree:  # published by another request first: the duplicate is freed
                self.free += 1
                self.lock([self.tree[name]])
                lease.path.append(self.tree[name])
            else:
                lease.path.append(self.publish(name))
        if lease.written % size and (closing or lease.written == len(lease.tokens)):
            at = len(lease.path) * size
            page, shared = self.nearest(lease.namespace, lease.tokens[:at], lease.tokens[at : lease.written])
            if shared < lease.written - at:
                lease.tail = self.publish((lease.namespace, tuple(lease.tokens[: lease.written])))
            elif closing:
                assert page is not None
                self.lock([page])
                self.unlock([page])
                return page if len(page.name[1]) == lease.written else None
        return None

    def publish(self, name: tuple[str, tuple[int, ...]]) -> Page:
        page = Page(name)
        start = (len(name[1]) - 1) // self.page_size * self.page_size
        for end in range(start + 1, len(name[1])):  # an open page with fewer of the same tokens is replaced
            shorter = self.tree.get((name[0], name[1][:end]))
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
        namespace, tokens = page.name
        ends = [*range(self.page_size, len(tokens), self.page_size), len(tokens)]
        return [self.tree[namespace, tokens[:end]] for end in ends]

    def below(self, page: Page) -> list[Page]:
        (namespace, tokens), end = page.name, len(page.name[1])
        return [
            p
            for (ns, t), p in self.tree.items()
            if ns == namespace and end < len(t) <= end + self.page_size and t[:end] == tokens
        ]

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
            self.end_session(end)

    def ending(self, lease: ModelLease) -> None:
        """For a policy that learns from what has ended."""

    def end_session(self, end: Page) -> None:
        """The pages that no other request ever branched off leave first, the last of them before the others."""
        kept = 0
        for page in reversed(self.path_to(end)):
            if page.locks or page.branched or len(self.below(page)) > kept:
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
        if (rest > 0) > self.free + self.states()["evictable"]:
            raise Exhausted
        self.commit(lease)
        child = ModelLease(lease.namespace, list(lease.tokens), list(lease.path), pages=lease.pages)
        child.written = child.cached = child.copied = lease.written
        child.dropped = lease.dropped
        self.lock(child.path)
        if rest:
            at = len(lease.path) * self.page_size
            source = lease.tail or self.nearest(lease.namespace, lease.tokens[:at], lease.tokens[at:])[0]
            assert source is not None
            if source not in self.take(1):
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
            lease.cleared |= lease.namespace == namespace
        for page in [p for (ns, _), p in self.tree.items() if ns == namespace]:
            self.unpublish(page)
