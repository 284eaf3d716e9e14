"""Figures of each namespace add up to those of the cache."""

from __future__ import annotations

import random

import radixkv
from radixkv.observe import NamespaceStats, by_namespace
from tests.cache.test_cache import serve


def test_a_namespace_has_what_it_published():
    cache = radixkv.PrefixCache(num_pages=32, page_size=4)
    serve(cache, range(10), "a")
    serve(cache, [*range(8), 70, 71], "a")
    serve(cache, range(4), "b")
    cache.pin(list(range(4)), "b")
    with cache.acquire([*range(8), 70, 71, 9], "a"):
        found = by_namespace(cache.snapshot())
    assert found == {
        "a": NamespaceStats(tokens=12, pages=4, protected=2, pinned=0),
        "b": NamespaceStats(tokens=4, pages=1, protected=1, pinned=1),
    }


def test_they_add_up_to_the_figures_of_the_cache():
    chance = random.Random(4)
    cache = radixkv.PrefixCache(num_pages=60, page_size=4)
    leases = []
    for _ in range(60):
        tokens = [chance.randrange(3) for _ in range(chance.randrange(1, 20))]
        lease = cache.acquire(tokens, chance.choice("abc"))
        lease.advance()
        lease.commit()
        leases.append(lease)
        if len(leases) > 4:
            leases.pop(0).release()
    stats = cache.stats()
    found = by_namespace(cache.snapshot()).values()
    assert sum(one.pages for one in found) <= stats.protected + stats.evictable  # and what was taken out of the tree
    assert sum(one.pages - one.protected for one in found) == stats.evictable
    assert list(by_namespace(cache.snapshot())) == sorted(by_namespace(cache.snapshot()))


def test_in_a_hierarchical_cache_each_has_its_own():
    cache = radixkv.PrefixCache(num_pages=32, page_size=4, hierarchical=True)
    serve(cache, range(8), "a")
    serve(cache, [*range(8), 70, 71], "a/b")
    serve(cache, range(4), "a/b")
    assert by_namespace(cache.snapshot()) == {
        "a": NamespaceStats(tokens=8, pages=2, protected=0, pinned=0),
        "a/b": NamespaceStats(tokens=2, pages=1, protected=0, pinned=0),
    }
