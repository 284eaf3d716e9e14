"""The bytes of a page follow from its prefix, and a published page never changes: in every format, whatever is done."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest

pytest.importorskip("torch")

from radixkv.errors import InvalidArgument, PoolExhausted
from tests.engine.test_engine import STORAGES, forward, make_engine, random_tokens

OPERATIONS = int(os.environ.get("RADIXKV_OPERATIONS", "400"))
PAGE_SIZE = 4
NAMES = [*3 * ["acquire"], *4 * ["step"], *2 * ["extend"], "fork", "truncate", "commit", "evict", "clear"]


class Traffic:
    """Some leases of an engine with a small pool, and random operations on them, most of them legal."""

    def __init__(self, engine, seed):
        self.engine = engine
        self.rng = np.random.default_rng(seed)
        self.base = random_tokens(self.rng, 60)
        self.leases = []

    def some(self):
        return [lease for lease in self.leases if self.rng.random() < 0.7]

    def pop(self):
        return self.leases.pop(self.rng.integers(len(self.leases)))

    def acquire(self):
        tokens = self.base[: self.rng.integers(0, 60)] + random_tokens(self.rng, int(self.rng.integers(1, 12)))
        self.leases.append(self.engine.acquire(tokens, namespace=str(self.rng.integers(2))))

    def step(self):
        if leases := [lease for lease in self.some() if lease.num_written < lease.num_tokens]:
            with self.engine.step(leases) as step:
                forward(step)

    def extend(self):
        for lease in self.some():
            lease.extend(random_tokens(self.rng, int(self.rng.integers(1, 6))))

    def fork(self):
        whole = [lease for lease in self.leases if lease.num_written == lease.num_tokens and not lease.copies]
        self.leases += [lease.fork() for lease in whole[:1]]

    def truncate(self):
        for lease in self.some():
            lease.truncate(int(self.rng.integers(1, lease.num_tokens + 1)))

    def commit(self):
        for lease in self.some():
            lease.commit()

    def release(self):
        self.pop().release(commit=self.rng.random() < 0.9, cold=self.rng.random() < 0.2)

    def evict(self):
        self.engine.cache.evict(int(self.rng.integers(1, 6)))

    def clear(self):
        if self.rng.random() < 0.1:
            namespace = str(self.rng.integers(2))
            self.engine.cache.clear(namespace)  # its leases neither publish nor fork any more
            self.leases = [lease for lease in self.leases if lease.namespace != namespace or lease.release()]

    def go_on(self):
        """One operation; with four leases, or too few pages, letting go of one of them."""
        if len(self.leases) > 3:
            return self.release()
        name = self.rng.choice(NAMES)
        try:
            getattr(self, name)()
        except InvalidArgument:
            assert name == "truncate"  # what was cached or published stays
        except PoolExhausted:
            self.release()


def published(cache):
    """(tokens from the root on, page) of every page in the tree; the last page of a run may be partly filled."""
    found, todo = set(), [((), child) for root in cache.snapshot() for child in root["children"]]
    while todo:
        before, node = todo.pop()
        tokens = (*before, *node["tokens"])
        for i, page in enumerate(node["pages"]):
            found.add((tokens[: len(before) + PAGE_SIZE * (i + 1)], page))
        todo += [(tokens, child) for child in node["children"]]
    return found


def hashes(engine, pages):
    data = np.empty((len(pages), engine.pool.page_bytes), np.uint8)
    engine.pool.read_pages(np.array(pages, dtype=np.int32), data)
    return [hashlib.blake2b(row, digest_size=16).digest() for row in data]


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: str(s.get("kv_format", ""))[:12])
def test_the_bytes_of_a_page_follow_from_its_prefix(storage):
    """Whoever wrote it, however often it was evicted, copied from or forked: a published page never changes."""
    engine = make_engine(num_pages=40, page_size=PAGE_SIZE, **storage)
    traffic = Traffic(engine, seed=3)
    known, before, stayed, again = {}, {}, 0, 0
    for _ in range(OPERATIONS):
        traffic.go_on()
        pages = list(published(engine.cache))
        now = dict(zip(pages, hashes(engine, [page for _, page in pages]), strict=True))
        for (tokens, page), found in now.items():
            stayed += (tokens, page) in before
            assert before.get((tokens, page), found) == found, "a published page has changed"
            if len(tokens) % PAGE_SIZE == 0:
                again += tokens in known and (tokens, page) not in before
                assert known.setdefault(tokens, found) == found, "another page with this prefix had other bytes"
        before = now
    for lease in traffic.leases:
        lease.release()
    engine.cache.check()
    evicted = engine.cache.stats().evicted_pages
    print(f"\n{OPERATIONS:,} operations: {stayed:,} pages hashed again, {again:,} written again, {evicted:,} evicted")
    assert stayed > 10 * OPERATIONS
    assert min(again, evicted) > OPERATIONS / 20
