"""Ids of contents: the same picture is found again, another never is."""

import hashlib

import numpy as np
import pytest

import radixkv
from radixkv import content_tokens
from radixkv.content import FIRST_CONTENT_TOKEN

ONE, OTHER = (hashlib.sha256(picture).digest() for picture in (b"a cat", b"a dog"))


def test_ids_follow_from_the_digest_alone():
    ids = content_tokens(ONE, 9)
    assert ids.dtype == np.int32
    assert ids.tolist() == content_tokens(ONE, 9).tolist()
    assert ids.tolist()[:4] == content_tokens(ONE, 4).tolist() == [1104238928, 1931023119, 1666493309, 1922069922]
    assert not set(ids.tolist()) & set(content_tokens(OTHER, 9).tolist())


def test_ids_lie_above_every_vocabulary():
    ids = content_tokens(ONE, 5000)
    assert ids.min() >= FIRST_CONTENT_TOKEN
    assert len(set(ids.tolist())) > 4990
    assert (np.bincount((ids - FIRST_CONTENT_TOKEN) // 2**28) > 1100).all()


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_another_picture_is_never_found(page_size):
    cache = radixkv.PrefixCache(num_pages=256 // page_size, page_size=page_size)
    before, after = [5, 6, 7], [8, 9]
    prompt = [*before, *content_tokens(ONE, 20), *after]
    with cache.acquire(prompt) as lease:
        lease.advance()
    assert cache.match(prompt) == len(prompt)
    assert cache.match([*before, *content_tokens(OTHER, 20), *after]) == 3
    assert cache.match([*before, *content_tokens(ONE, 20), 1]) == 23
    with cache.pin(prompt[:23]):
        assert cache.stats().protected >= 23 // page_size


@pytest.mark.parametrize(
    ("digest", "count", "error", "message"),
    [
        (b"short", 3, radixkv.InvalidArgument, "digest is 5 bytes: give at least 16 bytes"),
        ("a" * 32, 3, radixkv.InvalidArgument, "digest is str: give at least 16 bytes"),
        (ONE, 0, radixkv.InvalidTokens, "count is 0"),
        (ONE, True, radixkv.InvalidTokens, "count is True"),
        (ONE, 1.5, radixkv.InvalidTokens, "count is 1.5"),
    ],
)
def test_what_makes_no_ids(digest, count, error, message):
    with pytest.raises(error, match=message):
        content_tokens(digest, count)
