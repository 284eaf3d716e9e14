"""The "hazard" policy: everything that holds of a cache holds with it, but for which page goes first."""

from __future__ import annotations

import numpy as np
import pytest

import radixkv
from tests.cache.hazard_model import HazardModel


def serve(cache, tokens, namespace="", cold=False):
    lease = cache.acquire(tokens, namespace)
    lease.advance()
    lease.release(cold=cold)
    return lease


def mixed(cache, seed, rounds=600):
    """Many sessions that grow, branch, end, are pinned, forked and cleared; checked all along."""
    rng = np.random.default_rng(seed)
    leases, pins = [], []
    for i in range(rounds):
        tokens = [int(rng.integers(3)), *rng.integers(0, 2, rng.integers(0, 24)).tolist()]
        kind = ("acquire", "serve", "serve", "extend", "finish", "fork", "pin", "unpin", "evict", "clear")[
            int(rng.choice(10, p=[0.2, 0.2, 0.1, 0.1, 0.2, 0.05, 0.05, 0.05, 0.04, 0.01]))
        ]
        try:
            if kind == "acquire":
                leases.append(cache.acquire(tokens, "ab"[i % 2]))
            elif kind == "serve":
                serve(cache, tokens, "ab"[i % 2], cold=bool(rng.integers(2)))
            elif kind == "extend" and leases:
                leases[-1].advance()
                leases[-1].commit()
                leases[-1].extend(tokens)
            elif kind == "finish" and leases:
                leases[0].advance()
                leases.pop(0).release(commit=bool(rng.integers(4)), cold=bool(rng.integers(2)))
            elif kind == "fork" and leases:
                leases[-1].advance()
                leases.append(leases[-1].fork())
            elif kind == "pin":
                pins.append(cache.pin(tokens[: cache.match(tokens, "a")], "a"))
            elif kind == "unpin" and pins:
                pins.pop(0).unpin()
            elif kind == "evict":
                before = cache.stats().evictable
                assert cache.evict(3) == min(3, before)
            elif kind == "clear":
                cache.clear("b")
        except (radixkv.PoolExhausted, radixkv.NotCached, radixkv.InvalidTokens, radixkv.LeaseError):
            pass
        cache.check()
        while len(leases) > 4:
            leases.pop(0).release()
    for lease in leases:
        lease.release()
    for pin in pins:
        pin.unpin()
    return cache


def pages(node):
    return [node["tokens"].tolist(), node["pages"].tolist(), [pages(child) for child in node["children"]]]


@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_every_count_and_list_is_right_after_every_operation(page_size, seed):
    cache = mixed(radixkv.PrefixCache(int(np.random.default_rng(seed).integers(6, 60)), page_size, "hazard"), seed)
    cache.check()
    evictable = cache.stats().evictable
    assert cache.evict(cache.num_pages) == evictable
    cache.check()
    assert cache.stats().free == cache.num_pages


@pytest.mark.parametrize(("seed", "num_pages", "page_size"), [(0, 60, 1), (1, 40, 2), (2, 16, 4), (3, 32, 3)])
def test_the_model_predicts_every_page_that_leaves(seed, num_pages, page_size):
    """Over a thousand requests, so that the estimate is made several times: evictions are a page at a time, too."""
    rng = np.random.default_rng(seed)
    cache, model = radixkv.PrefixCache(num_pages, page_size, "hazard"), HazardModel(num_pages, page_size)
    live, chosen_by_index = [], 0
    for i in range(1300):
        hot = rng.random() < 0.5
        tokens = [int(rng.integers(4))] * page_size + rng.integers(0, 2 if hot else 50, rng.integers(0, 12)).tolist()
        lease, twin = cache.acquire(tokens, "a"), model.acquire("a", tokens)
        lease.advance()
        model.advance(twin, len(twin.tokens) - twin.written)
        live.append((lease, twin))
        while len(live) > i % 3:
            lease, twin = live.pop(0)
            cold = bool(rng.random() < 0.2)
            lease.release(cold=cold)
            model.release(twin, True, cold)
        heads = [model.of[leaves[0]].touched for leaves in model.leaves if leaves]
        victim = model.victim()
        chosen_by_index += victim is not None and not model.ended and model.of[victim].touched > min(heads)
        if rng.random() < 0.3:
            assert cache.evict(1) == len(model.evict(1))
        named = {(name[-1][0], tuple(token for _, own in name for token in own)) for name in model.tree}
        assert published(cache) == named, f"after request {i}"
    assert model.estimate.requests > 5 * 256 - 10
    assert chosen_by_index > 100, "LRU over the lists would not do"
    cache.check()


def published(cache):
    """The pages of the tree, as the model names them."""
    found, todo = set(), [(root["namespace"], (), child) for root in cache.snapshot() for child in root["children"]]
    while todo:
        namespace, prefix, node = todo.pop()
        tokens = (*prefix, *node["tokens"].tolist())
        ends = (*range(len(prefix) + cache.page_size, len(tokens), cache.page_size), len(tokens))
        found |= {(namespace, tokens[:end]) for end in ends}
        todo += [(namespace, tokens, child) for child in node["children"]]
    return found


def test_the_same_calls_give_the_same_pages():
    first, second = (mixed(radixkv.PrefixCache(40, 2, "hazard"), 3) for _ in range(2))
    assert [[pages(c) for c in root["children"]] for root in first.snapshot()] == [
        [pages(c) for c in root["children"]] for root in second.snapshot()
    ]


def test_pages_of_one_kind_leave_least_recently_used_first():
    """One class, one list: that is LRU. 600 requests, so that the estimate is made twice."""
    caches = [radixkv.PrefixCache(32, 4, policy) for policy in ("lru", "hazard")]
    for i in range(600):
        for cache in caches:
            serve(cache, [i, i, i, i])
    lru, hazard = ([pages(c) for c in cache.snapshot()[0]["children"]] for cache in caches)
    assert lru == hazard
    for _ in range(32):
        for cache in caches:
            assert cache.evict(1) == 1
        lru, hazard = ([[pages(c) for c in root["children"]] for root in cache.snapshot()] for cache in caches)
        assert lru == hazard


def test_what_is_used_again_and_again_outlives_a_flood():
    """Of 20 pages each round 16 are never used again; LRU forgets the four before they come once more."""
    hits = {}
    for policy in ("lru", "hazard"):
        cache = radixkv.PrefixCache(16, 4, policy)
        for i in range(1500):
            if i % 5 == 0:
                serve(cache, [*([i // 5 % 4] * 4), 9, 9])
            else:
                serve(cache, [100 + i] * 6)
        hits[policy] = cache.stats().hit_tokens
        cache.check()
    assert hits["hazard"] > 1.5 * hits["lru"]


def test_what_an_ended_session_left_goes_first_with_any_policy():
    cache = radixkv.PrefixCache(16, 4, "hazard")
    serve(cache, list(range(100, 108)))
    serve(cache, list(range(200, 212)), cold=True)
    for left in (8, 4, 0):
        cache.evict(1)
        assert cache.match(list(range(200, 212))) == left
    assert cache.match(list(range(100, 108))) == 8
    cache.check()


def test_evicted_pages_are_remembered():
    """A prefix that came five times is kept although it was evicted each time in between."""
    cache = radixkv.PrefixCache(8, 4, "hazard")
    for i in range(2000):
        serve(cache, [1] * 8 if i % 8 == 0 else [i + 2] * 8)
    assert cache.stats().hit_tokens > 0.5 * 7 * 2000 / 8
    cache.check()


def test_a_policy_that_is_none():
    with pytest.raises(radixkv.InvalidArgument, match="policy is 'fifo': give 'lru' or 'hazard'"):
        radixkv.PrefixCache(8, 4, "fifo")
    with pytest.raises(radixkv.InvalidArgument, match="policy is 'None'"):
        radixkv.PrefixCache(8, 4, None)
