"""Namespaces below others, quotas, and counts of each: what the state machine does at random, said plainly."""

from __future__ import annotations

import pytest

import radixkv
from tests.cache.test_cache import serve, state

A, B = list(range(100, 108)), list(range(200, 208))


def tree(num_pages=32):
    return radixkv.PrefixCache(num_pages, 4, hierarchical=True)


# --- one below another -----------------------------------------------------------------------------------------------


def test_a_user_finds_what_the_tenant_published_and_nobody_else_does():
    cache = tree()
    serve(cache, A, "tenant")
    assert cache.match([*A, 1], "tenant/user") == 8
    assert cache.match([*A, 1], "tenant/user/session") == 8
    assert cache.match([*A, 1], "other/user") == 0
    assert cache.match([*A, 1], "") == 0


def test_what_a_user_published_is_found_by_neither_tenant_nor_sibling():
    cache = tree()
    serve(cache, A, "tenant")
    serve(cache, [*A, *B], "tenant/user")
    assert cache.match([*A, *B], "tenant/user") == 16
    assert cache.match([*A, *B], "tenant") == 8
    assert cache.match([*A, *B], "tenant/sibling") == 8
    assert cache.match([*A, *B], "tenant/user/session") == 16
    cache.check()


def test_a_page_of_the_tenant_is_one_page_for_all_its_users():
    cache = tree()
    serve(cache, A, "tenant")
    pages = []
    for user in ("tenant/a", "tenant/b"):
        with cache.acquire([*A, 7], user) as lease:
            pages.append(lease.pages[:2].tolist())
            lease.advance()
    assert pages[0] == pages[1]
    assert {name: use.pages for name, use in cache.namespaces().items()} == {
        "tenant": 2, "tenant/a": 1, "tenant/b": 1, None: 0,
    }  # fmt: skip


def test_it_is_off_unless_asked_for():
    cache = radixkv.PrefixCache(32, 4)
    serve(cache, A, "tenant")
    assert cache.match(A, "tenant/user") == 0


def test_of_two_paths_the_longer_is_taken():
    cache = tree()
    serve(cache, [*A, *B], "tenant/user")
    serve(cache, A, "tenant")  # sees nothing of it, and publishes its own
    assert cache.match([*A, *B], "tenant/user") == 16
    assert cache.match([*A, *B], "tenant/sibling") == 8
    with cache.acquire([*A, 5], "tenant/user") as lease:  # of two equally long ones the one that is shared by more
        tenants = cache.snapshot()[0]["children"]
        own = next(node["pages"].tolist() for node in tenants if "namespace" not in node)
        assert lease.pages[:2].tolist() == own


def test_what_the_tenant_published_meanwhile_is_taken_and_the_duplicate_freed():
    cache = tree()
    lease = cache.acquire(A, "tenant/user")
    serve(cache, A, "tenant")
    lease.advance()
    lease.release()
    assert cache.namespaces()["tenant/user"].pages == 0
    assert cache.stats().evictable == 2
    other = cache.acquire(B, "tenant")
    serve(cache, B, "tenant/user")  # the other way round nothing is taken: the tenant does not learn of it
    other.advance()
    other.release()
    assert cache.namespaces()["tenant"].pages == 4


def test_the_end_of_a_users_session_leaves_the_tenants_pages_as_warm_as_they_were():
    cache = tree(num_pages=5)
    serve(cache, A, "tenant")
    serve(cache, [9, 9, 9, 9], "tenant")
    with cache.acquire([*A, *B[:4]], "tenant/user") as lease:
        lease.advance()
        lease.release(cold=True)
    cache.evict(1)
    assert cache.match([*A, *B], "tenant/user") == 8
    cache.evict(1)
    assert (cache.match(A, "tenant"), cache.match([9, 9, 9, 9], "tenant")) == (8, 0)


def test_clear_forgets_what_is_below_and_nothing_else():
    cache = tree()
    for namespace, tokens in (("t", A), ("t/a", [*A, *B]), ("t/a/b", [*A, *B, 1, 2, 3, 4]), ("t/c", [*A, 5, 6, 7, 8])):
        serve(cache, tokens, namespace)
    lease = cache.acquire([*A, *B, 9], "t/a")
    lease.advance()
    assert cache.clear("t/a") == 1  # those that the lease uses go when it ends
    assert cache.match([*A, *B], "t/a/b") == 8
    assert cache.match([*A, 5, 6, 7, 8], "t/c") == 12
    lease.release()
    assert cache.match([*A, *B], "t/a") == 8  # what the lease had computed before is not published
    cache.check()
    assert cache.clear("t") == 3
    assert cache.match(A, "t/c") == 0
    assert cache.stats().free == cache.num_pages


def test_a_pin_keeps_a_path_through_both():
    cache = tree(num_pages=8)
    serve(cache, A, "t")
    serve(cache, [*A, *B], "t/u")
    with cache.pin([*A, *B], "t/u"):
        cache.evict(8)
        assert cache.match([*A, *B], "t/u") == 16
    cache.evict(8)
    assert cache.stats().free == 8


def test_the_slash_says_what_is_above():
    cache = tree()
    serve(cache, A, "")
    assert cache.match(A, "/x") == 8  # the name before its slash is ""
    serve(cache, B, "a/")
    assert cache.match(B, "a//b") == 8
    assert cache.match(B, "a/b") == 0
    deep = "/".join("x" * 17)
    for call in (cache.match, cache.acquire, cache.would_fit, cache.pin):
        with pytest.raises(radixkv.InvalidArgument, match="17 levels"):
            call(A, deep)
    with pytest.raises(radixkv.InvalidArgument, match="17 levels"):
        cache.clear(deep)


@pytest.mark.parametrize("policy", ["lru", "hazard"])
def test_every_policy_serves_namespaces_below_others(policy):
    cache = radixkv.PrefixCache(24, 2, policy, hierarchical=True)
    cache.curve()
    for i in range(300):
        tokens = [t % 3 for t in range(i % 7, i % 7 + 3 + i % 11)]
        serve(cache, tokens, ("t", "t/a", "t/b", "t/a/c")[i % 4])
        if i % 50 == 49:
            cache.clear("t/a")
        cache.check()
    cache.evict(24)
    cache.check()
    assert cache.stats().free == 24


# --- counts ----------------------------------------------------------------------------------------------------------


def test_counts_of_each_add_up_to_those_of_the_cache():
    cache = radixkv.PrefixCache(64, 4)
    for i in range(2000):
        serve(cache, [i % 5] * (1 + i % 9), f"tenant-{i % 1500}")
    found, stats = cache.namespaces(), cache.stats()
    assert len(found) <= 1024 + 64 + 1  # those with pages, idle ones, and the rest
    assert found[None].requests > 0
    for count in ("requests", "input_tokens", "hit_tokens"):
        assert sum(getattr(use, count) for use in found.values()) == getattr(stats, count)
    assert sum(use.pages for use in found.values()) == stats.num_pages - stats.free
    assert list(found)[:-1] == sorted(name for name in found if name is not None)


def test_a_namespace_counts_its_own_requests():
    cache = tree()
    serve(cache, A, "t")
    serve(cache, A, "t/u")
    assert cache.namespaces()["t/u"] == radixkv.NamespaceUse(1, 8, 7, 0, 0, 0, None)
    assert cache.namespaces()["t"].hit_tokens == 0
    assert cache.namespaces()["t/u"].hit_rate == 7 / 8


def test_a_prompt_in_pieces_counts_as_one_that_came_whole():
    cache = radixkv.PrefixCache(16, 4)
    journal = cache.journal()
    with cache.acquire(range(6), "a") as lease:
        lease.advance()
        lease.extend(range(6, 15), prompt=True)
        lease.advance()
        lease.extend([7])  # of the answer
        lease.advance()
        lease.extend([8, 9], prompt=True)  # what follows an answer is input, too, but not of the prompt
        lease.advance()
        assert lease.num_prompt == 15
    with pytest.raises(radixkv.PoolExhausted), cache.acquire([5], "a") as lease:
        lease.extend([5] * 100, prompt=True)
    stats, one = cache.stats(), cache.namespaces()["a"]
    assert (stats.requests, stats.input_tokens, stats.hit_tokens) == (2, 18, 0)
    assert (one.requests, one.input_tokens, one.hit_tokens) == (2, 18, 0)
    assert journal.releases(0)[0][0].num_prompt == 15


def test_forks_are_counted():
    cache = radixkv.PrefixCache(8, 4)
    with cache.acquire(A) as lease:
        lease.advance()
        lease.fork().release()
        lease.fork().release()
    assert (cache.stats().forks, cache.stats().requests) == (2, 1)


# --- quotas ----------------------------------------------------------------------------------------------------------


def test_nobody_evicts_a_namespace_below_its_floor():
    cache = radixkv.PrefixCache(10, 4)
    cache.set_quota("gold", floor=2)
    serve(cache, A, "gold")
    for i in range(20):
        serve(cache, [i] * 12, "greedy")
    assert cache.match(A, "gold") == 8
    assert cache.namespaces()["gold"].pages == 2
    with pytest.raises(
        radixkv.PoolExhausted, match="need 9 pages; 0 free, 8 evictable, 0 leased or pinned, 2 kept"
    ) as e:
        cache.acquire(list(range(500, 536)), "greedy")
    assert (e.value.needed, e.value.free, e.value.evictable) == (9, 0, 8)
    assert cache.would_fit(list(range(500, 536)), "greedy").evictable == 8
    assert cache.would_fit(list(range(500, 536)), "gold").evictable == 10


def test_above_its_floor_a_namespace_is_evicted_down_to_it():
    cache = radixkv.PrefixCache(10, 4)
    cache.set_quota("gold", floor=2)
    serve(cache, [*A, *B, *A], "gold")
    serve(cache, list(range(300, 324)), "greedy")  # six pages; four are free
    assert cache.namespaces()["gold"].pages == 4
    serve(cache, list(range(400, 416)), "greedy")
    assert cache.match([*A, *B, *A], "gold") == 8  # from the end of the path, as ever


def test_a_namespace_may_evict_its_own_below_its_floor():
    cache = radixkv.PrefixCache(4, 4)
    cache.set_quota("gold", floor=4)
    serve(cache, [*A, *B], "gold")
    serve(cache, list(range(16)), "gold")
    assert cache.match([*A, *B], "gold") == 0


def test_at_its_ceiling_a_namespace_evicts_its_own_first():
    cache = radixkv.PrefixCache(10, 4)
    serve(cache, [1] * 4, "other")  # the coldest of all
    cache.set_quota("greedy", ceiling=4)
    for i in range(5):
        serve(cache, [10 + i] * 8, "greedy")
        assert cache.namespaces()["greedy"].pages <= 4
    assert cache.match([1] * 4, "other") == 4
    assert [cache.match([10 + i] * 8, "greedy") for i in range(5)] == [0, 0, 0, 8, 8]  # the coldest went
    assert cache.stats().free == 5


def test_a_ceiling_that_came_down_evicts_the_page_that_a_request_copies_from():
    cache = radixkv.PrefixCache(8, 4)
    for first in (1, 2, 3):
        serve(cache, [first] * 4, "a")
    cache.set_quota("a", ceiling=1)
    lease = cache.acquire([1, 1, 5], "a")  # all three go, the one with [1, 1] first
    cache.check()
    assert (lease.num_cached, list(lease.copies), cache.stats().free) == (2, [], 7)
    lease.release()
    cache.check()


def test_above_its_ceiling_a_request_is_refused_with_numbers():
    cache = radixkv.PrefixCache(10, 4)
    cache.set_quota("small", ceiling=3)
    lease = cache.acquire(A, "small")
    before = state(cache)
    with pytest.raises(radixkv.PoolExhausted, match="'small', which has 2 of at most 3: release a lease of it or") as e:
        cache.acquire(B, "small")
    assert (e.value.needed, e.value.free, e.value.evictable) == (2, 1, 0)
    with pytest.raises(radixkv.PoolExhausted, match="at most 3"):
        lease.extend([1] * 8)
    assert state(cache) == before
    assert not cache.would_fit(B, "small")
    assert cache.would_fit(B, "other")
    lease.advance()
    lease.release()
    serve(cache, B, "small")


def test_a_quota_counts_what_is_below():
    cache = tree(num_pages=10)
    cache.set_quota("t", ceiling=4)
    serve(cache, A, "t")
    serve(cache, [*A, *B], "t/u")
    serve(cache, [5] * 4, "t/v")
    assert sum(use.pages for use in cache.namespaces().values()) == 4
    with pytest.raises(radixkv.InvalidArgument, match="top namespace with all below it, not for 't/u'"):
        cache.set_quota("t/u", floor=1)


def test_a_quota_that_is_taken_away_leaves_the_order_as_if_it_had_not_been():
    plain, with_quota = radixkv.PrefixCache(12, 4), radixkv.PrefixCache(12, 4)
    for i in range(30):
        for cache in (plain, with_quota):
            serve(cache, [i % 6] * (4 + i % 5), "ab"[i % 2])
        if i % 5 == 0:
            with_quota.set_quota("a", ceiling=12)
        elif i % 5 == 3:
            with_quota.set_quota("a")
        with_quota.check()
    with_quota.set_quota("a")
    assert with_quota._coldest_first().tolist() == plain._coldest_first().tolist()


@pytest.mark.parametrize(
    ("quota", "says"),
    [
        ({"floor": -1}, "floor must be at least 0"),
        ({"ceiling": 0}, "ceiling must be at least 1"),
        ({"floor": 5, "ceiling": 4}, "floor 5 is above ceiling 4"),
        ({"floor": 9}, "floors of 13 pages together; the pool has 12"),
        ({"floor": "1"}, "floor"),
    ],
)
def test_quotas_that_cannot_be(quota, says):
    cache = radixkv.PrefixCache(12, 4)
    cache.set_quota("b", floor=4)
    before = cache.namespaces()
    with pytest.raises(radixkv.InvalidArgument, match=says):
        cache.set_quota("a", **quota)
    assert cache.namespaces() == before


def test_quotas_need_lru():
    with pytest.raises(radixkv.InvalidArgument, match="need the policy 'lru'"):
        radixkv.PrefixCache(12, 4, "hazard").set_quota("a", floor=1)
