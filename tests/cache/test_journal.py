"""The journal: replaying it gives the tree; readers that come late are told; releases carry all tokens."""

from __future__ import annotations

import contextlib
import gc

import numpy as np
import pytest

import radixkv
from radixkv.journal import NAMESPACE, STORED
from tests.cache.journal_shadow import Shadow
from tests.cache.test_cache import serve, state


def full_pages(cache):
    """{page: its namespace, the tokens up to its end} of the full pages of a tree."""
    found, size = {}, cache.page_size
    nodes = [(root["namespace"], (), child) for root in cache.snapshot() for child in root["children"]]
    while nodes:
        namespace, prefix, node = nodes.pop()
        tokens = (*prefix, *node["tokens"].tolist())
        for i, page in enumerate(node["pages"].tolist()):
            end = len(prefix) + (i + 1) * size
            if end <= len(tokens):
                found[page] = namespace, tokens[:end]
        nodes += [(namespace, tokens, child) for child in node["children"]]
    return found


def random_traffic(cache, rng, steps):
    """Requests over a few shared prefixes, some alive at a time, with forks, pins, evictions and clears."""
    live, pins = [], []
    for _ in range(steps):
        tokens, namespace = rng.integers(0, 2, int(rng.integers(1, 24))).tolist(), str(rng.integers(2))
        with contextlib.suppress(radixkv.PoolExhausted):
            live.append(cache.acquire(tokens, namespace))
        if live and rng.random() < 0.7:
            lease = live.pop(int(rng.integers(len(live))))
            lease.advance()
            if rng.random() < 0.3:
                lease.commit()
            if rng.random() < 0.2:
                pins.append(lease)
            lease.release(bool(rng.random() < 0.9))
        if rng.random() < 0.1:
            cache.evict(int(rng.integers(4)))
        if rng.random() < 0.03:
            cache.clear(namespace if rng.random() < 0.5 else None)
        yield
    for lease in live:
        lease.release()
    yield


@pytest.mark.parametrize("page_size", [1, 3, 4])
def test_replaying_the_journal_gives_the_tree(page_size):
    cache = radixkv.PrefixCache(24, page_size)
    shadow = Shadow(cache.journal())
    rng = np.random.default_rng(page_size)
    for _ in random_traffic(cache, rng, 400):
        shadow.catch_up(limit=int(rng.integers(1, 9)))
        assert shadow.pages == full_pages(cache)
        cache.check()
    assert shadow.cursor > 400


def test_a_journal_begins_with_what_is_there_and_a_dump_is_the_same():
    cache = radixkv.PrefixCache(32, 4)
    rng = np.random.default_rng(0)
    for _ in random_traffic(cache, rng, 60):
        pass
    serve(cache, list(range(9)), "a")
    serve(cache, [*range(4), 9, 9, 9, 9, 9], "a")
    journal = cache.journal()
    shadow, dumped = Shadow(journal), Shadow(journal)
    shadow.catch_up()
    dump = journal.dump()
    dumped.apply(dump)
    assert shadow.pages == dumped.pages == full_pages(cache)
    assert len(shadow.pages) >= 3
    dumped.cursor = dump.cursor
    serve(cache, [5] * 8, "b")
    dumped.catch_up()
    assert dumped.pages == full_pages(cache)


def test_recording_changes_no_decision():
    def run(journal):
        cache = radixkv.PrefixCache(24, 2)
        if journal:
            cache.journal()
        for _ in random_traffic(cache, np.random.default_rng(5), 300):
            pass
        return state(cache)

    assert run(True) == run(False)


def test_a_reader_that_comes_too_late_is_told():
    cache = radixkv.PrefixCache(2, 1)
    journal = cache.journal()
    for token in range(20):
        serve(cache, [token])
    batch = journal.read(0)
    assert batch.lost
    assert len(batch.op) == 4 * cache.num_pages
    assert batch.cursor == journal.end
    assert not journal.read(batch.cursor).lost
    assert len(journal.read(10**12).op) == 0


def test_releases_carry_all_tokens_in_order():
    cache = radixkv.PrefixCache(16, 4)
    serve(cache, [8, 8, 8])  # before anybody asked
    journal = cache.journal()
    lease = cache.acquire(list(range(9)), "tenant")
    lease.advance()
    lease.drop(8)
    lease.extend([9, 10])
    lease.release(False)
    dropped = cache.acquire([1, 2])
    del dropped
    gc.collect()
    found, cursor, lost = journal.releases(0)
    assert [(r.namespace, r.num_prompt, r.tokens.tolist()) for r in found] == [
        ("tenant", 9, list(range(11))),
        ("", 2, [1, 2]),
    ]
    assert (cursor, lost) == (2, 0) == (journal.releases_end, 0)
    assert journal.releases(1, 1)[0][0].tokens.tolist() == [1, 2]
    assert journal.releases(2) == ([], 2, 0)


def test_releases_are_bounded_by_their_tokens():
    cache = radixkv.PrefixCache(1 << 16, 16)
    journal = cache.journal()
    prompt = np.arange(1 << 20, dtype=np.int32)
    for _ in range(6):
        cache.acquire(prompt).release(False)
    found, cursor, lost = journal.releases(0)
    assert (len(found), cursor, lost) == (4, 6, 2)


@pytest.mark.parametrize("arguments", [(-1,), (0, -1), ("0",), (None,), (2**70,), (True,)], ids=str)
def test_what_is_no_number(arguments):
    journal = radixkv.PrefixCache(4, 4).journal()
    for read in (journal.read, journal.releases):
        with pytest.raises(radixkv.InvalidArgument, match="cursor|limit"):
            read(*arguments)


def test_a_closed_cache_starts_no_journal_and_ends_none():
    cache = radixkv.PrefixCache(4, 4)
    journal = cache.journal()
    lease = cache.acquire([1, 2, 3, 4])
    lease.advance()
    cache.close()
    lease.release()
    assert journal.read(0).op.tolist() == [NAMESPACE, STORED]
    with pytest.raises(radixkv.LeaseError, match="closed"):
        cache.journal()
