"""Page keys against hashlib, and the bytes of a record."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

import radixkv
from radixkv import _core
from radixkv.journal import STORED
from radixkv.tiers.record import Layout

SECRET, TAG = b"s" * 32, b"t" * 16


@pytest.mark.parametrize("page_size", [1, 3, 16, 28, 29, 64, 300])
@pytest.mark.parametrize("secret", [b"k", SECRET, b"x" * 64], ids=len)
def test_a_key_is_the_keyed_blake2b_of_the_tokens_and_of_the_key_before(page_size, secret):
    tokens = np.random.default_rng(page_size).integers(0, 2**31, 7 * page_size + page_size // 2, dtype=np.int32)
    keys, before = _core.page_keys(tokens, page_size, secret, TAG), TAG
    assert len(keys) == len(tokens) // page_size
    for i, key in enumerate(keys):
        page = tokens[i * page_size : (i + 1) * page_size].tobytes()
        before = hashlib.blake2b(before + page, key=secret, digest_size=16).digest()
        assert key == before
    assert _core.page_keys(tokens[2 * page_size :].tolist(), page_size, secret, keys[1]) == keys[2:]


def test_what_makes_no_key():
    for tokens, page_size, secret, parent in [([1], 0, SECRET, TAG), ([1], 1, b"", TAG), ([1], 1, b"x" * 65, TAG),
                                              ([1], 1, SECRET, b"t"), ([1], True, SECRET, TAG)]:  # fmt: skip
        with pytest.raises(radixkv.InvalidArgument):
            _core.page_keys(tokens, page_size, secret, parent)
    with pytest.raises(radixkv.InvalidTokens):
        _core.page_keys("abc", 1, SECRET, TAG)


def test_a_record_has_the_same_bytes_as_ever():
    """What lies on disks was sealed so."""
    layout = Layout(100, 4, bytes(range(32)))
    memory = np.zeros(layout.stride, np.uint8)
    memory[:100] = np.arange(100)
    layout.seal(memory, b"k" * 16, b"p" * 16)
    assert memory[-64:].tobytes() == (
        b"RKVPAGE1" + bytes.fromhex("6400000004000000") + b"k" * 16 + b"p" * 16 + bytes(8)
        + bytes.fromhex("63c03184eab9b2a3")
    )  # fmt: skip
    assert layout.intact(memory, b"k" * 16, b"p" * 16)
    for at in (0, 99, 100, 4095):
        damaged = memory.copy()
        damaged[at] ^= 1
        assert not layout.intact(damaged, b"k" * 16, b"p" * 16)


def test_a_page_is_still_what_was_published_until_it_leaves_the_tree():
    cache = radixkv.PrefixCache(2, 4)
    journal = cache.journal()
    for tokens in ([1, 2, 3, 4], [5, 6, 7, 8]):
        with cache.acquire(tokens) as lease:
            lease.advance()
    batch = journal.read(0)
    stored = [i for i, op in enumerate(batch.op) if op == STORED]
    pages = batch.page[stored].tolist()
    assert journal.still(pages, stored) == [True, True]
    assert journal.still(pages, stored[::-1]) == [False, False]
    with cache.acquire([9, 9, 9, 9]) as lease:
        assert journal.still(pages, stored) == [False, True]
        lease.advance()
    assert journal.still(pages, stored) == [False, True]  # the page is back, with other tokens
    for wrong in ([2], [-1]):
        with pytest.raises(radixkv.InvalidArgument, match="page"):
            journal.still(wrong, [0])
    with pytest.raises(radixkv.InvalidArgument, match="as many"):
        journal.still([0], [])


def test_the_order_of_eviction_can_be_seen():
    cache = radixkv.PrefixCache(8, 2)
    for tokens in ([1, 2], [3, 4], [1, 2, 5, 6]):
        with cache.acquire(tokens) as lease:
            lease.advance()
    order = cache._coldest_first().tolist()
    nodes = {tuple(n["tokens"].tolist()): int(n["pages"][-1]) for n in cache.snapshot()[0]["children"]}
    assert order[0] == nodes[3, 4]
    assert len(order) == 2
