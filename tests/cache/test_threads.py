"""Calls from several threads; a lease belongs to one of them at a time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

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


@pytest.fixture(scope="module")
def slow_cache():
    """A cache whose check() takes a while: it has many nodes."""
    cache = radixkv.PrefixCache(110_000, 1)
    for i in range(100_000):
        with cache.acquire([i]) as lease:
            lease.advance()
    return cache


@pytest.mark.parametrize("name", ["stats", "acquire", "match", "extend", "release", "drop", "step"])
def test_who_waits_for_the_cache_lets_other_threads_run(slow_cache, name):
    """One thread is in a long call, another waits for it, and this one goes on."""
    cache, waited = slow_cache, []

    def wait() -> None:
        held, dropped, stepping = cache.acquire([200_000]), [cache.acquire([200_001])], cache.acquire([200_002])
        with radixkv._core.Step(radixkv._core.PageTable(cache), [stepping], 0) as step:
            call = {
                "stats": cache.stats,
                "acquire": lambda: cache.acquire([200_003]),
                "match": lambda: cache.match([1]),
                "extend": lambda: held.extend([2]),
                "release": held.release,
                "drop": dropped.clear,
                "step": lambda: step.__exit__(None, None, None),
            }[name]
            ready.set()
            checking.wait()
            time.sleep(0.005)  # the check has begun
            before = time.perf_counter()
            call()
            waited.append(time.perf_counter() - before)

    def check() -> None:
        checking.set()
        cache.check()

    for _ in range(20):  # until the one call does wait for the other
        ready, checking = threading.Event(), threading.Event()
        threads = [threading.Thread(target=wait), threading.Thread(target=check)]
        threads[0].start()
        ready.wait()
        threads[1].start()
        ticks = []
        while any(thread.is_alive() for thread in threads):
            ticks.append(time.perf_counter())
            time.sleep(0.0005)
        if waited[-1] > 0.02:
            assert max(b - a for a, b in pairwise(ticks)) < waited[-1] / 2
            return
    pytest.fail(f"nothing ever waited: {waited}")
