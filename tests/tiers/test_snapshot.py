"""Snapshots: the whole tree comes back, page for page and in its order of eviction; nothing wrong ever does."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest

import radixkv
from radixkv.tiers import TierOptions
from tests.tiers.pool import IDENTITY, PAGE_BYTES, Pool, content
from tests.tiers.test_tiers import PROMPT, options

NUM_PAGES = 64


def published(cache):
    """The pages of the tree: namespace, tokens up to its end, and its place."""
    found = {}
    stack = [(root["namespace"], (), node) for root in cache.snapshot() for node in root["children"]]
    while stack:
        namespace, before, node = stack.pop()
        namespace = node.get("namespace", namespace)
        tokens = (*before, *node["tokens"].tolist())
        for i, page in enumerate(node["pages"].tolist()):
            found[namespace, tokens[: min(len(before) + (i + 1) * cache.page_size, len(tokens))]] = page
        stack += [(namespace, tokens, child) for child in node["children"]]
    return found


def right(pool):
    """Every page of the tree holds its own bytes."""
    for (namespace, tokens), page in published(pool.cache).items():
        assert np.array_equal(pool.bytes[page], content(namespace, tokens)), (namespace, tokens)


def order(pool):
    """What eviction takes, page by page."""
    left, gone = set(published(pool.cache)), []
    while pool.cache.evict(1):
        now = set(published(pool.cache))
        gone += left - now
        left = now
    assert pool.cache.stats().free == pool.num_pages
    return gone


def traffic(pool, seed, requests=60, names=("", "", "a", "b")):
    rng = random.Random(seed)
    said = [[0]]
    for _ in range(requests):
        old = rng.choice(said)
        tokens = old[: rng.randint(0, len(old))] + [rng.randrange(3) for _ in range(rng.randint(1, 14))]
        said.append(tokens)
        with pool.cache.acquire(tokens, rng.choice(names)) as lease:
            pool.compute(lease)


def fresh(**more):
    return Pool(num_pages=more.pop("num_pages", NUM_PAGES), **more)


@pytest.mark.parametrize("seed", range(6))
def test_the_whole_tree_comes_back_with_its_order(tmp_path, seed):
    one, other = fresh(), fresh()
    traffic(one, seed)
    one.tiers.save(tmp_path / "s")
    gained = other.tiers.load(tmp_path / "s")
    other.cache.check()
    right(other)
    assert published(other.cache).keys() == published(one.cache).keys()
    assert any(len(tokens) % 4 for _, tokens in published(one.cache)), "open pages are among them"
    assert gained > 0
    assert order(other) == order(one)


def test_saving_changes_nothing_and_is_the_same_each_time(tmp_path):
    pool = fresh()
    traffic(pool, 0)
    before = pool.cache.stats()
    for name in ("s", "t"):
        pool.tiers.save(tmp_path / name)
    assert pool.cache.stats() == before
    assert (tmp_path / "s").read_bytes() == (tmp_path / "t").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["s", "t"]
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_what_is_in_use_is_saved_as_the_hottest(tmp_path):
    one, other = fresh(), fresh()
    traffic(one, 1)
    (namespace, tokens), *_ = sorted(published(one.cache), key=lambda name: len(name[1]))
    pin = one.cache.pin(list(tokens), namespace)
    one.tiers.save(tmp_path / "s")
    other.tiers.load(tmp_path / "s")
    pin.unpin()
    assert order(other)[-1] == order(one)[-1] == (namespace, tokens)


def test_a_smaller_pool_takes_what_was_used_last(tmp_path):
    one, small = fresh(), fresh(num_pages=20)
    traffic(one, 2)
    one.tiers.save(tmp_path / "s")
    small.tiers.load(tmp_path / "s")
    right(small)
    assert small.cache.stats().free == 0
    assert order(small) == order(one)[-20:]


def test_loading_into_a_used_pool_takes_the_place_of_what_is_cold(tmp_path):
    one, used = fresh(), fresh()
    traffic(one, 3)
    traffic(used, 4)
    one.tiers.save(tmp_path / "s")
    lease = used.cache.acquire([2] * 30, "a")
    used.tiers.load(tmp_path / "s")
    right(used)
    used.cache.check()
    lease.release(False)
    kept = used.cache.stats().num_pages - 8
    assert order(used)[-kept:] == order(one)[-kept:]


def test_safetensors_reads_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    pool = fresh()
    traffic(pool, 0)
    pool.tiers.save(tmp_path / "s")
    found = safetensors.load_file(tmp_path / "s")
    pages = published(pool.cache)
    with pytest.importorskip("safetensors").safe_open(tmp_path / "s", "numpy") as file:
        metadata = file.metadata()
    names = json.loads(metadata["namespaces"])
    assert json.loads(metadata["identity"])["weights"] == "w"
    assert found["kv"].shape == (len(pages), PAGE_BYTES)
    seen = []
    for i in range(len(pages)):
        path = [i]
        while found["parent"][path[-1]] >= 0:
            assert found["parent"][path[-1]] < path[-1]
            path.append(int(found["parent"][path[-1]]))
        tokens = tuple(int(t) for p in path[::-1] for t in found["tokens"][p, : found["length"][p]])
        seen.append((names[found["namespace"][i]], tokens))
        assert np.array_equal(found["kv"][i], pool.bytes[pages[seen[-1]]])
    assert seen[::-1] == order(pool)


@pytest.mark.parametrize("field", [*sorted(IDENTITY), "page_size"])
def test_another_identity_is_refused_with_the_difference(tmp_path, field):
    one = fresh()
    traffic(one, 0)
    one.tiers.save(tmp_path / "s")
    more = {"page_size": 2} if field == "page_size" else {"identity": {**IDENTITY, field: "other"}}
    ours, theirs = (2, 4) if field == "page_size" else ("other", IDENTITY[field])
    with pytest.raises(radixkv.InvalidArgument, match=f"another identity: {field} {theirs!r}, not {ours!r}"):
        fresh(**more).tiers.load(tmp_path / "s")
    with pytest.raises(radixkv.InvalidArgument, match="another identity"):
        fresh(options=TierOptions(threads=0, snapshot=tmp_path / "s"), **more)


def test_a_file_with_any_byte_changed_gives_nothing_wrong(tmp_path):
    one = fresh()
    traffic(one, 0, 12)
    one.tiers.save(tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    rng = random.Random(0)
    refused = less = 0
    everything = set(published(one.cache))
    end = len(data.rstrip(b"\0")) + 1
    for at in [*range(0, 600, 7), *(rng.randrange(4096, end) for _ in range(300))]:
        (tmp_path / "t").write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        pool = fresh()
        try:
            pool.tiers.load(tmp_path / "t")
        except radixkv.InvalidArgument:
            refused += 1
            continue
        pool.cache.check()
        right(pool)
        less += set(published(pool.cache)) < everything
    assert refused > 20
    assert less > 20


@pytest.mark.parametrize("length", [0, 7, 100, 5000])
def test_a_file_that_is_cut_short_is_refused_or_gives_what_it_has(tmp_path, length):
    one, other = fresh(), fresh()
    traffic(one, 0)
    one.tiers.save(tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(data[:length])
    with pytest.raises(radixkv.InvalidArgument, match="no snapshot, or damaged"):
        other.tiers.load(tmp_path / "s")
    assert other.cache.stats().free == NUM_PAGES


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        fresh().tiers.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        fresh(options=TierOptions(threads=0, snapshot=tmp_path / "none"))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    pool = fresh()
    traffic(pool, 0)
    pool.tiers.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    read = pool.read_pages

    def changed(pages, out):
        read(pages, out)
        pool.cache.evict(1)

    pool.read_pages = changed
    with pytest.raises(radixkv.LeaseError, match="changed while it was saved"):
        pool.tiers.save(tmp_path / "s")
    pool.read_pages = read
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError("disk full")))
        pool.tiers.save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_snapshot_is_a_tier(tmp_path, threads):
    one = fresh()
    one.serve(PROMPT)
    one.serve(PROMPT, "a")
    one.tiers.save(tmp_path / "s")
    pool = Pool(options(tmp_path / "disk", threads=threads, snapshot=tmp_path / "s"))
    fetch = pool.tiers.fetch(PROMPT)
    pool.tiers.pump()
    fetch.wait(5)
    assert fetch.sources == {"snapshot": 40}
    del fetch
    assert pool.serve(PROMPT) == 40
    assert pool.serve(PROMPT, "b") == 0
    pool.tiers.pump()
    pool.tiers.clear("a")
    assert pool.serve(PROMPT, "a") == 0
    pool.close()
    again = Pool(options(tmp_path / "disk"))
    assert again.serve(PROMPT) == 40  # it went on to the disk
    again.close()


def test_a_damaged_page_of_a_snapshot_is_a_miss(tmp_path):
    one = fresh()
    one.serve(PROMPT)
    one.tiers.save(tmp_path / "s")
    pool = fresh(options=TierOptions(threads=0, snapshot=tmp_path / "s"))
    data = bytearray((tmp_path / "s").read_bytes())
    data[4096 + 5 * PAGE_BYTES + 3] ^= 1  # of the sixth page
    (tmp_path / "s").write_bytes(data)
    assert pool.serve(PROMPT) == 20
