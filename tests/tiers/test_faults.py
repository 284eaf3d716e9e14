"""Stores that hang, disks that are full or read-only for real, other processes, records in the wrong place."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from radixkv.tiers import TierOptions
from radixkv.tiers.disk import Disk
from radixkv.tiers.record import Layout, Record
from tests.tiers.pool import PAGE_SIZE, Pool, content
from tests.tiers.test_tiers import PROMPT, Faulty, options, stored

ROOT = Path(__file__).parents[2]
SERVE = """
import os, resource, sys, warnings
from tests.tiers.pool import Pool
from tests.tiers.test_tiers import PROMPT, options
"""


def child(code, *arguments):
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", SERVE + code, *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("n", range(8))
def test_a_store_that_hangs_at_any_call_holds_nothing_but_what_it_was_lent(n):
    """Served at the deadline; the slots of the call are lent until it returns; then all are back."""
    store = Faulty()
    writer = Pool(TierOptions(threads=0, secret=b"s"), stores=[store])
    writer.serve(PROMPT)
    writer.tiers.pump()
    writer.close()
    store.n, store.how, store.calls = n, "hang", 0
    pool = Pool(TierOptions(threads=1, secret=b"s"), stores=[store])
    for prompt in (PROMPT, PROMPT[::-1], [8] * 42, [9] * 42, PROMPT):
        fetch = pool.tiers.fetch(prompt, deadline=0.1)
        start = time.monotonic()
        assert fetch.wait()
        assert time.monotonic() - start < 2
        with pool.cache.acquire(prompt) as lease:
            pool.tiers.fill(lease, fetch)
            pool.verify(lease)
            pool.compute(lease)
        pool.tiers.hub.check()
        pool.cache.evict(64)
    store.hang.set()
    until = time.monotonic() + 5
    while pool.tiers.hub.num_used and time.monotonic() < until:
        time.sleep(0.01)
    assert pool.tiers.hub.num_used == 0
    assert store.calls > n
    pool.close()


def test_slots_of_a_call_that_hangs_are_lent_until_it_returns():
    store = Faulty()
    writer = Pool(TierOptions(threads=0, secret=b"s"), stores=[store])
    writer.serve(PROMPT)
    writer.tiers.pump()
    store.n, store.how, store.calls = 2, "hang", 0  # leading, touch, read
    pool = Pool(TierOptions(threads=1, secret=b"s", ram=12 * 4096), stores=[store])
    fetch = pool.tiers.fetch(PROMPT, deadline=0.1)
    assert fetch.wait()
    assert fetch.tokens == 0
    fetch.cancel()
    assert pool.tiers.hub.num_used == 10  # the disk might still write to them
    store.hang.set()
    until = time.monotonic() + 5
    while pool.tiers.hub.num_used and time.monotonic() < until:
        time.sleep(0.01)
    assert pool.tiers.hub.num_used == 0
    pool.close()


def test_closing_does_not_wait_for_a_store_that_hangs():
    store = Faulty(0, "hang")
    pool = Pool(TierOptions(threads=1), stores=[store])
    pool.serve(PROMPT[:8])  # asked for, and hung, until its deadline
    start = time.monotonic()
    pool.tiers.close(drain=0.2)
    assert time.monotonic() - start < 3
    store.hang.set()


def test_a_disk_that_is_full_for_real(tmp_path):
    """No file may grow beyond 300 KB: neither the pages nor, before long, the index."""
    limited = """
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
pool = Pool(options(sys.argv[1], capacity=400 * 4096))
for i in range(60):
    pool.serve([i] * 42)  # compares every page
    pool.tiers.pump()
print(0 if pool.tiers.disk is None else len(pool.tiers.disk))
pool.close()
"""
    for limit in (20_000, 300_000):
        (pages,) = child(limited, tmp_path / str(limit), limit)
        assert int(pages) * 4096 <= limit
    stored(tmp_path / "300000", capacity=64 * 4096)  # room again
    pool = Pool(options(tmp_path / "300000", capacity=64 * 4096))
    assert pool.serve(PROMPT) == 40
    pool.tiers.disk.check()
    pool.close()


def test_a_directory_that_may_only_be_read():
    """The tier is off, with one warning, and requests are computed."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        stored(directory / "d")
        for path in [directory, *directory.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        said = child(
            """
if os.geteuid() == 0:
    os.setuid(65534)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pool = Pool(options(sys.argv[1]))
print(len(caught), "is off" in str(caught[0].message), pool.tiers.disk, pool.serve(PROMPT))
""",
            directory / "d",
        )
        assert said == ["1", "True", "None", "0"]
        for path in [directory, *directory.rglob("*")]:
            path.chmod(0o755)


def test_a_disk_that_becomes_read_only(tmp_path, monkeypatch):
    stored(tmp_path)
    pool = Pool(options(tmp_path))

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    for name in ("pwritev", "fdatasync", "posix_fallocate"):
        monkeypatch.setattr(os, name, refuse)
    assert pool.serve(PROMPT) == 40
    pool.serve(PROMPT[::-1])
    pool.tiers.pump()
    assert pool.tiers.stats()["stores"]["disk"]["failed"] > 0
    pool.cache.evict(64)
    assert pool.serve(PROMPT) == 40
    pool.close()


def test_another_process_reads_what_this_one_writes(tmp_path):
    first = Pool(options(tmp_path))
    first.serve(PROMPT)
    first.tiers.pump()
    read = """
pool = Pool(options(sys.argv[1]))
print(pool.tiers.disk.read_only, pool.serve(PROMPT), pool.serve([9] * 30))
pool.tiers.pump()
pool.close()
"""
    assert child(read, tmp_path) == ["True", "40", "0"]
    assert len(first.tiers.disk) == 10
    first.tiers.disk.check()
    first.tiers.clear()
    assert child(read, tmp_path) == ["True", "0", "0"]
    first.close()
    assert child(read, tmp_path) == ["False", "0", "0"]  # and may write now


@pytest.mark.parametrize("threads", [0, 2])
def test_whole_records_in_each_others_slots_are_misses(tmp_path, threads):
    """As after tampering, or a delete that a loss of power undid: a record names its page and the one before."""
    other = [7] * 4 + PROMPT[4:]
    stored(tmp_path, PROMPT, other)
    (file,) = tmp_path.rglob("pages-0000.bin")
    data = bytearray(file.read_bytes())
    at = {bytes(data[i : i + 1000]): i for i in range(0, len(data), 4096)}
    for page in range(3, 10):  # of the same tokens, after another first page
        a, b = (at[content("", prompt[: (page + 1) * PAGE_SIZE]).tobytes()] for prompt in (PROMPT, other))
        data[a : a + 4096], data[b : b + 4096] = data[b : b + 4096], data[a : a + 4096]
    file.write_bytes(data)
    pool = Pool(options(tmp_path, threads=threads))
    assert pool.serve(PROMPT) == pool.serve(other) == 12
    assert pool.tiers.stats()["stores"]["disk"]["corrupt"] == 14
    pool.close()


def test_many_pages_through_few_slots_leave_children_first(tmp_path):
    layout, rng = Layout(1000, PAGE_SIZE, b"f" * 16), np.random.default_rng(0)
    disk = Disk(tmp_path, {}, b"f" * 16, layout, 100 * layout.stride)
    memory = np.frombuffer(bytearray(2 * layout.stride), np.uint8)
    memory = memory[-memory.ctypes.data % layout.stride :][: layout.stride]  # aligned
    known, count = [b"t" * 16], int(os.environ.get("RADIXKV_PAGES", "5000"))
    for i in range(0, count, 50):
        keys = [(i + j + 1).to_bytes(16, "little") for j in range(50)]
        records = []
        for key in keys:
            parent = known[int(rng.integers(max(0, len(known) - 60), len(known)))]
            records.append(Record(key, parent, b"t" * 16, b"", memory))
            known.append(key)
        stored = disk.write(records)
        assert any(stored)
        disk.check()
        assert len(disk) <= 100
        if rng.random() < 0.5:
            disk.touch([known[int(rng.integers(len(known)))]])
    disk.close()


def test_a_fork_of_a_restored_lease_has_its_pages(tmp_path):
    stored(tmp_path)
    pool = Pool(options(tmp_path))
    fetch = pool.tiers.fetch(PROMPT)
    pool.tiers.pump()
    with pool.cache.acquire(PROMPT) as lease:
        assert pool.tiers.fill(lease, fetch) == 40
        pool.compute(lease)
        with lease.fork() as other:
            for source, target, _ in other.copies:
                pool.bytes[target] = pool.bytes[source]
            pool.verify(other)
            other.extend([1] * 10)
            pool.compute(other)
            pool.verify(other)
        pool.verify(lease)
    pool.close()
