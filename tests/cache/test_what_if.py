"""What larger pools would have hit, beside what they do hit."""

from __future__ import annotations

import numpy as np
import pytest

import radixkv
from radixkv.traces.workload import generate
from tests.cache.test_cache import serve
from tests.cache.test_journal import random_traffic


def serve_all(cache, requests):
    """The tokens that are hit in whole pages."""
    hits = 0
    for tokens in requests:
        size = cache.page_size
        hits += min(cache.match(tokens) // size, (len(tokens) - 1) // size) * size
        with cache.acquire(tokens) as lease:
            lease.advance()
    return hits


def workload(seed, page_size, count=400, num=30):
    """Requests of whole pages, none longer than a few, that come again sooner or later."""
    rng = np.random.default_rng(seed)
    prompts = [np.repeat(rng.integers(0, 1000, rng.integers(1, 6)), page_size).tolist() for _ in range(num)]
    return [prompts[int(i)] + [5000] * page_size for i in rng.zipf(1.3, count) % num]


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_what_larger_pools_hit(seed, page_size):
    requests = workload(seed, page_size)
    cache = radixkv.PrefixCache(20, page_size)
    cache.curve()
    hits = serve_all(cache, requests)
    found = cache.curve()
    assert found.input_tokens == sum(map(len, requests))
    for factor, tokens in found.larger.items():
        real = serve_all(radixkv.PrefixCache(int(20 * factor), page_size), requests)
        assert tokens - found.hit_tokens == pytest.approx(real - hits, rel=0.05, abs=20 * page_size), factor
    cache.check()


def serve_in_pieces(cache, tokens, piece, commit=True):
    """The tokens that are hit in whole pages."""
    found = cache.match(tokens[:-1])
    with cache.acquire(tokens[: found + piece]) as lease:
        while lease.num_tokens < len(tokens):
            lease.advance()
            if commit:
                lease.commit()
            lease.extend(tokens[lease.num_tokens :][:piece], prompt=True)
        lease.advance()
    return found // cache.page_size * cache.page_size


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("piece", [1, 3, 4, 7, 1000])
def test_prompts_in_pieces_count_whole(piece, page_size, commit):
    """Nearly: what the first pieces evict, the next ones find evicted after what they would have hit."""
    requests = workload(1, page_size, 2000, num=200)

    def served(num_pages):
        cache = radixkv.PrefixCache(num_pages, page_size)
        cache.curve()
        return sum(serve_in_pieces(cache, tokens, piece, commit) for tokens in requests), cache.curve()

    hits, found = served(100)
    assert found.input_tokens == sum(map(len, requests))
    for factor, tokens in found.larger.items():
        real, _ = served(int(100 * factor))
        assert tokens - found.hit_tokens == pytest.approx(real - hits, rel=0.04, abs=10 * page_size), factor
    assert found.larger[8.0] > 1.5 * found.hit_tokens


@pytest.mark.parametrize("between", ["truncate", "answer", "fork"])
def test_no_larger_pool_hits_what_no_request_asks_for(between):
    """Pieces that follow an answer, a cut or a fork are input, and no prefix of a prompt."""
    cache = radixkv.PrefixCache(64, 4)
    cache.curve()
    serve(cache, [1] * 41)
    cache.evict(64)
    with cache.acquire([1] * 9) as lease:
        lease.advance()
        if between == "truncate":
            lease.truncate(6)
        elif between == "answer":
            lease.extend([1] * 3)
            lease.advance()
        more = lease.fork() if between == "fork" else lease
        more.extend([1] * 20, prompt=True)
        more.advance()
        if more is not lease:
            more.release()
    found = cache.curve()
    assert found.input_tokens == 41 + 9 + 20
    assert found.larger[8.0] == 8


def test_a_pool_that_would_do_is_named():
    cache = radixkv.PrefixCache(10, 4)
    cache.curve()
    for _ in range(50):
        for i in range(4):
            serve(cache, [i] * 16 + [9])
    found = cache.curve()
    rates = found.hit_rates
    assert rates[1.0] < 0.2 < 0.8 < rates[2.0] == rates[8.0]
    assert list(rates) == [1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]
    assert sorted(rates.values()) == list(rates.values())
    assert f"{100 * rates[2.0]:.1f} with 2 times the pages" in str(found)


def test_the_difference_of_two_answers():
    cache = radixkv.PrefixCache(8, 4)
    first = cache.curve()
    assert (first.input_tokens, first.hit_rates[1.0]) == (0, 0.0)
    serve(cache, [1] * 16)
    earlier = cache.curve()
    serve(cache, [1] * 16 + [2])
    later = cache.curve() - earlier
    assert (later.input_tokens, later.hit_tokens, later.hit_rates[1.0]) == (17, 16, 16 / 17)


def test_a_namespace_is_its_own_and_what_was_cleared_is_forgotten():
    def again(between):
        cache = radixkv.PrefixCache(4, 4)
        serve(cache, [1] * 16, "a")
        cache.curve()
        serve(cache, [2] * 16, "a")
        between(cache)
        return cache.curve().larger[8.0]

    assert (
        again(lambda cache: serve(cache, [1] * 17, "a") if cache.num_pages > 4 else serve(cache, [1] * 16, "a")) == 12
    )
    assert again(lambda cache: serve(cache, [1] * 16, "b")) == 0
    assert again(lambda cache: (cache.clear("a"), serve(cache, [1] * 16, "a"))) == 0


@pytest.mark.parametrize("policy", ["lru", "hazard"])
def test_it_changes_no_decision(policy):
    plain, watched = (radixkv.PrefixCache(30, 2, policy) for _ in range(2))
    watched.curve()
    for cache in (plain, watched):
        for _ in random_traffic(cache, np.random.default_rng(4), 300):
            cache.check()
    assert plain.stats().evicted_pages > 100
    assert str(plain.snapshot()) == str(watched.snapshot())


@pytest.mark.parametrize("page_size", [3, 4, 5, 8])
def test_pages_of_like_tokens_are_told_apart(page_size):
    """A hash whose keys are an arithmetic progression takes (5, 6, 7) for (6, 4, 8), and so on."""
    cache = radixkv.PrefixCache(64, page_size)
    cache.curve()
    first = [9] * (page_size - 3)
    for place in range(page_size - 2):
        one = [*first[:place], 5, 6, 7, *first[place:]]
        other = [*first[:place], 6, 4, 8, *first[place:]]
        serve(cache, [*one, place])
        cache.evict(64)
        serve(cache, [*other, place])
        cache.evict(64)
    assert cache.curve().larger[8.0] == 0


def test_of_a_large_pool_a_sample_is_remembered():
    """7 times 30,000 pages are more than 2**10: one page in 256."""
    cache = radixkv.PrefixCache(30_000, 1)
    cache.curve()
    requests = [list(range(i, i + 600)) for i in range(0, 60_000, 600)] * 3
    serve_all(cache, requests)
    found = cache.curve()
    assert found.hit_rates[1.0] < 0.1
    assert found.hit_rates[1.5] < 0.1
    assert found.hit_rates[3.0] == pytest.approx(2 / 3, abs=0.05)


def test_a_workload():
    requests = [r.tokens_in for r in generate("chat", 400)]
    cache = radixkv.PrefixCache(600, 16)
    cache.curve()
    hits = serve_all(cache, requests)
    found = cache.curve()
    for factor in (1.5, 3.0, 8.0):
        real = serve_all(radixkv.PrefixCache(int(600 * factor), 16), requests)
        assert found.larger[factor] - found.hit_tokens == pytest.approx(real - hits, abs=0.02 * found.input_tokens)


def test_a_closed_cache_still_tells():
    cache = radixkv.PrefixCache(4, 4)
    cache.curve()
    serve(cache, [1] * 16)
    cache.close()
    assert cache.curve().input_tokens == 16
