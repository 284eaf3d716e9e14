"""A scheduler over tiers: requests wait for their pages and for nothing else, and get them with the right bytes."""

from __future__ import annotations

import random
import time

import pytest

from radixkv.scheduling import Request, Scheduler
from radixkv.tiers import TierOptions
from tests.scheduling.helpers import answer, next_token
from tests.tiers.pool import PAGE_SIZE, Pool
from tests.tiers.test_tiers import Faulty, options

PROMPT = list(range(100, 142))  # ten full pages and two tokens


class Host(Pool):
    """Pages of bytes with tiers below, as `Engine` has them."""

    drop_unit = PAGE_SIZE

    def drop(self, lease, window_left):
        return lease.drop(max(0, lease.num_written - window_left) // PAGE_SIZE * PAGE_SIZE)

    def run(self, scheduler, steps=10**9):
        """Steps whose rows are written, and whose leases are what they should be; how many rows there were."""
        rows = 0
        while steps and (batch := scheduler.next()):
            steps -= 1
            for lease in batch.leases:
                self.verify(lease)
                rows += lease.num_tokens - lease.num_written
                self.compute(lease)
            scheduler.accept([next_token(batch.leases[row].tokens.tolist()) for row in batch.rows])
            self.cache.check()
            self.tiers.hub.check()
        return rows


def ask(scheduler, *prompts, max_new_tokens=3, **more):
    requests = [Request(prompt, max_new_tokens=max_new_tokens, **more) for prompt in prompts]
    for request in requests:
        scheduler.submit(request)
    return requests


def stored(path, *prompts):
    with Host(options(path)).tiers as tiers:
        host = tiers._pages
        for prompt in prompts:
            host.serve(prompt)
            tiers.pump()


@pytest.mark.parametrize("threads", [0, 4])
def test_a_request_starts_with_what_the_tiers_have(tmp_path, threads):
    stored(tmp_path, PROMPT)
    host = Host(options(tmp_path, threads=threads))
    scheduler = Scheduler(host)
    (request,) = ask(scheduler, PROMPT)
    assert host.run(scheduler) == 2 + 2  # two tokens of the prompt, two generated ones
    assert request.tokens == answer(PROMPT, 3)
    assert request.stats.restored_tokens == {"disk": 40}
    assert request.stats.cached_tokens == 0
    assert request.stats.computed_tokens == 4
    assert request.stats.fetch_seconds > 0
    (again,) = ask(scheduler, PROMPT)
    host.run(scheduler)
    assert again.stats.restored_tokens == {}
    assert again.stats.cached_tokens == 41
    host.close()
    assert host.tiers.stats()["hub"]["used"] == 0


def test_long_prompts_are_computed_from_where_the_tiers_end(tmp_path):
    stored(tmp_path, PROMPT)
    host = Host(options(tmp_path))
    scheduler = Scheduler(host, max_step_tokens=6, max_running=4)
    (request,) = ask(scheduler, [*PROMPT[:40], *range(50)])
    host.run(scheduler)
    assert request.stats.restored_tokens == {"disk": 40}
    assert request.stats.computed_tokens == 52


def test_two_of_one_prompt_read_it_once_and_both_are_right(tmp_path):
    stored(tmp_path, PROMPT)
    host = Host(options(tmp_path))
    scheduler = Scheduler(host)
    requests = ask(scheduler, PROMPT, [*PROMPT[:40], 7, 7, 7])
    host.run(scheduler)
    assert [r.stats.computed_tokens for r in requests] == [4, 5]
    assert host.tiers.stats()["stores"]["disk"]["read"] == 10


def test_siblings_at_once_share_what_the_tiers_have_of_a_namespace_above(tmp_path):
    with Host(options(tmp_path), hierarchical=True).tiers as tiers:
        tiers._pages.serve(PROMPT, "a")
        tiers.pump()
    host = Host(options(tmp_path), hierarchical=True)
    scheduler = Scheduler(host)
    requests = [ask(scheduler, [*PROMPT[:40], i], namespace=f"a/{i}")[0] for i in range(3)]
    host.run(scheduler)
    assert [r.stats.restored_tokens for r in requests] == [{"disk": 40}, {}, {}]
    assert [r.stats.cached_tokens for r in requests] == [0, 40, 40]
    assert [r.stats.computed_tokens for r in requests] == [3] * 3
    assert host.tiers.stats()["stores"]["disk"]["read"] == 10
    assert host.cache.namespaces()["a"].pages == 10  # and not thirty of theirs
    host.close()


def test_requests_whose_pages_load_are_passed_over_and_hold_nobody_up():
    store = Faulty(0, "hang")
    host = Host(TierOptions(threads=1), stores=[store], num_pages=600)
    host.tiers.planner.deadline = lambda tokens: 0.4
    scheduler = Scheduler(host)
    running, _ = ask(scheduler, [1, 2], PROMPT, max_new_tokens=1000)  # the first has no page below to wait for
    start = time.monotonic()
    while time.monotonic() - start < 0.2:
        host.run(scheduler, 1)
    assert len(running.tokens) > 10
    assert [r.prompt.tolist() for r in scheduler.waiting] == [PROMPT]
    while scheduler.waiting and time.monotonic() - start < 5:
        host.run(scheduler, 1)
    assert 0.35 < time.monotonic() - start < 2  # its deadline: it is computed
    assert scheduler.waiting == []
    store.hang.set()
    host.close()


def test_a_request_alone_waits_for_its_pages_and_no_longer_than_its_deadline():
    store = Faulty(0, "hang")
    host = Host(TierOptions(threads=1), stores=[store])
    host.tiers.planner.deadline = lambda tokens: 0.2
    scheduler = Scheduler(host)
    (request,) = ask(scheduler, PROMPT)
    start = time.monotonic()
    host.run(scheduler)
    assert 0.2 <= time.monotonic() - start < 2
    assert request.tokens == answer(PROMPT, 3)
    store.hang.set()
    host.close()


def test_what_a_preempted_request_lost_is_fetched_again(tmp_path):
    stored(tmp_path, *([i] * 41 for i in range(4)))
    host = Host(options(tmp_path, capacity=400 * 4096), num_pages=72)
    scheduler = Scheduler(host)
    requests = ask(scheduler, *([i] * 41 for i in range(4)), max_new_tokens=120)
    host.run(scheduler)
    assert [r.tokens for r in requests] == [answer([i] * 41, 120) for i in range(4)]
    assert sum(r.stats.preemptions for r in requests) > 0
    assert all(r.stats.restored_tokens["disk"] == 40 for r in requests)
    assert sum(r.stats.restored_tokens.get("ram", 0) for r in requests) > 0
    assert sum(r.stats.computed_tokens for r in requests) < 4 * 121 + 4 * 4 * sum(r.stats.preemptions for r in requests)
    host.cache.evict(72)
    assert host.cache.stats().free == 72


def test_a_request_that_ends_while_it_waits_lets_go_of_its_pages(tmp_path):
    stored(tmp_path, PROMPT)
    host = Host(options(tmp_path))
    scheduler = Scheduler(host, max_running=1)
    first, second = ask(scheduler, [1] * 9, PROMPT)
    host.run(scheduler, 1)
    assert host.tiers.stats()["hub"]["used"] == 10
    scheduler.cancel(second)
    assert host.tiers.stats()["hub"]["used"] == 0
    host.run(scheduler)
    assert first.done


def test_what_the_pool_lost_before_the_fetched_pages_is_fetched_as_well(tmp_path):
    stored(tmp_path, PROMPT)
    host = Host(options(tmp_path))
    host.serve(PROMPT[:21])
    scheduler = Scheduler(host, max_running=1)
    _, request = ask(scheduler, [1] * 9, PROMPT)
    host.run(scheduler, 1)  # fetched from its sixth page on
    host.cache.evict(64)
    host.run(scheduler)
    assert request.stats.computed_tokens == 4


@pytest.mark.parametrize("seed", range(8))
def test_any_traffic_gets_the_same_answers(tmp_path, seed):
    """Small pools and hubs, stores that fail, evictions, clears and cancels in between: rows are checked in `run`."""
    rng = random.Random(seed)
    store = Faulty(rng.randrange(200), rng.choice(["raise", "flip", "truncate"]))
    host = Host(
        options(tmp_path, ram=rng.choice([3, 8, 64]) * 4096, capacity=rng.choice([8, 64]) * 4096),
        num_pages=rng.choice([24, 40]),
        stores=[store],
    )
    scheduler = Scheduler(host, max_step_tokens=rng.choice([8, 2048]), max_running=rng.choice([2, 8]))
    asked = []
    for _ in range(60):
        prompt = [rng.randrange(2)] * (4 * rng.randrange(6)) + [rng.randrange(3) for _ in range(rng.randrange(1, 20))]
        asked += ask(scheduler, prompt, max_new_tokens=rng.randrange(1, 12), namespace=rng.choice(["", "b"]))
        host.run(scheduler, rng.randrange(4))
        if rng.random() < 0.2:
            host.cache.evict(rng.randrange(24))
        if rng.random() < 0.05:
            host.tiers.clear(rng.choice([None, "", "b"]))
        if rng.random() < 0.1:
            scheduler.cancel(asked[-1])
    host.run(scheduler)
    for request in asked:
        if request.status != "cancelled":
            assert request.tokens == answer(request.prompt.tolist(), request.max_new_tokens)
    assert sum(sum(r.stats.restored_tokens.values()) for r in asked) > 0
    assert host.tiers.stats()["hub"]["used"] == 0
    host.cache.evict(40)
    assert host.cache.stats().free == host.num_pages
    host.close()
