"""Tiers over a pool of bytes: restarts, every kind of failure, clears, bounds. Nothing wrong is ever filled."""

from __future__ import annotations

import threading
import time
import warnings

import numpy as np
import pytest

import radixkv
from radixkv.tiers import TierOptions
from tests.tiers.pool import IDENTITY, PAGE_SIZE, Pool

PROMPT = list(range(100, 142))  # ten full pages and two tokens


def options(path, **more):
    return TierOptions(disk=path, disk_capacity=more.pop("capacity", 64 * 4096), threads=more.pop("threads", 0), **more)


def stored(path, *prompts, **more):
    """A pool that has stored these prompts, and is closed."""
    pool = Pool(options(path, **more))
    for prompt in prompts or (PROMPT,):
        pool.serve(prompt)
    pool.tiers.pump()
    pool.close()
    return pool


@pytest.mark.parametrize("threads", [0, 4])
def test_a_restart_brings_whole_pages_back(tmp_path, threads):
    stored(tmp_path, threads=threads)
    pool = Pool(options(tmp_path, threads=threads))
    assert pool.serve(PROMPT) == 40
    assert pool.serve(PROMPT) == 0  # the pool has them
    assert pool.serve([*PROMPT[:20], 7, 7, 7, 7, 7]) == 0
    stats = pool.tiers.stats()
    assert stats["filled_tokens"] == 40
    assert stats["stores"]["disk"]["read"] == 10
    pool.close()


def test_a_token_is_left_to_compute(tmp_path):
    stored(tmp_path, PROMPT[:40])
    assert Pool(options(tmp_path)).serve(PROMPT[:40]) == 36


def test_what_the_pool_evicted_comes_back_from_ram_without_a_disk():
    pool = Pool()
    pool.serve(PROMPT)
    pool.tiers.pump()
    pool.cache.evict(64)
    fetch = pool.tiers.fetch(PROMPT)
    assert fetch.ready
    assert fetch.tokens == 40
    assert fetch.sources == {"ram": 40}
    del fetch
    assert pool.serve(PROMPT) == 40


def test_a_partial_match_is_filled_over(tmp_path):
    stored(tmp_path)
    pool = Pool(options(tmp_path))
    with pool.cache.acquire(PROMPT[:6]) as lease:  # a page and a half
        pool.compute(lease)
    assert pool.serve(PROMPT) == 34


@pytest.mark.parametrize("field", sorted(IDENTITY))
def test_another_identity_finds_nothing(tmp_path, field):
    stored(tmp_path)
    assert Pool(options(tmp_path), identity={**IDENTITY, field: "other"}).serve(PROMPT) == 0


def test_another_secret_namespace_or_page_size_finds_nothing(tmp_path):
    stored(tmp_path)
    for pool in (Pool(options(tmp_path, secret=b"other")), Pool(options(tmp_path), page_size=2)):
        assert pool.serve(PROMPT) == 0
        pool.close()
    pool = Pool(options(tmp_path))
    assert pool.serve(PROMPT, "tenant") == 0
    pool.tiers.pump()
    pool.close()
    again = Pool(options(tmp_path))
    assert again.serve(PROMPT, "tenant") == 40
    assert again.serve(PROMPT, "tenant-2") == 0


def test_no_name_is_stored(tmp_path):
    pool = Pool(options(tmp_path))
    pool.serve(PROMPT, "a-tenants-secret-salt")
    pool.tiers.clear("a-tenants-secret-salt")
    pool.close()
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"secret-salt" in p.read_bytes()]
    assert all(p.stat().st_mode & 0o077 == 0 for p in tmp_path.rglob("*") if p.name in ("secret", "pages-0000.bin"))


@pytest.mark.parametrize("page", [0, 5, 9])
def test_a_flipped_bit_ends_what_is_filled(tmp_path, page):
    stored(tmp_path)
    (file,) = tmp_path.rglob("pages-0000.bin")
    data = bytearray(file.read_bytes())
    for offset in range(0, len(data), 4096):  # the record whose first byte is the page's content
        from tests.tiers.pool import PAGE_BYTES, content

        if bytes(data[offset : offset + PAGE_BYTES]) == content("", PROMPT[: (page + 1) * PAGE_SIZE]).tobytes():
            data[offset + 777 % PAGE_BYTES] ^= 4
    file.write_bytes(data)
    pool = Pool(options(tmp_path))
    assert pool.serve(PROMPT) == page * PAGE_SIZE
    assert pool.tiers.stats()["stores"]["disk"]["corrupt"] == 1
    pool.tiers.pump()  # computed anew, and stored anew
    pool.tiers.disk.check()
    pool.close()
    assert Pool(options(tmp_path)).serve(PROMPT) == 40


def test_every_byte_of_a_record_matters(tmp_path):
    pool = Pool(options(tmp_path))
    layout, memory = pool.tiers._layout, np.zeros(4096, np.uint8)
    layout.seal(memory, b"k" * 16, b"p" * 16)
    assert layout.intact(memory, b"k" * 16, b"p" * 16)
    assert not layout.intact(memory, b"l" * 16, b"p" * 16)
    assert not layout.intact(memory, b"k" * 16, b"q" * 16)
    for i in range(4096):
        memory[i] ^= 1
        assert not layout.intact(memory, b"k" * 16, b"p" * 16), i
        memory[i] ^= 1


def test_the_files_of_pages_are_gone_or_short(tmp_path):
    stored(tmp_path)
    (file,) = tmp_path.rglob("pages-0000.bin")
    pool = Pool(options(tmp_path))
    file.write_bytes(b"")
    assert pool.serve(PROMPT) == 0
    assert pool.tiers.stats()["stores"]["disk"]["failed"] > 0
    pool.close()
    file.unlink()
    assert Pool(options(tmp_path)).serve(PROMPT) == 0  # rows without slots are dropped


def test_a_damaged_index_is_set_aside(tmp_path):
    stored(tmp_path)
    (file,) = tmp_path.rglob("index.sqlite")
    file.write_bytes(b"rubbish" * 1000)
    with pytest.warns(RuntimeWarning, match="begins anew"):
        pool = Pool(options(tmp_path))
    assert pool.serve(PROMPT) == 0
    pool.tiers.pump()
    pool.close()
    assert Pool(options(tmp_path)).serve(PROMPT) == 40


def test_a_directory_that_cannot_be_used_turns_the_tier_off(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="is off"):
        pool = Pool(options(tmp_path / "file" / "below"))
    assert pool.tiers.disk is None
    assert pool.serve(PROMPT) == 0


def test_a_full_disk_writes_nothing_more(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    pool = Pool(options(tmp_path))
    pool.serve(PROMPT)
    pool.tiers.pump()
    assert len(pool.tiers.disk) == 0
    assert pool.tiers.stats()["stores"]["disk"]["refused"] == 10
    monkeypatch.undo()
    pool.serve([5] * 9)
    pool.tiers.pump()
    assert len(pool.tiers.disk) == 2


def test_a_second_process_reads_only_and_follows_clears(tmp_path):
    first, second = Pool(options(tmp_path)), Pool(options(tmp_path))
    first.serve(PROMPT)
    first.tiers.pump()
    assert second.tiers.disk.read_only
    assert second.serve(PROMPT) == 40
    second.serve([9] * 20)
    second.tiers.pump()
    assert len(first.tiers.disk) == 10
    first.tiers.clear()
    second.cache.clear()
    assert second.serve(PROMPT) == 0


@pytest.mark.parametrize("namespace", [None, "a"])
def test_a_clear_reaches_everything_at_once(tmp_path, namespace):
    pool = Pool(options(tmp_path))
    for name in ("a", "b"):
        pool.serve(PROMPT, name)
    pool.tiers.pump()
    late = pool.tiers.fetch(PROMPT, "a")
    assert pool.tiers.clear(namespace) > 0
    with pool.cache.acquire(PROMPT, "a") as lease:
        assert pool.tiers.fill(lease, late) == 0
        lease.release(False)
    assert pool.serve(PROMPT, "a") == 0
    pool.tiers.pump()
    pool.cache.evict(64)
    assert pool.serve(PROMPT, "b") == (40 if namespace else 0)
    pool.tiers.pump()
    pool.close()
    again = Pool(options(tmp_path))
    assert again.serve(PROMPT, "a") == 40  # what was computed after the clear


def test_a_clear_survives_a_restart(tmp_path):
    pool = Pool(options(tmp_path))
    pool.serve(PROMPT)
    pool.tiers.pump()
    pool.tiers.clear()
    pool.close()
    assert Pool(options(tmp_path)).serve(PROMPT) == 0


def test_what_was_published_before_a_clear_is_not_stored_as_new(tmp_path):
    pool = Pool(options(tmp_path))
    pool.serve(PROMPT)  # not pumped: the worker has yet to read it
    pool.tiers.clear()
    pool.tiers.pump()
    assert pool.serve(PROMPT) == 0


def test_capacity_is_a_bound_and_children_leave_before_parents(tmp_path):
    pool = Pool(options(tmp_path, capacity=20 * 4096))
    rng = np.random.default_rng(0)
    for _ in range(150):
        prompt = [*PROMPT[: int(rng.integers(0, 5)) * PAGE_SIZE], *rng.integers(0, 3, 30).tolist()]
        pool.serve(prompt)
        pool.tiers.pump()
        pool.cache.evict(int(rng.integers(0, 64)))
        pool.tiers.disk.check()
    assert len(pool.tiers.disk) == 20
    assert sum(p.stat().st_size for p in tmp_path.rglob("pages-*.bin")) <= 20 * 4096
    pool.close()
    again = Pool(options(tmp_path, capacity=20 * 4096))
    again.tiers.disk.check()
    smaller = Pool(options(tmp_path / "new", capacity=4 * 4096))
    smaller.serve(PROMPT)
    smaller.tiers.pump()
    smaller.close()
    smaller = Pool(options(tmp_path / "new", capacity=4 * 4096))  # nothing in RAM
    assert smaller.serve(PROMPT) == 16  # a usable prefix


def test_a_page_that_is_evicted_while_it_is_copied_is_not_stored(tmp_path):
    pool = Pool(options(tmp_path))
    pool.serve(PROMPT)
    read = pool.read_pages

    def evict_first(pages, out):
        pool.cache.evict(64)
        read(pages, out)

    pool.read_pages = evict_first
    pool.tiers.pump()
    assert len(pool.tiers.disk) == 0
    assert pool.tiers.stats()["discarded_copies"] == 10


class Faulty:
    """A store in RAM that misbehaves at its n-th call."""

    name = "faulty"
    read_only = False

    def __init__(self, n=-1, how="raise"):
        self.records, self.n, self.how, self.calls = {}, n, how, 0
        self.hang = threading.Event()

    def _call(self):
        self.calls += 1
        bad = self.calls - 1 == self.n
        if bad and self.how == "raise":
            raise OSError("as told")
        if bad and self.how == "hang":
            self.hang.wait(10)
        return bad and self.how

    def leading(self, keys):
        if self._call() == "lie":
            return 10**6
        return next((i for i, key in enumerate(keys) if key not in self.records), len(keys))

    def read(self, keys, memory):
        how = self._call()
        for key, m in zip(keys, memory, strict=True):
            if key in self.records:
                m[:] = np.frombuffer(self.records[key], np.uint8)
            if how == "flip":
                m[len(m) // 3] ^= 16
            if how == "truncate":
                m[len(m) // 2 :] = 0
        return [True] * (1 if how == "lie" else len(keys))

    def write(self, records):
        self._call()
        self.records |= {r.key: r.memory.tobytes() for r in records}
        return [True] * len(records)

    def touch(self, keys):
        self._call()

    def drop(self, keys):
        return len([self.records.pop(key) for key in keys if key in self.records])

    def __contains__(self, key):
        return key in self.records

    def close(self):
        self._call()


@pytest.mark.parametrize("how", ["raise", "flip", "truncate", "lie"])
@pytest.mark.parametrize("n", range(12))
def test_a_store_that_fails_at_any_call_changes_no_answer(how, n):
    store = Faulty()
    writer = Pool(stores=[store])
    writer.serve(PROMPT)
    writer.tiers.pump()
    store.n, store.how, store.calls = n, how, 0
    reader = Pool(TierOptions(threads=0, secret=b"s"), stores=[store])
    writer = Pool(TierOptions(threads=0, secret=b"s"), stores=[store])
    for pool in (writer, reader, reader):
        pool.serve(PROMPT)  # verifies every page
        pool.tiers.pump()
        pool.cache.evict(64)
        assert pool.tiers.hub.num_used == 0
    pool.close()


def test_a_store_that_hangs_is_computed_at_the_deadline():
    store = Faulty(0, "hang")
    pool = Pool(TierOptions(threads=1), stores=[store])
    fetch = pool.tiers.fetch(PROMPT, deadline=0.05)
    start = time.monotonic()
    assert fetch.wait()
    assert time.monotonic() - start < 2
    assert fetch.tokens == 0
    assert pool.tiers.stats()["late"] == 1
    for _ in range(2):
        pool.tiers.fetch(PROMPT, deadline=0.0).wait()
    assert pool.tiers.stats()["stores"]["faulty"]["breaker"] == "open"
    assert pool.tiers.fetch(PROMPT).ready  # it is not asked
    store.hang.set()
    pool.close()


def test_two_fetches_of_the_same_pages_read_them_once(tmp_path):
    stored(tmp_path)
    pool = Pool(options(tmp_path))
    fetches = [pool.tiers.fetch(PROMPT), pool.tiers.fetch(PROMPT)]
    assert not any(f.ready for f in fetches)
    pool.tiers.pump()
    assert [f.tokens for f in fetches] == [40, 40]
    assert pool.tiers.stats()["stores"]["disk"]["read"] == 10
    fetches[0].cancel()
    del fetches
    assert pool.tiers.stats()["hub"]["used"] == 0


def test_a_fetch_fits_its_own_prompt_only(tmp_path):
    stored(tmp_path)
    pool = Pool(options(tmp_path))
    for tokens, namespace in ((PROMPT[::-1], ""), (PROMPT, "other")):
        fetch = pool.tiers.fetch(PROMPT)
        pool.tiers.pump()
        with pool.cache.acquire(tokens, namespace) as lease:
            assert pool.tiers.fill(lease, fetch) == 0
            lease.release(False)


def test_a_hub_that_is_too_small_gives_a_prefix(tmp_path):
    stored(tmp_path)
    pool = Pool(options(tmp_path, ram=3 * 4096))
    assert pool.serve(PROMPT) == 12


def test_writers_that_recycle_pages_under_copies(tmp_path):
    """Pages are evicted and rewritten all the time while the worker copies without a lock."""
    pool = Pool(options(tmp_path, threads=2, capacity=400 * 4096), num_pages=24)
    rng = np.random.default_rng(1)
    for _ in range(300):
        pool.serve(rng.integers(0, 2, int(rng.integers(5, 40))).tolist(), str(rng.integers(2)))
    pool.close()
    again = Pool(options(tmp_path, capacity=400 * 4096))
    assert len(again.tiers.disk) > 20
    for row in again.tiers.disk._index.rows():
        memory = again.tiers.hub.memory[0]
        again.tiers.disk.read([row.key], [memory])
        assert again.tiers._layout.intact(memory, row.key, row.parent)


@pytest.mark.parametrize("threads", [0, 2])
def test_pages_that_are_stored_once_they_were_found(tmp_path, threads):
    other = [5] * 21
    pool = Pool(options(tmp_path, write="second", threads=threads))
    for prompt in (PROMPT, other):
        pool.serve(prompt)
    pool.serve(PROMPT[:21], "another namespace")
    pool.tiers.pump()
    assert len(pool.tiers.disk) == 0
    pool.serve(PROMPT[:21] + [7] * 20)  # finds five pages
    pool.cache.evict(0)
    pool.close()
    again = Pool(options(tmp_path))
    assert (again.serve(PROMPT), again.serve(other), again.serve(PROMPT, "another namespace")) == (20, 0, 0)
    again.close()


def test_pages_that_left_before_they_were_found_or_cleared_are_not_stored(tmp_path):
    pool = Pool(options(tmp_path, write="second"))
    pool.serve(PROMPT)
    pool.cache.evict(64)
    pool.serve(PROMPT)  # computed anew: nobody found it yet
    pool.tiers.pump()
    pool.serve(PROMPT)  # found; but not pumped before the clear
    pool.tiers.clear()
    pool.serve(PROMPT)
    pool.tiers.pump()
    pool.close()
    assert Pool(options(tmp_path)).serve(PROMPT) == 0


def test_nothing_is_stored_where_told_so(tmp_path):
    stored(tmp_path)
    pool = Pool(options(tmp_path, write="none"))
    assert pool.serve(PROMPT) == 40
    pool.serve(PROMPT[::-1])
    pool.tiers.clear("other")
    pool.close()
    assert Pool(options(tmp_path)).serve(PROMPT[::-1]) == 0


def test_misuse():
    with pytest.raises(radixkv.InvalidArgument, match="write"):
        Pool(TierOptions(write="some", threads=0))
    with pytest.raises(radixkv.InvalidArgument, match="secret"):
        Pool(TierOptions(secret=b"", threads=0))
    with pytest.raises(radixkv.InvalidArgument, match="ram"):
        Pool(TierOptions(ram=4096, threads=0))
    with pytest.raises(radixkv.InvalidTokens):
        Pool().tiers.fetch([-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(radixkv.InvalidArgument, match="disk_capacity"):
            Pool(TierOptions(disk="unused", disk_capacity=1, threads=0, secret=b"s"))


def test_what_was_used_last_stays_over_a_restart(tmp_path):
    """The index is told of the deepest page only: those before it are hotter whatever it says of them."""
    capacity = 30 * 4096
    one, two, three = ([*[i] * 20, *range(100 * i, 100 * i + 21)] for i in (1, 2, 3))
    stored(tmp_path, one, two, three, capacity=capacity)
    pool = Pool(options(tmp_path, capacity=capacity))
    pool.serve(one)
    pool.serve(two[:21])
    pool.close()
    pool = Pool(options(tmp_path, capacity=capacity))
    pool.serve([7] * 61)  # 15 pages: of `three` all go, and of `two` those that were not used since
    pool.tiers.pump()
    pool.close()
    pool = Pool(options(tmp_path, capacity=capacity, ram=2 * 4096))
    keys = {name: pool.tiers._keys.pages(tokens[:40], pool.tiers._keys.tag("")) for name, tokens in
            (("one", one), ("two", two), ("three", three))}  # fmt: skip
    assert {name: pool.tiers.disk.leading(pages) for name, pages in keys.items()} == {"one": 10, "two": 5, "three": 0}
    pool.close()
