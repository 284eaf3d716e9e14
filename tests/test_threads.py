"""Calls from several threads; a lease belongs to one of them at a time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import radixkv


def in_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_a_lease_is_refused_to_another_thread_until_adopted():
    cache = radixkv.PrefixCache(8, 4)
    lease = cache.acquire([1, 2, 3])
    before = cache.stats()
    for use in (lease.release, lease.advance, lambda: lease.extend([4]), lambda: lease.pages, lease.fork):
        with pytest.raises(radixkv.LeaseError, match=r"another thread: call lease.adopt\(\)"):
            in_thread(use)
    assert cache.stats() == before

    def take_over():
        lease.adopt()
        lease.advance()
        lease.release()

    in_thread(take_over)
    assert lease.released
    assert cache.match([1, 2, 3]) == 3
    cache.check()


def test_many_threads_share_a_cache():
    cache = radixkv.PrefixCache(64, 4)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for i in range(150):
                tokens = rng.integers(0, 3, int(rng.integers(1, 30)), dtype=np.int32)
                try:
                    with cache.acquire(tokens, str(rng.integers(2))) as lease:
                        lease.advance()
                        lease.extend([1])
                        if i % 3 == 0:
                            lease.advance()
                            lease.fork().release()
                        if i % 20 == 0:
                            cache.clear("1")
                except radixkv.PoolExhausted:
                    pass
                except radixkv.LeaseError as error:
                    assert "namespace was cleared" in str(error)  # by another thread, before the fork
                cache.match(tokens)
                if i % 10 == 0:
                    cache.check()
                    s = cache.stats()
                    assert s.free + s.private + s.protected + s.evictable == s.num_pages
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    cache.evict(64)
    cache.check()
    assert cache.stats().free == 64


def test_threads_with_long_prompts():
    """Calls long enough to run without the interpreter's lock: counts add up, and nothing deadlocks."""
    cache = radixkv.PrefixCache(4096, 16)
    prompt = np.arange(20_000, dtype=np.int32)

    def work() -> int:
        for _ in range(50):
            with cache.acquire(prompt) as lease:
                lease.advance()
        return 1

    with ThreadPoolExecutor(3) as pool:
        assert sum(pool.map(lambda _: work(), range(3))) == 3
    assert cache.stats().requests == 150
    cache.check()
