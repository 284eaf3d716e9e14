"""Refuse the N-th request for pages, for every N: the operation fails, and nothing has changed."""

from __future__ import annotations

import numpy as np
import pytest

import radixkv
from tests.cache.test_cache import state


def lease_state(lease):
    lengths = (lease.num_tokens, lease.num_written, lease.num_cached, lease.num_prompt, lease.num_dropped)
    return *lengths, lease.copies, lease.pages.tolist(), lease.tokens.tolist()


def script(page_size):
    """A long mixed run of operations that take pages, each as (name, function of the live leases)."""
    rng = np.random.default_rng(7)
    steps = []
    for i in range(80):
        tokens = rng.integers(0, 3, rng.integers(1, 14)).tolist()
        kind = ("acquire", "extend", "fork", "finish", "drop", "truncate")[int(rng.integers(6))]
        steps.append((kind, tokens, str(i % 2)))
    return steps


def run(cache, steps, refuse_at):
    """Runs the steps; the `refuse_at`-th request for pages is refused. Returns how many refusals were seen."""
    leases, refused = [], 0
    cache._refuse_pages(refuse_at)
    for kind, tokens, namespace in steps:
        before, held = state(cache), [lease_state(lease) for lease in leases]
        try:
            if kind == "acquire":
                leases.append(cache.acquire(tokens, namespace))
            elif kind == "extend" and leases:
                leases[-1].extend(tokens)
            elif kind == "fork" and leases:
                leases[-1].advance()
                before, held = state(cache), [lease_state(lease) for lease in leases]
                leases.append(leases[-1].fork())
            elif kind == "drop" and leases:
                leases[-1].commit()  # what is dropped uncommitted cannot be forked
                leases[-1].drop(leases[-1].num_written)
            elif kind == "truncate" and leases:
                leases[-1].extend(tokens)
                leases[-1].truncate(leases[-1].num_tokens - len(tokens) // 2)
            elif kind == "finish" and leases:
                leases[0].advance()
                leases.pop(0).release(cold=len(tokens) % 2 == 0)
        except radixkv.PoolExhausted:
            refused += 1
            assert state(cache) == before
            assert [lease_state(lease) for lease in leases] == held
        cache.check()
        if len(leases) > 4:
            leases.pop(0).release()
    for lease in leases:
        lease.release()
    cache.evict(cache.num_pages)
    cache.check()
    assert cache.stats().free == cache.num_pages
    return refused


@pytest.mark.parametrize("policy", ["lru", "hazard"])
@pytest.mark.parametrize("page_size", [1, 4])
def test_refuse_the_nth_request_for_pages(page_size, policy):
    steps = script(page_size)
    assert run(radixkv.PrefixCache(200, page_size, policy), steps, -1) == 0
    n = 0
    while run(radixkv.PrefixCache(200, page_size, policy), steps, n) == 1:
        n += 1
    assert n > 15  # past the last request nothing is refused any more


@pytest.mark.parametrize("policy", ["lru", "hazard"])
@pytest.mark.parametrize("num_pages", range(1, 24))
def test_a_pool_too_small_by_any_number_of_pages(num_pages, policy):
    cache = radixkv.PrefixCache(num_pages, 2, policy)
    run(cache, script(2), -1)


def with_quotas(num_pages, page_size):
    cache = radixkv.PrefixCache(num_pages, page_size, hierarchical=True)
    cache.set_quota("0", floor=num_pages // 4, ceiling=max(1, num_pages // 2))
    cache.set_quota("1", floor=num_pages // 3)
    return cache


def below(steps):
    """The same in namespaces of two levels."""
    return [(kind, tokens, f"{name}/{i % 3}" if i % 4 else name) for i, (kind, tokens, name) in enumerate(steps)]


@pytest.mark.parametrize("page_size", [1, 4])
def test_refuse_the_nth_request_for_pages_under_quotas(page_size):
    steps = below(script(page_size))
    assert run(with_quotas(400, page_size), steps, -1) == 0
    n = 0
    while run(with_quotas(400, page_size), steps, n) == 1:
        n += 1
    assert n > 15


@pytest.mark.parametrize("num_pages", range(1, 24))
def test_quotas_too_small_by_any_number_of_pages(num_pages):
    run(with_quotas(num_pages, 2), below(script(2)), -1)
