"""Hierarchical namespaces over tiers: "a/b" is given what "a" published and then its own; no other sees either."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest

import radixkv
from radixkv.tiers import TierOptions
from radixkv.tiers.inspect import holdings, verify
from tests.tiers.pool import PAGE_SIZE, Pool
from tests.tiers.test_snapshot import published, right, traffic

SYSTEM = list(range(100, 120))  # 5 pages, all of them found where more follows
OURS = [*SYSTEM, *range(200, 212), 1]  # 3 more


def family(tmp_path, **options):
    options = {"disk_capacity": "1MiB", **options}  # the whole of it is allocated at once
    return Pool(TierOptions(disk=tmp_path / "d", threads=0, **options), hierarchical=True)


def stored(tmp_path, **options):
    """ "a" published the system prompt and "a/b" three pages after it; then the process ended."""
    pool = family(tmp_path, **options)
    pool.serve([*SYSTEM, 1], "a")
    pool.serve(OURS, "a/b")
    pool.close()


def pages_of(pool, namespace):
    known = pool.cache.namespaces()
    return known[namespace].pages if namespace in known else 0


@pytest.mark.parametrize("ram", ["1MiB", 2 * 4096, 3 * 4096])
def test_what_a_restart_leaves_to_each(tmp_path, ram):
    stored(tmp_path)
    for namespace, gained in {"a/b": 32, "a": 20, "a/c": 20, "a/b/c": 32, "b": 0, "": 0, "a/": 20, "ab": 0}.items():
        pool = family(tmp_path, write="none", ram=ram)
        most = 4 * (pool.tiers.hub.num_slots if gained else 0)  # a small hub brings less
        assert pool.serve(OURS, namespace) == min(gained, most), namespace
        pool.close()


def test_what_is_restored_is_again_of_who_had_published_it(tmp_path):
    stored(tmp_path)
    pool = family(tmp_path)
    assert pool.serve(OURS, "a/b") == 32
    assert (pages_of(pool, "a"), pages_of(pool, "a/b")) == (5, 4)  # "a/b" has an open page, too
    assert pool.cache.match(OURS, "a/b") == 33
    for other in ("a", "a/c"):
        assert pool.cache.match(OURS, other) == 20  # without a look at the disk
    assert pool.cache.match(OURS, "b") == 0
    pool.tiers.pump()
    assert len(pool.tiers.disk) == 8  # nothing was stored twice
    pool.close()


def test_pages_after_those_that_the_pool_has(tmp_path):
    """The pool has three pages of "a/b", so what follows is published as of "a/b", whoever it was of."""
    stored(tmp_path)
    pool = family(tmp_path, write="none")
    with pool.cache.acquire(SYSTEM[:13], "a/b") as lease:
        pool.compute(lease)
    pool.cache.evict(1)
    assert pool.serve(OURS, "a/b") == 20
    assert (pages_of(pool, "a"), pages_of(pool, "a/b")) == (0, 9)
    assert pool.cache.match(OURS, "a") == 0
    pool.close()


def test_what_a_lease_computed_before_it_is_filled_stays_its_own(tmp_path):
    """ "a/b" computes two pages while those of "a" are on their way: "a" never gets what it computed."""
    stored(tmp_path)
    pool = family(tmp_path, write="none")
    fetch = pool.tiers.fetch(OURS, "a/b")
    pool.tiers.pump()
    with pool.cache.acquire(OURS[:9], "a/b") as lease:
        pool.compute(lease)
        lease.extend(OURS[9:])
        assert pool.tiers.fill(lease, fetch) == 23
        pool.verify(lease)
        assert (pages_of(pool, "a"), pages_of(pool, "a/b")) == (0, 9)  # all after its own, with the open page
    assert pool.cache.match(OURS, "a") == pool.cache.match(OURS, "a/c") == 0
    assert pool.cache.match(OURS, "a/b") == 32
    pool.close()


def test_a_page_that_two_namespaces_published(tmp_path):
    """ "a/b" first, alone; then "a" as far as five pages: each finds the longest that it sees."""
    pool = family(tmp_path)
    pool.serve(OURS, "a/b")
    pool.serve([*SYSTEM, 1], "a")
    pool.tiers.pump()
    assert len(pool.tiers.disk) == 13
    pool.close()
    for namespace, gained in {"a": 20, "a/b": 32, "a/c": 20}.items():
        pool = family(tmp_path, write="none")
        assert pool.serve(OURS, namespace) == gained
        assert pages_of(pool, "a") == (9 if namespace == "a" else 5)  # which computed the rest itself
        pool.close()


@pytest.mark.parametrize("again", [False, True], ids=["at once", "after a restart"])
@pytest.mark.parametrize(
    ("cleared", "left"),
    [("a", {}), ("a/b", {"a": 20, "a/b": 20}), ("a/c", {"a": 20, "a/b": 32}), ("b", {"a": 20, "a/b": 32}), (None, {})],
)
def test_clear_reaches_what_is_below_and_nothing_above(tmp_path, cleared, left, again):
    stored(tmp_path)
    pool = family(tmp_path, write="none")
    pool.tiers.clear(cleared)
    for namespace in ("a", "a/b"):
        if again:
            pool.close()
            pool = family(tmp_path, write="none")
        assert pool.serve(OURS, namespace) == left.get(namespace, 0)
        pool.cache.evict(100)
    pool.close()


def test_a_fetch_from_before_a_clear_above_fills_nothing(tmp_path):
    stored(tmp_path)
    pool = family(tmp_path)
    fetch = pool.tiers.fetch(OURS, "a/b")
    pool.tiers.pump()
    assert fetch.tokens == 32
    pool.tiers.clear("a")
    with pool.cache.acquire(OURS, "a/b") as lease:
        assert pool.tiers.fill(lease, fetch) == 0
        pool.compute(lease)
    pool.close()


def test_requests_of_siblings_load_what_they_share_once(tmp_path):
    stored(tmp_path)
    pool = family(tmp_path, write="none")
    fetches = [pool.tiers.fetch(OURS, name) for name in ("a/b", "a/c", "a")]
    pool.tiers.pump()
    assert [fetch.tokens for fetch in fetches] == [32, 20, 20]
    assert pool.tiers.stats()["stores"]["disk"]["read"] == 8
    pool.close()


def test_pages_found_once_are_stored_as_whose_they_were(tmp_path):
    pool = family(tmp_path, write="second")
    pool.serve([*SYSTEM, 1], "a")
    pool.serve(OURS, "a/b")  # found five pages of "a"
    pool.tiers.pump()
    assert len(pool.tiers.disk) == 5
    pool.serve(OURS, "a/b")
    pool.tiers.pump()
    assert len(pool.tiers.disk) == 8
    pool.close()
    pool = family(tmp_path, write="none")
    assert pool.serve(OURS, "a/c") == 20
    pool.close()


def test_the_disk_drops_children_before_parents_of_a_namespace_above(tmp_path):
    capacity = 8 * 4096
    stored(tmp_path, disk_capacity=capacity)
    pool = family(tmp_path, disk_capacity=capacity)
    pool.serve([*range(8), 1], "c")
    pool.tiers.pump()
    pool.tiers.disk.check()
    pool.close()
    pool = family(tmp_path, disk_capacity=capacity, write="none")
    assert pool.serve(OURS, "a/b") == 24  # two pages of "a/b" went for those of "c"
    pool.close()


def test_every_record_is_whole_and_damage_is_a_miss(tmp_path):
    stored(tmp_path)
    (holding,) = holdings(tmp_path / "d")
    assert verify(holding) == []
    assert sorted(holding.namespaces.values()) == [3, 5]
    for at in range(0, 8 * 4096, 4096):
        shutil.copytree(tmp_path / "d", tmp_path / str(at) / "d")
        (data,) = (tmp_path / str(at)).rglob("pages-*.bin")
        whole = data.read_bytes()
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        pool = family(tmp_path / str(at), write="none")
        assert pool.serve(OURS, "a/b") < 32  # and verified, page by page
        assert pool.tiers.stats()["stores"]["disk"]["corrupt"] == 1
        pool.close()


@pytest.mark.parametrize("how", ["load", "tier"])
def test_a_snapshot_keeps_whose_pages_are(tmp_path, how):
    pool = Pool(hierarchical=True)
    pool.serve([*SYSTEM, 1], "a")
    pool.serve(OURS, "a/b")
    pool.tiers.save(tmp_path / "s")
    saved = published(pool.cache)
    for namespace, found in {"a": 20, "a/b": 32, "a/c": 20, "b": 0}.items():
        options = TierOptions(threads=0, snapshot=tmp_path / "s" if how == "tier" else None)
        pool = Pool(options, hierarchical=True)
        if how == "load":
            pool.tiers.load(tmp_path / "s")
            assert set(published(pool.cache)) == set(saved)
            right(pool)
            assert pool.cache.match(OURS[:-1], namespace) == found
        else:
            assert pool.serve(OURS, namespace) == found
        pool.close()


@pytest.mark.parametrize("seed", range(5))
def test_snapshots_of_any_traffic(tmp_path, seed):
    pool = Pool(hierarchical=True)
    traffic(pool, seed, names=["a", "a", "a/b", "a/c", "a/b/d"])
    pool.tiers.save(tmp_path / "s")
    saved = published(pool.cache)
    other = Pool(hierarchical=True)
    other.tiers.load(tmp_path / "s")
    right(other)
    other.cache.check()
    loaded = set(published(other.cache))
    for name, tokens in saved:  # what two of a family had is there once, of the upper one
        assert (name, tokens) in loaded or any((above, tokens) in loaded for above in ("a", "a/b")), (name, tokens)
        assert other.cache.match(tokens, name) == len(tokens)
    assert loaded <= set(saved)


def test_a_snapshot_of_a_family_needs_a_hierarchical_cache(tmp_path):
    pool = Pool(hierarchical=True)
    pool.serve([*SYSTEM, 1], "a")
    pool.serve(OURS, "a/b")
    pool.tiers.save(tmp_path / "s")
    flat = Pool()
    with pytest.raises(radixkv.InvalidArgument, match="hierarchical=True"):
        flat.tiers.load(tmp_path / "s")
    assert flat.cache.stats().free == flat.num_pages
    tier = Pool(TierOptions(threads=0, snapshot=tmp_path / "s"))
    assert tier.serve(OURS, "a/b") == 0
    assert tier.serve(OURS, "a") == 20


@pytest.mark.parametrize("seed", range(8))
def test_any_traffic_and_restarts_against_a_list_of_what_was_stored(tmp_path, seed):
    """A request gets the longest prefix whose every page somebody stored that it sees; each page with right bytes."""
    rng = random.Random(seed)
    names = ["a", "a", "a/b", "a/c", "a/b/d", "b", "b/b"]
    have: set[tuple[str, tuple[int, ...]]] = set()
    said = [[0]]
    for _ in range(12):
        pool = family(tmp_path, ram="1MiB")
        for _ in range(rng.randint(1, 6)):
            old = rng.choice(said)
            tokens = old[: rng.randint(0, len(old))] + [rng.randrange(2) for _ in range(rng.randint(1, 12))]
            said.append(tokens)
            name = rng.choice(names)
            seen = [n for n in names if f"{name}/".startswith(f"{n}/")]
            begin, full = pool.cache.match(tokens, name) // PAGE_SIZE, (len(tokens) - 1) // PAGE_SIZE
            pages = [tuple(tokens[: (i + 1) * PAGE_SIZE]) for i in range(full)]
            end = next((i for i in range(begin, full) if not any((n, pages[i]) in have for n in seen)), full)
            found = pool.cache.match(tokens[:-1], name)
            assert pool.serve(tokens, name) == max(0, max(begin, end) * PAGE_SIZE - max(found, begin * PAGE_SIZE))
            pool.tiers.pump()
            have |= {(n, t) for n, t in published(pool.cache) if len(t) % PAGE_SIZE == 0}
            if rng.random() < 0.3:
                pool.cache.evict(rng.randint(1, 20))
        pool.close()


def test_a_top_namespace_has_the_keys_it_ever_had():
    """What a cache without hierarchy stored in "a" is found by one with it, and the other way round."""
    flat, tall = Pool().tiers._keys, Pool(hierarchical=True).tiers._keys
    flat._key = tall._key
    assert flat.seen(OURS, "a") == tall.seen(OURS, "a")
    assert flat.seen(OURS, "a/b")[0].keys[0] not in [key for seen in tall.seen(OURS, "a/b") for key in seen.keys]
    assert len({key for seen in tall.seen(OURS, "a/b/c") for key in seen.keys}) == 3 * 8


def test_what_a_lease_commits_as():
    cache = radixkv.PrefixCache(16, 4, hierarchical=True)
    for known in ("a/c", "b", "a/b/c"):
        with cache.acquire([1], known) as lease:
            lease.advance()
    with cache.acquire(np.arange(10), "a/b") as lease:
        lease.advance(9)
        for wrong in ("a/c", "b", "a/b/c", "", "new"):
            with pytest.raises(radixkv.InvalidArgument, match="does not see"):
                lease._commit_as(wrong)
        lease._commit_as("a")
        cache.check()
        assert cache.match(np.arange(10), "a") == 8  # full pages only
    assert cache.match(np.arange(10), "a/b") == 9
    with pytest.raises(radixkv.LeaseError):
        lease._commit_as("a")
