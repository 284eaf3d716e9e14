"""PrefixCache: what each call gives, and that every misuse is a clear error that changes nothing."""

from __future__ import annotations

import array
import gc

import numpy as np
import pytest

import radixkv


@pytest.fixture
def cache():
    cache = radixkv.PrefixCache(num_pages=16, page_size=4)
    yield cache
    cache.check()


def serve(cache, tokens, namespace=""):
    with cache.acquire(tokens, namespace) as lease:
        lease.advance()
        return lease.num_cached


def step_over(cache, leases, table=None):
    """A step without layers: what an engine's step is to the cache."""
    return radixkv._core.Step(table or radixkv._core.PageTable(cache), leases, 0)


def state(cache):
    def plain(node):
        out = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in node.items() if k != "children"}
        return out | {"children": [plain(c) for c in node["children"]]}

    return cache.stats(), [plain(n) for n in cache.snapshot()]


# --- hits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 16, 64])
def test_reuse_is_exact_to_the_token(page_size):
    cache = radixkv.PrefixCache(128, page_size)
    serve(cache, list(range(50)))
    for shared in range(50):
        tokens = [*list(range(shared)), 99, 98]
        assert cache.match(tokens) == shared
        with cache.acquire(tokens) as lease:
            assert lease.num_cached == shared
            partial = shared % page_size
            assert [n for _, _, n in lease.copies] == ([partial] if partial else [])
    cache.check()


def test_one_token_is_always_left_to_compute(cache):
    serve(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    assert cache.match([1, 2, 3, 4, 5, 6, 7, 8]) == 8
    with cache.acquire([1, 2, 3, 4, 5, 6, 7, 8]) as lease:
        assert lease.num_cached == 7
    with cache.acquire([1]) as lease:
        assert lease.num_cached == 0


def test_match_changes_nothing(cache):
    serve(cache, [1, 2, 3, 4, 5, 6])
    serve(cache, [7, 8, 9, 10])
    before = state(cache)
    cache.match([1, 2, 3])
    assert state(cache) == before
    cache.evict(2)  # the colder prefix goes first, though it was matched last
    assert cache.match([1, 2, 3, 4, 5, 6]) == 0
    assert cache.match([7, 8, 9, 10]) == 4


def test_a_fuller_page_replaces_a_partly_filled_one(cache):
    serve(cache, [1, 2])
    serve(cache, [1, 2, 3])
    assert cache.stats().evictable == 1
    serve(cache, [1, 2, 9])  # not a continuation: a page of its own
    assert cache.stats().evictable == 2


def test_eviction_takes_the_coldest_page_from_the_tail(cache):
    serve(cache, list(range(12)))
    serve(cache, [50, 51, 52, 53])
    assert cache.evict(1) == 1
    assert cache.match(list(range(12))) == 8
    assert cache.match([50, 51, 52, 53]) == 4
    serve(cache, [*list(range(8)), 0])  # touches the older prefix
    assert cache.evict(1) == 1
    assert cache.match([50, 51, 52, 53]) == 0


def test_duplicates_are_folded_onto_the_published_pages(cache):
    a, b = cache.acquire([1, 2, 3, 4, 5]), cache.acquire([1, 2, 3, 4, 6])
    assert a.pages[0] != b.pages[0]
    for lease in (a, b):
        lease.advance()
        lease.commit()
    assert a.pages[0] == b.pages[0]
    a.release()
    b.release()
    assert cache.stats().evictable == 3


def test_commit_makes_the_open_page_findable_and_the_lease_goes_on_in_a_copy(cache):
    lease = cache.acquire([1, 2, 3, 4, 5, 6])
    lease.advance()
    lease.commit()
    assert cache.match([1, 2, 3, 4, 5, 6]) == 6
    published = int(lease.pages[1])
    lease.extend([7])
    assert lease.copies == [(published, int(lease.pages[1]), 2)]
    lease.advance()
    lease.release()
    assert cache.match([1, 2, 3, 4, 5, 6, 7]) == 7
    assert cache.stats().evictable == 2


def test_an_exception_releases_without_commit(cache):
    with pytest.raises(KeyError), cache.acquire([1, 2, 3, 4]) as lease:
        lease.advance()
        raise KeyError
    assert lease.released
    assert cache.match([1, 2, 3, 4]) == 0
    assert cache.stats().free == 16


def test_a_dropped_lease_is_released(cache):
    lease = cache.acquire([1, 2, 3])
    assert cache.stats().private == 1
    del lease
    gc.collect()
    assert cache.stats().free == 16


def test_namespaces_are_walls(cache):
    serve(cache, [1, 2, 3, 4], "a")
    assert cache.match([1, 2, 3, 4], "a") == 4
    assert cache.match([1, 2, 3, 4], "b") == cache.match([1, 2, 3, 4]) == 0
    assert serve(cache, [1, 2, 3, 4, 5], "b") == 0
    assert [root["namespace"] for root in cache.snapshot()] == ["a", "b"]


def test_clear_forgets_even_what_leases_use(cache):
    serve(cache, [1, 2, 3, 4], "a")
    serve(cache, [1, 2, 3, 4], "b")
    lease = cache.acquire([1, 2, 3, 4, 5], "a")
    assert lease.num_cached == 4
    cache.clear("a")
    assert cache.match([1, 2, 3, 4], "a") == 0
    assert cache.match([1, 2, 3, 4], "b") == 4
    lease.advance()
    lease.release()  # computed with what was to be forgotten: not published
    assert cache.match([1, 2, 3, 4], "a") == 0
    assert cache.clear() == 1
    assert cache.stats().free == 16


def test_pins_keep_a_prefix_and_may_not_starve_the_pool(cache):
    serve(cache, list(range(16)))
    pin = cache.pin(list(range(10)))
    assert (pin.num_tokens, cache.stats().pinned, cache.stats().protected) == (10, 3, 3)
    cache.evict(16)
    assert cache.match(list(range(16))) == 12
    with pytest.raises(radixkv.NotCached, match="12 of 16 tokens are cached: run the prompt once"):
        cache.pin(list(range(16)))
    serve(cache, list(range(100, 148)))
    before = state(cache)
    with pytest.raises(radixkv.PoolExhausted, match="pinning 12 pages besides 3 pinned ones .* at most 14 of 16"):
        cache.pin(list(range(100, 148)))
    assert state(cache) == before
    pin.unpin()
    with pytest.raises(radixkv.LeaseError, match="undone already"):
        pin.unpin()
    assert cache.stats().pinned == 0
    with cache.pin(list(range(100, 148))):
        assert cache.stats().pinned == 12
    assert cache.stats().pinned == 0


def test_a_pin_outlives_its_object_and_a_fuller_page(cache):
    serve(cache, [1, 2])
    cache.pin([1, 2])
    gc.collect()
    serve(cache, [1, 2, 3])
    cache.evict(16)
    assert cache.match([1, 2, 3]) == 3
    assert cache.stats().pinned == 1


def test_forks_share_written_pages_and_copy_the_open_one(cache):
    lease = cache.acquire([1, 2, 3, 4, 5, 6])
    lease.advance()
    forks = [lease.fork() for _ in range(3)]
    for fork in forks:
        assert fork.pages[0] == lease.pages[0]
        assert fork.copies == [(int(lease.pages[1]), int(fork.pages[1]), 2)]
        assert fork.num_written == 6
    for i, each in enumerate([lease, *forks]):
        each.extend([10 + i])
        each.advance()
        each.release()
    assert all(cache.match([1, 2, 3, 4, 5, 6, 10 + i]) == 7 for i in range(4))
    assert cache.stats().evictable == 5


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        lambda t: np.array(t, np.int32),
        lambda t: np.array(t, np.int64),
        lambda t: np.repeat(np.array(t, np.int32), 2)[::2],
        lambda t: np.repeat(np.array(t, np.int64), 2)[::2],
        lambda t: array.array("i", t),
        lambda t: memoryview(np.array(t, np.int32)),
    ],
    ids=["list", "tuple", "int32", "int64", "strided int32", "strided int64", "array", "memoryview"],
)
def test_tokens_may_come_as(cache, make):
    with cache.acquire(make([5, 6, 7])) as lease:
        assert lease.tokens.tolist() == [5, 6, 7]
        lease.extend(make([8]))
        assert lease.tokens.tolist() == [5, 6, 7, 8]


def test_the_same_calls_give_the_same_state():
    def run():
        rng = np.random.default_rng(0)
        cache = radixkv.PrefixCache(24, 2)
        for _ in range(300):
            serve(cache, rng.integers(0, 3, rng.integers(1, 12)).tolist(), str(rng.integers(2)))
        return state(cache)

    assert run() == run()


def test_a_pinned_run_may_be_split(cache):
    serve(cache, range(12))
    with cache.pin(range(12)):
        with cache.acquire([*range(4), 50]):  # ends after the first of its three pages
            cache.check()
        assert cache.stats().pinned == 3
        cache.check()
    cache.check()
    assert cache.evict(16) == 3


# --- a lease whose own published page is in the way -------------------------------------------------------------------


def published(num_pages):
    """A lease that published its open page, of 5 tokens in two pages of 4, and can go on in a copy of it only."""
    cache = radixkv.PrefixCache(num_pages, page_size=4)
    lease = cache.acquire([1, 2, 3, 4, 5])
    lease.advance()
    lease.commit()
    return cache, lease


def test_a_lease_takes_its_open_page_back_where_no_other_is_left():
    cache, lease = published(2)
    pages = lease.pages.tolist()
    assert cache.match([1, 2, 3, 4, 5]) == 5
    lease.extend([6])
    cache.check()
    assert (lease.pages.tolist(), lease.copies, lease.num_written) == (pages, [], 5)
    assert (cache.match([1, 2, 3, 4, 5]), cache.stats().evicted_pages) == (4, 1)
    lease.advance()
    lease.release()
    assert cache.match([1, 2, 3, 4, 5, 6]) == 6
    cache.check()


def test_it_takes_back_a_page_of_a_cleared_namespace_too():
    cache, lease = published(2)
    cache.clear()
    lease.extend([6])
    cache.check()
    lease.advance()
    lease.release()
    assert (cache.stats().free, cache.stats().evicted_pages) == (2, 0)


def test_not_while_another_request_has_yet_to_copy_from_it():
    cache, lease = published(3)
    other = cache.acquire([1, 2, 3, 4, 5, 6])
    before = state(cache)
    with pytest.raises(radixkv.PoolExhausted):
        lease.extend([7])
    assert state(cache) == before
    other.advance(0)  # the copy is made
    lease.extend([7])
    cache.check()


def test_not_while_it_is_pinned():
    cache, lease = published(3)
    with cache.pin([1, 2, 3, 4, 5]), cache.acquire([9]):
        before = state(cache)
        with pytest.raises(radixkv.PoolExhausted):
            lease.extend([7])
        assert state(cache) == before
    lease.extend([7])
    cache.check()


def test_not_while_anything_else_can_be_evicted():
    cache = radixkv.PrefixCache(num_pages=3, page_size=4)
    serve(cache, [9])
    lease = cache.acquire([1, 2, 3, 4, 5])
    lease.advance()
    lease.commit()
    lease.extend([6])
    assert (cache.match([9]), cache.match([1, 2, 3, 4, 5])) == (0, 5)
    assert [tokens for _, _, tokens in lease.copies] == [1]


def test_what_does_not_fit_even_so_changes_nothing():
    cache, lease = published(2)
    before = state(cache)
    for tokens in (range(6, 11), range(6, 10)):
        with pytest.raises(radixkv.PoolExhausted):
            lease.extend(tokens)
        assert state(cache) == before


# --- misuse -----------------------------------------------------------------------------------------------------------

BAD_TOKENS = {
    "empty": [],
    "negative": [1, -5],
    "too large": [2**31],
    "much too large": [2**80],
    "float in a list": [1.5],
    "text in a list": ["a"],
    "text": "abc",
    "bytes": b"abc",
    "none": None,
    "a number": 5,
    "2-D": np.zeros((2, 2), np.int32),
    "float array": np.zeros(3, np.float32),
    "int16 array": np.zeros(3, np.int16),
    "negative array": np.array([3, -1], np.int32),
    "negative int64 array": np.array([3, -1], np.int64),
    "large int64 array": np.array([2**31], np.int64),
}


@pytest.mark.parametrize("tokens", BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_bad_tokens(cache, tokens):
    serve(cache, [1, 2, 3, 4, 5])
    before = state(cache)
    with pytest.raises(radixkv.InvalidTokens, match="token"):
        cache.acquire(tokens)
    assert state(cache) == before
    lease = cache.acquire([1, 2, 3])
    before = state(cache)
    if tokens is not BAD_TOKENS["empty"]:
        with pytest.raises(radixkv.InvalidTokens):
            lease.extend(tokens)
        with pytest.raises(radixkv.InvalidTokens):
            cache.match(tokens)
    assert state(cache) == before
    assert lease.tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("num_pages", "page_size"), [(0, 16), (-1, 16), (16, 0), (2.5, 16), ("8", 16), (True, 16), (2**27, 16), (None, 1)]
)
def test_bad_sizes(num_pages, page_size):
    with pytest.raises(radixkv.InvalidArgument, match="num_pages|page_size"):
        radixkv.PrefixCache(num_pages, page_size)


def test_a_prompt_longer_than_the_pool(cache):
    before = state(cache)
    with pytest.raises(radixkv.PoolExhausted, match="need 17 pages for 65 tokens; the whole pool has 16 pages of 4"):
        cache.acquire(range(65))
    assert state(cache) == before
    lease = cache.acquire([1])
    with pytest.raises(radixkv.PoolExhausted, match="shorten the request or raise num_pages"):
        lease.extend(range(64))
    assert lease.num_tokens == 1


def test_exhaustion_names_the_numbers(cache):
    held = cache.acquire(range(44))
    serve(cache, [100, 101, 102, 103])
    before = state(cache)
    with pytest.raises(radixkv.PoolExhausted, match="need 6 pages; 4 free, 1 evictable, 11 leased or pinned: release"):
        cache.acquire(range(200, 224))
    assert state(cache) == before
    with pytest.raises(radixkv.PoolExhausted) as raised:
        cache.acquire([100, 101, 102, 103, *range(200, 220)])
    error = raised.value
    assert (error.needed, error.free, error.evictable, error.cached) == (5, 4, 0, 4)
    with pytest.raises(MemoryError):
        cache.acquire(range(200, 224))
    held.release()
    cache.acquire(range(200, 224)).release()


def test_use_after_release(cache):
    lease = cache.acquire([1, 2, 3])
    lease.release()
    before = state(cache)
    uses = [
        lambda: lease.release(),
        lambda: lease.extend([1]),
        lambda: lease.advance(),
        lambda: lease.commit(),
        lambda: lease.truncate(2),
        lambda: lease.fork(),
        lambda: lease.adopt(),
        lambda: lease.pages,
        lambda: lease.tokens,
        lambda: lease.copies,
        lambda: lease.num_tokens,
        lambda: step_over(cache, [lease]).__enter__(),
    ]
    for use in uses:
        with pytest.raises(radixkv.LeaseError, match="released"):
            use()
    assert state(cache) == before


def test_advance_and_fork_against_the_contract(cache):
    lease = cache.acquire([1, 2, 3])
    with pytest.raises(radixkv.InvalidArgument, match="advance by 4: only 3 of 3 tokens are unwritten"):
        lease.advance(4)
    with pytest.raises(radixkv.InvalidArgument, match="advance by -1"):
        lease.advance(-1)
    with pytest.raises(radixkv.LeaseError, match="0 of 3 are written"):
        lease.fork()
    lease.advance(1)
    assert lease.num_written == 1


def test_a_closed_cache_takes_nothing_new():
    with radixkv.PrefixCache(4, 4) as cache:
        lease = cache.acquire([1, 2])
    for use in (lambda: cache.acquire([1]), lambda: cache.match([1]), lambda: lease.extend([3]), cache.clear):
        with pytest.raises(radixkv.LeaseError, match="closed"):
            use()
    lease.release()
    cache.check()


def test_page_table_misuse(cache):
    lease, other = cache.acquire([1, 2, 3]), radixkv.PrefixCache(4, 4).acquire([1])
    written = cache.acquire([9])
    written.advance()
    for leases, message in (
        ([], "at least one lease"),
        ([lease, lease], "listed twice"),
        ([lease, other], "another cache"),
        ([written], "nothing to compute"),
        ([None], "takes leases"),
        (lease, "takes a list of leases; got radixkv._core.Lease"),
    ):
        with pytest.raises(radixkv.InvalidArgument, match=message):
            step_over(cache, leases).__enter__()
    table = radixkv._core.PageTable(cache)
    with step_over(cache, [lease], table):
        assert table.positions.tolist() == [0, 1, 2]


def test_page_table_of_a_mixed_batch(cache):
    serve(cache, list(range(8)))
    extend, decode, prefill = cache.acquire([*list(range(8)), 50, 51]), cache.acquire([20, 21, 22]), cache.acquire([30])
    decode.advance(2)
    table = radixkv._core.PageTable(cache)
    step = step_over(cache, [extend, decode, prefill], table)
    step.__enter__()
    assert table.qo_indptr.tolist() == [0, 2, 3, 4]
    assert table.kv_indptr.tolist() == [0, 3, 4, 5]
    assert table.kv_indices.tolist() == [*extend.pages, *decode.pages, *prefill.pages]
    assert table.kv_last_page_len.tolist() == [2, 3, 1]
    assert table.input_ids.tolist() == [50, 51, 22, 30]
    assert table.positions.tolist() == [8, 9, 2, 0]
    assert table.last_rows.tolist() == [1, 2, 3]
    pages = [extend.pages[2], extend.pages[2], decode.pages[0], prefill.pages[0]]
    assert table.slots.tolist() == [int(p) * 4 + o for p, o in zip(pages, (0, 1, 2, 0), strict=True)]


# --- the end of a session ---------------------------------------------------------------------------------------------


def session(cache, tokens, cold):
    lease = cache.acquire(tokens)
    lease.advance()
    lease.release(cold=cold)


def test_what_an_ended_session_left_goes_first():
    cache = radixkv.PrefixCache(num_pages=12, page_size=4)
    system = list(range(8))
    session(cache, [*system, *range(100, 108)], cold=False)
    session(cache, [*system, *range(200, 210)], cold=True)  # newer, but over: two pages and an open one
    session(cache, [*system, *range(300, 304)], cold=False)
    assert cache.evict(3) == 3
    assert cache.match([*system, *range(200, 210)]) == 8
    assert cache.match([*system, *range(100, 108)]) == 16
    cache.check()


def test_the_end_of_an_ended_path_goes_before_its_beginning(cache):
    session(cache, list(range(16)), cold=True)
    session(cache, [9, 9, 9, 9], cold=False)
    for left in (12, 8, 4, 0):
        assert cache.evict(1) == 1
        assert cache.match(list(range(16))) == left
    assert cache.match([9, 9, 9, 9]) == 4


def test_of_ended_sessions_the_one_that_ended_first_goes_first(cache):
    session(cache, [1] * 4, cold=True)
    session(cache, [2] * 4, cold=True)
    cache.evict(1)
    assert (cache.match([1] * 4), cache.match([2] * 4)) == (0, 4)


def test_a_beginning_that_sessions_shared_is_never_one_session_s_own():
    """Even when all the others are gone: the next one will begin with it as well."""
    cache = radixkv.PrefixCache(num_pages=16, page_size=4)
    system = list(range(8))
    session(cache, [*system, *range(100, 108)], cold=True)
    session(cache, [*system, *range(200, 208)], cold=False)
    cache.evict(2)
    session(cache, [*system, *range(200, 208)], cold=True)
    session(cache, [5] * 4, cold=False)
    assert cache.evict(3) == 3
    assert cache.match(system) == 4  # the third page evicted is the coldest of all: the end of the system prompt
    assert cache.match([5] * 4) == 4


def test_who_uses_what_an_ended_session_left_renews_it(cache):
    session(cache, list(range(8)), cold=True)
    session(cache, [9] * 4, cold=False)
    session(cache, [*range(8), 50], cold=False)
    cache.evict(1)
    assert (cache.match([9] * 4), cache.match(list(range(8)))) == (0, 8)


def test_an_end_tells_nothing_of_pages_that_others_have(cache):
    with cache.acquire(list(range(8))) as other:
        other.advance()
        other.commit()
        session(cache, list(range(8)), cold=True)  # the same request: the other still goes on with these pages
        session(cache, [9] * 4, cold=False)
    cache.evict(1)
    assert (cache.match([9] * 4), cache.match(list(range(8)))) == (0, 8)


@pytest.mark.parametrize("commit", [True, False])
def test_an_end_needs_no_commit(cache, commit):
    session(cache, list(range(8)), cold=False)
    session(cache, [9] * 4, cold=False)
    cache.acquire([*range(8), 50]).release(commit=commit, cold=True)
    cache.evict(1)
    assert (cache.match([9] * 4), cache.match(list(range(8)))) == (4, 4)


def test_an_end_in_a_cleared_namespace_is_an_end(cache):
    lease = cache.acquire(list(range(8)))
    lease.advance()
    lease.commit()
    cache.clear()
    lease.release(cold=True)
    assert cache.stats().free == cache.num_pages


def test_an_end_inside_a_page_that_others_filled_tells_nothing_of_it(cache):
    session(cache, list(range(8)), cold=False)
    session(cache, [9] * 4, cold=False)
    session(cache, list(range(6)), cold=True)  # its open page is the beginning of another session's
    cache.evict(1)
    assert (cache.match([9] * 4), cache.match(list(range(8)))) == (0, 8)


def test_what_waits_to_be_copied_is_not_published_by_who_never_copied_it():
    """The page that it was to come from left the tree meanwhile, so nobody else has these tokens."""
    cache = radixkv.PrefixCache(4, 4)
    serve(cache, [1, 2, 3, 4, 5, 6])
    lease = cache.acquire([1, 2, 3, 4, 5, 9])
    assert [tokens for _, _, tokens in lease.copies] == [1]
    cache.evict(4)
    lease.commit()
    lease.release()
    cache.check()
    assert cache.match([1, 2, 3, 4, 5]) == 4
