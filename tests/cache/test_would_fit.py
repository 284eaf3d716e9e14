"""Asking before acquiring: the same counts as acquire finds, and nothing changes."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import radixkv
from tests.cache.test_cache import serve, state


@settings(max_examples=200, deadline=None)
@given(data=st.data(), num_pages=st.integers(2, 10), page_size=st.integers(1, 4))
def test_it_says_what_acquire_does(data, num_pages, page_size):
    cache = radixkv.PrefixCache(num_pages, page_size)
    leases = []
    for _ in range(8):
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
        before = state(cache)
        fit = cache.would_fit(tokens)
        assert state(cache) == before
        try:
            lease = cache.acquire(tokens)
        except radixkv.PoolExhausted as error:
            assert not fit
            assert state(cache) == before
            if -(-len(tokens) // page_size) <= num_pages:
                assert fit == radixkv.Fit(error.needed, error.free, error.evictable, error.cached)
        else:
            assert fit
            assert fit.cached == lease.num_cached
            assert (fit.free, cache.stats().private - before[0].private) == (before[0].free, fit.needed)
            lease.advance()
            if data.draw(st.booleans()):
                lease.release()
            else:
                leases.append(lease)


def test_pages_of_the_cached_prefix_are_not_counted_as_evictable():
    cache = radixkv.PrefixCache(4, 4)
    serve(cache, list(range(8)))
    assert cache.would_fit(range(8, 16)) == radixkv.Fit(needed=2, free=2, evictable=2, cached=0)
    fit = cache.would_fit([*range(8), *range(30, 42)])
    assert fit == radixkv.Fit(needed=3, free=2, evictable=0, cached=8)
    assert not fit


def test_refusals_are_those_of_acquire():
    cache = radixkv.PrefixCache(4, 4)
    with pytest.raises(radixkv.InvalidTokens, match="at least one token"):
        cache.would_fit([])
    with pytest.raises(radixkv.InvalidTokens, match="token -1 at index 1"):
        cache.would_fit([1, -1])
    cache.close()
    with pytest.raises(radixkv.LeaseError, match="closed"):
        cache.would_fit([1])
