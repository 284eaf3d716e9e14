"""Tokens taken back: what leaves a lease, what must stay, and that nothing of it is found or recorded afterwards."""

from __future__ import annotations

import pytest

import radixkv
from tests.cache.test_cache import serve, state


@pytest.fixture
def cache():
    cache = radixkv.PrefixCache(num_pages=16, page_size=4)
    yield cache
    cache.check()


def test_pages_of_tokens_taken_back_are_free_and_the_lease_goes_on(cache):
    lease = cache.acquire(range(5))
    lease.advance()
    lease.extend(range(100, 109))
    lease.advance(6)
    assert (cache.stats().private, lease.num_written) == (4, 11)
    assert lease.truncate(7) == 2
    assert (lease.num_tokens, lease.num_written, lease.num_prompt) == (7, 7, 5)
    assert lease.tokens.tolist() == [0, 1, 2, 3, 4, 100, 101]
    assert (cache.stats().free, cache.stats().private) == (14, 2)
    lease.extend([7, 8])
    lease.advance()
    lease.release()
    assert cache.match([0, 1, 2, 3, 4, 100, 101, 7, 8]) == 9
    assert cache.match([0, 1, 2, 3, 4, 100, 101, 102]) == 7  # what was taken back is not found


def test_freed_pages_come_back_in_their_order(cache):
    lease = cache.acquire(range(3))
    lease.extend(range(20))
    pages = lease.pages.tolist()
    assert lease.truncate(3) == 5
    lease.extend(range(20))
    assert lease.pages.tolist() == pages


def test_unwritten_tokens_are_taken_back_first(cache):
    lease = cache.acquire(range(8))
    lease.advance(5)
    assert lease.truncate(6) == 0
    assert (lease.num_tokens, lease.num_written) == (6, 5)
    assert lease.truncate(6) == 0
    lease.advance()
    assert lease.num_written == 6


def test_what_is_published_stays(cache):
    lease = cache.acquire(range(10))
    lease.advance()
    lease.commit()  # two pages, and two tokens of an open one
    before = state(cache), lease.tokens.tolist()
    for n in (9, 8, 1, 0):
        with pytest.raises(radixkv.InvalidArgument, match=f"truncate to {n} tokens: the first 10 .*published.*release"):
            lease.truncate(n)
    assert (state(cache), lease.tokens.tolist()) == before
    lease.extend([50, 51, 52])  # in a copy of the open page, which is not made yet
    with pytest.raises(radixkv.InvalidArgument, match="the first 10 "):
        lease.truncate(9)
    lease.truncate(10)
    lease.extend([50, 51, 52])
    lease.advance()
    lease.truncate(9)  # of its own copy
    with pytest.raises(radixkv.InvalidArgument, match="the first 8 "):
        lease.truncate(7)
    lease.release()
    assert cache.match(range(10)) == 10


def test_what_was_found_stays(cache):
    serve(cache, list(range(6)))
    lease = cache.acquire([0, 1, 2, 3, 4, 5, 60, 61])
    with pytest.raises(radixkv.InvalidArgument, match="truncate to 5 tokens: the first 6 were found in the cache"):
        lease.truncate(5)
    assert lease.truncate(6) == 0
    assert lease.copies
    assert lease.num_prompt == 6
    lease.extend([7])
    lease.advance()
    lease.release()
    assert cache.match([0, 1, 2, 3, 4, 5, 7]) == 7


def test_what_was_dropped_stays(cache):
    lease = cache.acquire(range(10))
    lease.advance()
    lease.drop(8)
    with pytest.raises(radixkv.InvalidArgument, match="the first 8 "):
        lease.truncate(7)
    assert lease.truncate(8) == 1
    lease.extend([9])
    lease.advance()
    lease.release()


def test_a_fork_takes_back_only_its_own(cache):
    parent = cache.acquire(range(6))
    parent.advance()
    child = parent.fork()
    child.extend(range(40, 50))
    child.advance()
    with pytest.raises(radixkv.InvalidArgument, match="the first 6 "):
        child.truncate(5)
    child.truncate(6)
    child.extend([7])
    child.advance()
    assert parent.tokens.tolist() == list(range(6))
    child.release()
    parent.release()
    assert cache.match([*range(6), 7]) == 7


def test_longer_than_it_is(cache):
    lease = cache.acquire(range(6))
    with pytest.raises(radixkv.InvalidArgument, match="truncate to 7 tokens: the lease has 6; extend"):
        lease.truncate(7)


def test_a_lease_keeps_one_token(cache):
    lease = cache.acquire(range(6))
    with pytest.raises(radixkv.InvalidArgument, match="the first 1 "):
        lease.truncate(0)
    assert lease.truncate(1) == 1
    assert lease.num_prompt == 1


def test_the_journal_has_what_was_kept(cache):
    journal = cache.journal()
    lease = cache.acquire(range(8))
    lease.advance()
    lease.extend(range(80, 88))
    lease.advance()
    lease.truncate(9)
    lease.release()
    ((release,), _, _) = journal.releases(0)
    assert release.tokens.tolist() == [*range(8), 80]
    assert release.num_prompt == 8
