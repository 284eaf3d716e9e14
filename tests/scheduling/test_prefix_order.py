"""policy="prefix": the longest cached prefix is admitted first, and nobody waits for ever."""

from __future__ import annotations

import random

import pytest

from radixkv import InvalidArgument
from radixkv.scheduling import Request, Scheduler
from radixkv.scheduling.policy import AGE, LOOK
from tests.scheduling.helpers import Host, answer, run, run_step


def one_at_a_time(host, policy="prefix"):
    return Scheduler(host, max_running=1, policy=policy)


def warm(host, tokens):
    with host.cache.acquire(tokens) as lease:
        lease.advance()


def order_of(scheduler, requests):
    """In which order they are served, by their places in `requests`."""
    served = []
    while batch := scheduler.next():
        for request in batch.requests:
            if request not in served:
                served.append(request)
        scheduler.accept(run_step(batch))
    return [requests.index(request) for request in served]


def test_the_longest_cached_prefix_comes_first():
    host = Host(200)
    warm(host, range(1000))
    requests = [Request([2000 + i, *range(10)], 1) for i in range(3)]
    requests += [Request([*range(length), 5000], 1) for length in (300, 900, 600)]
    scheduler = one_at_a_time(host)
    for request in requests:
        scheduler.submit(request)
    assert order_of(scheduler, requests) == [4, 5, 3, 0, 1, 2]
    assert host.drains()


def test_a_request_overtakes_one_earlier_request_for_each_16_cached_tokens():
    host = Host(400)
    warm(host, range(1000))
    cached = AGE * 5 + 1
    requests = [Request([2000 + i], 1) for i in range(20)]
    requests.append(Request([*range(cached), 5000], 1))
    scheduler = one_at_a_time(host)
    for request in requests:
        scheduler.submit(request)
    assert order_of(scheduler, requests).index(20) == 15


def test_nobody_starves_under_a_stream_of_hits():
    host = Host(400)
    warm(host, range(1000))
    scheduler = one_at_a_time(host)
    cold = Request([7000, 7001], 1)
    scheduler.submit(cold)
    overtaken = 0
    while not cold.done:
        scheduler.submit(Request([*range(960), 8000 + overtaken], 1))
        scheduler.accept(run_step(scheduler.next()))
        overtaken += 1
        assert overtaken <= 960 / AGE + 1
    assert overtaken > 1


def test_what_the_first_one_publishes_brings_its_like_forward():
    host = Host(400)
    scheduler = one_at_a_time(host)
    one, other, same = Request(range(900), 1), Request([9999], 1), Request([*range(900), 5], 1)
    requests = [one, other, same]
    for request in requests:
        scheduler.submit(request)
    assert order_of(scheduler, requests) == [0, 2, 1]


def test_no_more_than_the_first_to_arrive_are_compared(monkeypatch):
    monkeypatch.setattr("radixkv.scheduling.policy.AGE", 1)
    host = Host(400)
    warm(host, range(1000))
    scheduler = Scheduler(host, max_running=1, policy="prefix")
    requests = [Request([2000 + i], 1) for i in range(LOOK)] + [Request([*range(960), 1], 1)]
    for request in requests:
        scheduler.submit(request)
    assert order_of(scheduler, requests).index(LOOK) == 1  # it was not looked at before the first had left


def test_a_priority_is_refused():
    with pytest.raises(InvalidArgument, match="policy is 'prefix', which ignores it"):
        one_at_a_time(Host(10)).submit(Request([1], priority=1))


@pytest.mark.parametrize("seed", range(10))
def test_any_order_of_calls_gives_the_same_tokens(monkeypatch, seed):
    chance = random.Random(seed)
    monkeypatch.setattr("radixkv.scheduling.space.HEADROOM", chance.choice([0, 8, 64]))
    size = chance.choice([1, 4, 16])
    host = Host(chance.choice([100, 160]) // size, size)
    scheduler = Scheduler(host, max_step_tokens=chance.choice([6, 20, 400]), max_running=6, policy="prefix")
    prompts = [[*range(100, 100 + n), n] for n in (1, 5, 12, 20, 40)]
    requests: list[Request] = []
    for _ in range(150):
        action = chance.random()
        if action < 0.3:
            group = [Request(chance.choice(prompts), chance.randint(1, 40))]
            scheduler.submit(*group)
            requests += group
        elif action < 0.35 and requests:
            scheduler.cancel(chance.choice(requests))
        elif batch := scheduler.next():
            if action < 0.4:
                scheduler.abandon()
            else:
                scheduler.accept(run_step(batch))
        host.cache.check()
    run(scheduler)
    for request in requests:
        assert request.tokens == answer(request.prompt.tolist(), len(request.tokens))
        assert request.status == "cancelled" or len(request.tokens) == request.max_new_tokens
    assert host.drains()
