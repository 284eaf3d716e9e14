"""A literal model of an LRU cache of whole pages with the face that replay drives. Slow, short and obvious.

A page is named by the whole prefix up to it. ``order`` lists the resident, unlocked pages from the hottest to the
coldest.
"""

from types import SimpleNamespace


class PageLru:
    def __init__(self, num_pages, page_size):
        self.num_pages, self.page_size = num_pages, page_size
        self.order = []
        self.leased = 0
        self.evicted_pages = 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        assert self.leased == 0
        assert len(self.order) <= self.num_pages

    def names(self, tokens, namespace):
        tokens = [int(token) for token in tokens]
        ends = range(self.page_size, len(tokens) + 1, self.page_size)
        return [(namespace, tuple(tokens[:end])) for end in ends]

    def match(self, tokens, namespace=""):
        num = 0
        for name in self.names(tokens, namespace):
            if name not in self.order:
                break
            num += self.page_size
        return num

    def take(self, num):
        """Lease ``num`` fresh pages, evicting the coldest ones when no page is free."""
        for _ in range(num):
            if self.leased + len(self.order) == self.num_pages:
                self.order.pop()
                self.evicted_pages += 1
            self.leased += 1

    def acquire(self, tokens, namespace=""):
        return PageLease(self, list(tokens), namespace)

    def stats(self):
        return SimpleNamespace(evicted_pages=self.evicted_pages)


class PageLease:
    def __init__(self, cache, tokens, namespace):
        self.cache, self.tokens, self.namespace = cache, tokens, namespace
        lockable = cache.names(tokens, namespace)[: (len(tokens) - 1) // cache.page_size]
        locked = []
        for name in lockable:
            if name not in cache.order:
                break
            cache.order.remove(name)
            locked.append(name)
        cache.leased += len(locked)
        self.num_cached = len(locked) * cache.page_size
        self.pages = len(locked)
        self.fit()

    def fit(self):
        needed = -(-len(self.tokens) // self.cache.page_size)
        self.cache.take(needed - self.pages)
        self.pages = needed

    def extend(self, tokens):
        self.tokens.extend(tokens)
        self.fit()

    def advance(self):
        pass

    def release(self):
        self.cache.leased -= self.pages
        path = self.cache.names(self.tokens, self.namespace)
        self.cache.order = path + [name for name in self.cache.order if name not in path]
