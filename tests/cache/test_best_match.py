"""Where a router sends a prompt."""

from __future__ import annotations

import pytest

import radixkv
from tests.cache.test_cache import serve, state


@pytest.fixture
def caches():
    return [radixkv.PrefixCache(num_pages, 4) for num_pages in (8, 16, 16)]


def test_the_longest_prefix_wins_to_the_token(caches):
    for cache, length in zip(caches, (5, 9, 8), strict=True):
        serve(cache, list(range(length)))
    before = [state(cache) for cache in caches]
    assert radixkv.best_match(caches, list(range(30))) == radixkv.BestMatch(index=1, cached=9)
    assert radixkv.best_match(caches, [0, 1, 2, 3, 4, 5, 77]) == radixkv.BestMatch(1, 6)
    assert [state(cache) for cache in caches] == before


def test_equal_ones_go_by_room_and_then_in_order(caches):
    assert radixkv.best_match(caches, [1]) == radixkv.BestMatch(1, 0)
    with caches[1].acquire([5]):
        assert radixkv.best_match(caches, [1]) == radixkv.BestMatch(2, 0)


def test_namespaces_are_walls_here_too(caches):
    serve(caches[0], [1, 2, 3], "a")
    assert radixkv.best_match(caches, [1, 2, 3], "a") == radixkv.BestMatch(0, 3)
    assert radixkv.best_match(caches, [1, 2, 3], "b").cached == 0


def test_refusals(caches):
    with pytest.raises(radixkv.InvalidArgument, match="no caches"):
        radixkv.best_match([], [1])
    with pytest.raises(radixkv.InvalidTokens):
        radixkv.best_match(caches, [-1])
    caches[1].close()
    with pytest.raises(radixkv.LeaseError, match="closed"):
        radixkv.best_match(caches, [1])
