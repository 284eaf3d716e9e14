"""Replay against a literal page cache, and token-exact replay against the longest prefix of everything before."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv import InvalidArgument, PrefixCache
from radixkv.traces.replay import replay
from radixkv.traces.request import Blocks, TraceRequest
from radixkv.traces.workload import generate
from tests.cache.page_lru import PageLru
from tests.traces.trace_strategies import traces


class Checked(PrefixCache):
    """A cache that is checked and drained when replay closes it."""

    def __exit__(self, *error):
        if error[0] is None:
            self.check()
            evictable = self.stats().evictable
            assert self.evict(self.num_pages) == evictable
            assert self.stats().free == self.num_pages
        super().__exit__(*error)


@settings(deadline=None, max_examples=150)
@given(traces(), st.integers(1, 4), st.integers(1, 20))
def test_page_aligned_replay_equals_the_literal_model(requests, page_size, capacity):
    ours = replay(requests, capacity * page_size, page_size, page_aligned=True, make_cache=Checked)
    model = replay(requests, capacity * page_size, page_size, page_aligned=True, make_cache=PageLru)
    assert ours.hit_tokens == model.hit_tokens
    assert ours.evicted_pages == model.evicted_pages
    assert ours.truncated_requests == model.truncated_requests


def common_prefix(a, b):
    num = 0
    while num < min(len(a), len(b)) and a[num] == b[num]:
        num += 1
    return num


@settings(deadline=None, max_examples=150)
@given(traces(), st.integers(1, 4))
def test_with_room_for_everything_a_hit_is_the_longest_prefix_seen_before(requests, page_size):
    seen, expected = [], 0
    for request in requests:
        tokens = request.tokens_in.tolist()
        mine = [sequence for namespace, sequence in seen if namespace == request.namespace]
        expected += max((min(common_prefix(tokens, sequence), len(tokens) - 1) for sequence in mine), default=0)
        seen.append((request.namespace, tokens + request.tokens_out.tolist()))
    result = replay(requests, 2000 * page_size, page_size, make_cache=Checked)
    assert result.hit_tokens == expected
    assert result.evicted_pages == 0


@settings(deadline=None, max_examples=150)
@given(traces(), st.integers(1, 4), st.integers(1, 12))
def test_token_exact_replay_works_at_every_size(requests, page_size, capacity):
    result = replay(requests, capacity * page_size, page_size, make_cache=Checked)
    assert result.requests == len(requests)
    assert result.input_tokens == sum(request.num_in for request in requests)
    assert result.output_tokens == sum(request.num_out for request in requests)
    assert result.truncated_requests == sum(r.num_in + r.num_out > capacity * page_size for r in requests)
    assert 0 <= result.hit_tokens < result.input_tokens


def test_a_repeated_request_hits_all_but_its_last_token():
    request = TraceRequest(list(range(10)), [])
    result = replay([request, request], 64, 4)
    assert (result.input_tokens, result.hit_tokens, result.hit_rate) == (20, 9, 0.45)
    aligned = replay([request, request], 64, 4, page_aligned=True)
    assert aligned.hit_tokens == 8
    whole = TraceRequest(list(range(8)), [])
    assert replay([whole, whole], 64, 4, page_aligned=True).hit_tokens == 4


def test_an_output_is_found_by_the_next_turn():
    first = TraceRequest([1, 2, 3], [4, 5, 6])
    second = TraceRequest([1, 2, 3, 4, 5, 6, 7, 8], [9])
    assert replay([first, second], 64, 4).hit_tokens == 6
    assert replay([first, second], 64, 4, page_aligned=True).hit_tokens == 4


def test_a_request_longer_than_the_cache_keeps_its_first_pages():
    long = TraceRequest(list(range(40)), list(range(5)))
    result = replay([long, long, TraceRequest([0, 1, 2, 3, 99], [])], 16, 4, page_aligned=True)
    assert result.truncated_requests == 2
    assert result.capacity_pages == 4
    assert result.hit_tokens == 16 + 4
    exact = replay([long, long], 16, 4)
    assert exact.truncated_requests == 2
    assert exact.hit_tokens == 15, "the last token of what was acquired is computed"


def test_an_output_that_does_not_fit_is_cut():
    result = replay([TraceRequest([1, 2, 3], list(range(100)))], 8, 4)
    assert (result.truncated_requests, result.output_tokens) == (1, 100)


def test_block_requests_replay_like_their_tokens():
    ids = [[1, 2, 3], [1, 2, 4], [1, 2, 3]]
    blocks = [TraceRequest(blocks=Blocks(np.array(row, dtype=np.int32), 4, 14, 100 + i)) for i, row in enumerate(ids)]
    plain = [TraceRequest(request.tokens_in) for request in blocks]
    for page_size in (1, 2, 3, 4, 8):
        for aligned in (False, True):
            a, b = (replay(requests, 96, page_size, aligned) for requests in (blocks, plain))
            assert a.hit_tokens == b.hit_tokens


def test_progress_counts_requests_and_the_result_is_a_plain_object():
    seen = []
    result = replay(generate("fewshot", 5), 10_000, 16, progress=seen.append).to_dict()
    assert seen == [1, 2, 3, 4, 5]
    wanted = {"requests", "input_tokens", "hit_tokens", "hit_rate", "evicted_pages", "capacity_pages", "seconds"}
    assert wanted <= set(result)
    assert all(type(value) in (bool, int, float, str) for value in result.values())
    assert 0 <= result["cache_seconds"] <= result["seconds"]


def test_replay_is_deterministic():
    first, second = (replay(generate("agent", 50, seed=9), 20_000, 16).to_dict() for _ in range(2))
    for timing in ("seconds", "cache_seconds"):
        del first[timing], second[timing]
    assert first == second


@pytest.mark.parametrize(("capacity", "page_size"), [(15, 16), (0, 1), (-5, 1), (16, 0), (16, -1), (2**40, 16)])
def test_sizes_that_cannot_work_are_refused(capacity, page_size):
    with pytest.raises(InvalidArgument):
        replay([TraceRequest([1])], capacity, page_size)
