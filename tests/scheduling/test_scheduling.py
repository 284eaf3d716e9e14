"""The scheduler without a model: who runs next, on which pages, and what it costs where pages are few."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from radixkv import InvalidArgument, InvalidTokens, LeaseError, PoolExhausted, QueueFull
from radixkv.scheduling import Request, Scheduler
from tests.scheduling.helpers import Host, answer, crowd, run, run_step

ROOT = Path(__file__).parents[2]


def submitted(scheduler: Scheduler, *requests: Request) -> list[Request]:
    for request in requests:
        scheduler.submit(request)
    return list(requests)


def assert_answered(requests: list[Request]) -> None:
    for request in requests:
        assert request.tokens == answer(request.prompt.tolist(), request.max_new_tokens)
        assert request.status == "length"


def recomputed(request: Request) -> int:
    """Tokens that were run through the model more than once."""
    stats = request.stats
    return stats.computed_tokens + stats.cached_tokens - (request.num_tokens - 1)


# --- a loop -----------------------------------------------------------------------------------------------------------


def test_it_needs_no_torch():
    code = """
import sys
from radixkv.scheduling import Scheduler
from tests.scheduling.helpers import Host, crowd, run
scheduler = Scheduler(Host(100))
for request in crowd(4, 30, 10):
    scheduler.submit(request)
run(scheduler)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("limits", [(2048, 256), (40, 3), (7, 7)])
def test_every_request_gets_its_tokens(page_size, limits):
    host = Host(600 // page_size, page_size)
    scheduler = Scheduler(host, max_step_tokens=limits[0], max_running=limits[1])
    requests = submitted(scheduler, *crowd(12, 150, 80, shared=40))
    while batch := scheduler.next():
        assert sum(lease.num_tokens - lease.num_written for lease in batch.leases) <= limits[0]
        assert len(scheduler.running) <= limits[1]
        scheduler.accept(run_step(batch))
        host.cache.check()
    assert_answered(requests)
    assert not scheduler.unfinished
    assert scheduler.next() is None
    assert host.drains()


def test_who_draws_and_from_which_row():
    scheduler = Scheduler(Host(100), max_step_tokens=8, max_running=8)
    short, long = submitted(scheduler, Request([1, 2, 3], 4), Request(list(range(10, 20)), 4))
    batch = scheduler.next()
    assert (batch.requests, batch.drawing, batch.rows) == ([short, long], [short], [0])
    scheduler.accept(run_step(batch))
    samples = [Request([5, 6], 2) for _ in range(3)]
    scheduler.submit(*samples)
    batch = scheduler.next()
    assert batch.requests == [short, long, samples[0]]
    assert (batch.drawing, batch.rows) == ([short, long, *samples], [0, 1, 2, 2, 2])
    scheduler.accept(run_step(batch))
    assert scheduler.running == [short, long, *samples]
    run(scheduler)
    assert_answered([short, long, *samples])
    assert [sample.siblings for sample in samples] == [tuple(samples)] * 3


def test_samples_beyond_max_running_wait_for_their_turn():
    scheduler = Scheduler(Host(100), max_running=2)
    samples = [Request([5, 6, 7], 4) for _ in range(5)]
    scheduler.submit(*samples)
    while batch := scheduler.next():
        assert len(batch.leases) <= 2
        scheduler.accept(run_step(batch))
        assert len(scheduler.running) <= 2
    assert_answered(samples)


def test_a_step_that_was_not_run_or_not_accepted_is_repeated():
    chance = random.Random(1)
    host = Host(40, 4)
    scheduler = Scheduler(host, max_step_tokens=30, max_running=10)
    requests = submitted(scheduler, *crowd(8, 30, 20))
    while batch := scheduler.next():
        fate = chance.choice(["lost", "run", "abandoned", "accepted", "accepted"])
        if fate == "abandoned":
            scheduler.abandon()
            assert all(lease.released for lease in batch.leases)
        elif fate != "lost":
            tokens = run_step(batch)
            if fate == "accepted":
                scheduler.accept(tokens)
        host.cache.check()
    assert_answered(requests)
    assert host.drains()


def test_what_an_abandoned_step_leaves_is_not_published():
    host = Host(100, 4)
    scheduler = Scheduler(host)
    request = Request([1, 2, 3, 4, 5], 8)
    scheduler.submit(request)
    for _ in range(3):
        scheduler.accept(run_step(scheduler.next()))
    scheduler.next()
    scheduler.abandon()
    assert (request.status, host.cache.stats().num_leases) == ("waiting", 0)
    assert host.cache.match([*request.prompt, *request.tokens]) == 5
    run(scheduler)
    assert_answered([request])


def test_stop_tokens_and_statistics():
    scheduler = Scheduler(Host(100))
    expected = answer([1, 2, 3], 10)
    stopped = Request([1, 2, 3], 10, stop_tokens=[expected[4]])
    scheduler.submit(stopped)
    run(scheduler)
    assert (stopped.status, stopped.tokens) == ("stop", expected[:5])
    stats = stopped.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.computed_tokens, stats.generated_tokens) == (3, 0, 7, 5)
    again = Request(np.array([1, 2, 3, *expected[:3]]), 1)
    scheduler.submit(again)
    run(scheduler)
    assert (again.stats.cached_tokens, again.stats.computed_tokens) == (5, 1)
    assert stats.time_to_first_token > 0


@pytest.mark.parametrize("when", ["waiting", "chosen", "run", "between"])
def test_cancel_at_any_time_and_the_siblings_go_on(when):
    host = Host(100)
    scheduler = Scheduler(host)
    other, *samples = [Request([9, 8, 7], 6), *(Request([5, 6], 6) for _ in range(3))]
    scheduler.submit(other)
    scheduler.submit(*samples)
    if when != "waiting":
        batch = scheduler.next()
        tokens = run_step(batch) if when != "chosen" else []
        if when == "between":
            scheduler.accept(tokens)
    assert scheduler.cancel(samples[0])
    assert not scheduler.cancel(samples[0])
    if when == "run":
        scheduler.accept(tokens)
        assert len(other.tokens) == 1
    run(scheduler)
    assert samples[0].status == "cancelled"
    assert len(samples[0].tokens) == (when == "between")
    assert_answered([other, *samples[1:]])
    assert host.drains()


def test_fail_ends_a_request_even_after_its_last_token():
    scheduler = Scheduler(Host(100))
    early, late = submitted(scheduler, Request([1], 5), Request([2], 1))
    scheduler.accept(run_step(scheduler.next()))
    error = ConnectionError("client is gone")
    for request in (early, late):
        scheduler.fail(request, error)
        assert (request.status, request.error, len(request.tokens)) == ("error", error, 1)
    assert not scheduler.unfinished


# --- order ------------------------------------------------------------------------------------------------------------


def test_an_order_decides_who_is_admitted_first_and_equal_keys_go_by_arrival():
    scheduler = Scheduler(Host(100), max_running=1, policy=lambda r: -r.priority)
    requests = submitted(scheduler, *(Request([i, i], 2, priority=p) for i, p in enumerate([0, 1, 0, 2, 1])))
    finished = []
    while batch := scheduler.next():
        scheduler.accept(run_step(batch))
        finished += [r.id for r in batch.requests if r.done]
    assert finished == [3, 1, 4, 0, 2]
    assert_answered(requests)


@pytest.mark.parametrize("key", ["x", None, 1j, np.zeros(2)], ids=str)
def test_a_key_that_cannot_be_sorted_is_refused_where_it_comes(key):
    """And not in the middle of a step, when its request would be in no list any more."""
    host, keys = Host(num_pages=40), iter([1, key, 2, key])
    scheduler = Scheduler(host, policy=lambda request: next(keys))
    first = Request([1, 2, 3], max_new_tokens=4)
    scheduler.submit(first)
    with pytest.raises(InvalidArgument, match="policy gives the key .* cannot be compared with 1 of request 0"):
        scheduler.submit(Request([4, 5, 6]))
    run_step(scheduler.next())  # the first runs now
    twin, other = Request([7, 8], max_new_tokens=4), Request([7, 8])
    with pytest.raises(InvalidArgument, match="cannot be compared with 2 of request"):
        scheduler.submit(twin, other)
    assert [twin.owner, other.owner] == [None, None]
    run(scheduler)
    assert first.tokens == answer([1, 2, 3], 4)
    assert host.drains()


def test_an_order_decides_who_is_preempted():
    scheduler = Scheduler(Host(60, 4), policy=lambda r: -r.priority)
    requests = submitted(scheduler, *(Request([i] * 12, 150, priority=i) for i in range(3)))
    run(scheduler)
    assert_answered(requests)
    assert requests[2].stats.preemptions == 0
    assert preemptions_of(requests[:2]) > 0


def preemptions_of(requests: list[Request]) -> int:
    return sum(request.stats.preemptions for request in requests)


def test_the_first_in_order_is_never_preempted_and_the_oldest_never_starves():
    """An endless queue of newer requests over a pool for two: each request ends in bounded time."""
    scheduler = Scheduler(Host(64, 4), max_step_tokens=64, max_running=16)
    alive: list[Request] = []
    for step in range(2000):
        if step % 3 == 0:
            [request] = crowd(1, 30, 120, seed=step)
            scheduler.submit(request)
            alive.append(request)
        first = next(request for request in alive if not request.done)
        before = first.stats.preemptions
        scheduler.accept(run_step(scheduler.next()))
        assert first.stats.preemptions == before
    assert preemptions_of(alive) > 0
    assert all(request.done for request in alive[:50])


def test_an_order_that_ages_starves_nobody():
    scheduler = Scheduler(Host(100), max_running=1, policy=lambda r: r.id - 10 * r.priority)
    patient = Request([1, 2], 2)
    for i in range(5):
        scheduler.submit(Request([3, i], 2, priority=1))
    scheduler.submit(patient)
    for i in range(40):
        scheduler.submit(Request([4, i], 2, priority=1))
    steps = 0
    while not patient.done:
        scheduler.accept(run_step(scheduler.next()))
        steps += 1
    assert steps == 2 * (5 + 9 + 1), "it waits for those that came before it, and for nine that overtake it"


# --- few pages --------------------------------------------------------------------------------------------------------


def measured(requests: list[Request], num_pages: int) -> tuple[int, float, int]:
    """Preemptions, tokens computed again as a share of all, and steps."""
    scheduler = Scheduler(Host(num_pages))
    submitted(scheduler, *requests)
    steps = run(scheduler)["steps"]
    assert_answered(requests)
    again = sum(map(recomputed, requests)) / sum(request.num_tokens - 1 for request in requests)
    return preemptions_of(requests), again, steps


@pytest.mark.parametrize("shared", [0, 512])
def test_headroom_for_decoding_keeps_a_tight_pool_from_preempting_at_every_step(monkeypatch, shared):
    """64 requests of up to 512 new tokens over 400 pages, where some twenty run at once."""
    case = {"count": 64, "prompt": 128, "answers": 512, "shared": shared}
    preemptions, again, steps = measured(crowd(**case), 400)
    assert preemptions <= 24
    assert again <= 0.16
    monkeypatch.setattr("radixkv.scheduling.space.HEADROOM", 0)
    preemptions_without, again_without, steps_without = measured(crowd(**case), 400)
    assert preemptions_without >= 4 * preemptions
    assert again_without >= 3 * again
    assert steps <= 1.15 * steps_without


def test_headroom_is_not_asked_of_a_request_that_runs_alone():
    scheduler = Scheduler(Host(8, 4))
    requests = submitted(scheduler, *(Request([i] * 20, 13) for i in range(3)))
    run(scheduler)
    assert_answered(requests)
    assert preemptions_of(requests) == 0


def test_a_prefix_that_running_requests_hold_takes_no_headroom():
    """Forty pages are shared: they are counted once, so all run at once."""
    scheduler = Scheduler(Host(64))
    system = list(range(640))
    first = Request([*system, 1], 30)
    scheduler.submit(first)
    scheduler.accept(run_step(scheduler.next()))
    others = submitted(scheduler, *(Request([*system, i], 10) for i in range(2, 6)))
    batch = scheduler.next()
    assert batch.requests == [first, *others]
    scheduler.accept(run_step(batch))
    run(scheduler)
    assert_answered([first, *others])


@pytest.mark.parametrize("hierarchical", [True, False])
def test_simultaneous_arrivals_in_a_namespace_and_below_it_compute_their_prefix_once(hierarchical):
    """A request of "a/b" waits for one of "a" that computes the same prefix, and never for a sibling's or a child's."""
    system = list(range(640))
    for first, second, waits in (("a", "a/b", True), ("a", "a/b/c", True), ("a/b", "a", False), ("a/b", "a/c", False)):
        scheduler = Scheduler(Host(200, hierarchical=hierarchical))
        requests = submitted(
            scheduler, Request([*system, 1], 3, namespace=first), Request([*system, 2], 3, namespace=second)
        )
        batch = scheduler.next()
        assert batch.requests == requests[: 1 if hierarchical and waits else 2]
        scheduler.accept(run_step(batch))
        run(scheduler)
        assert_answered(requests)
        assert requests[1].stats.cached_tokens == (640 if hierarchical and waits else 0)


def test_a_prefix_that_a_namespace_above_holds_takes_no_headroom():
    system = list(range(640))
    scheduler = Scheduler(Host(64, hierarchical=True))
    first = Request([*system, 1], 30, namespace="a")
    scheduler.submit(first)
    scheduler.accept(run_step(scheduler.next()))
    others = submitted(scheduler, *(Request([*system, i], 10, namespace=f"a/{i}") for i in range(2, 6)))
    batch = scheduler.next()
    assert batch.requests == [first, *others]
    scheduler.accept(run_step(batch))
    run(scheduler)
    assert_answered([first, *others])


def test_a_prompt_that_is_computed_in_chunks_counts_whole():
    """The hit rate is of all its tokens, not of those in its first chunk."""
    host = Host(200)
    scheduler = Scheduler(host, max_step_tokens=100, max_running=4)
    requests = submitted(scheduler, Request(list(range(950)), 5), Request([1] * 30, 5))
    run(scheduler)
    assert_answered(requests)
    stats = host.cache.stats()
    assert (stats.requests, stats.input_tokens, stats.hit_tokens) == (2, 980, 0)


def test_samples_that_would_be_preempted_at_once_wait():
    """40 tokens of a prompt and 24 more of each sample: the pool has room for four of these."""
    scheduler = Scheduler(Host(34, 4))
    samples = [Request(list(range(40)), 25) for _ in range(8)]
    scheduler.submit(*samples)
    scheduler.accept(run_step(scheduler.next()))
    assert len(scheduler.running) == 4
    assert [len(sample.tokens) for sample in samples] == [1] * 8
    run(scheduler)
    assert_answered(samples)
    assert preemptions_of(samples) == 0


@pytest.mark.parametrize("num_pages", [4, 9, 14])
def test_behind_a_window_answers_outgrow_the_pool(monkeypatch, num_pages):
    monkeypatch.setattr("radixkv.scheduling.space.HEADROOM", 0)
    host = Host(num_pages, 4)
    scheduler = Scheduler(host, window_left=8)
    requests = submitted(scheduler, *(Request([7, i], 200) for i in range(4)))
    while batch := scheduler.next():
        scheduler.accept(run_step(batch))
        host.cache.check()
    assert_answered(requests)
    assert requests[0].stats.preemptions == 0
    assert host.drains()


def test_pages_held_outside_are_an_error_and_nothing_is_lost():
    host = Host(8, 4)
    scheduler = Scheduler(host)
    request = Request([1] * 10, 20)
    scheduler.submit(request)
    with host.cache.acquire([2] * 16), pytest.raises(PoolExhausted):
        run(scheduler)
    run(scheduler)
    assert_answered([request])


# --- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt": []}, InvalidTokens, "non-empty"),
        ({"prompt": [1.5]}, InvalidTokens, "integers"),
        ({"prompt": [2**31]}, InvalidTokens, "0 to 2147483647"),
        ({"max_new_tokens": 0}, InvalidArgument, "max_new_tokens is 0: give at least 1"),
        ({"stop_tokens": 5}, InvalidArgument, r"stop_tokens is 5.*\[5\]"),
        ({"namespace": None}, InvalidArgument, "namespace is None"),
    ],
)
def test_bad_requests_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Request(**{"prompt": [1], **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_step_tokens": 0}, "max_step_tokens is 0"),
        ({"max_running": 1.5}, "max_running is 1.5"),
        ({"window_left": -2}, "window_left is -2"),
        ({"max_step_tokens": 4, "max_running": 5}, "max_running is 5, max_step_tokens 4"),
    ],
)
def test_bad_limits_are_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        Scheduler(Host(8), **options)


def test_bad_submissions_are_refused_and_nothing_is_submitted():
    scheduler = Scheduler(Host(8, 4))
    once = Request([1, 2], 3)
    scheduler.submit(once)
    twice = Request([1, 2], 3)
    for bad in [(once,), (), (twice, twice), (twice, Request([1, 3], 3)), (twice, Request([1, 2], 3, namespace="a"))]:
        with pytest.raises(InvalidArgument, match="submi"):
            scheduler.submit(*bad)
    with pytest.raises(PoolExhausted, match="need 13 pages; the pool has 8"):
        scheduler.submit(Request([1, 2], 50))
    for call in (scheduler.submit, scheduler.cancel, lambda prompt: scheduler.fail(prompt, ValueError())):
        with pytest.raises(InvalidArgument, match=r"\[1, 2, 3\] is no Request"):
            call([1, 2, 3])
    with pytest.raises(InvalidArgument, match="error is 'oops': give an exception"):
        scheduler.fail(once, "oops")
    assert scheduler.waiting == [once]
    scheduler.submit(twice)
    with pytest.raises(InvalidArgument, match="not submitted to this Scheduler"):
        Scheduler(Host(8)).cancel(once)
    closed = Host(8)
    closed.cache.close()
    with pytest.raises(LeaseError, match="closed"):
        Scheduler(closed).submit(Request([1]))


def test_tokens_that_fit_no_batch_are_refused_and_change_nothing():
    scheduler = Scheduler(Host(8))
    with pytest.raises(LeaseError, match=r"call next\(\)"):
        scheduler.accept([1])
    request = Request([1, 2], 3)
    scheduler.submit(request)
    batch = scheduler.next()
    with pytest.raises(LeaseError, match="before the step"):
        scheduler.accept([1])
    tokens = run_step(batch)
    for bad, error in [([], InvalidArgument), ([1, 2], InvalidArgument), ([-1], InvalidTokens), ([1.0], InvalidTokens)]:
        with pytest.raises(error):
            scheduler.accept(bad)
    assert request.tokens == []
    scheduler.accept(tokens)
    with pytest.raises(LeaseError, match="once"):
        scheduler.accept(tokens)
    run(scheduler)
    assert_answered([request])


# --- any order of calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_calls_gives_the_same_tokens(monkeypatch, seed):
    chance = random.Random(seed)
    monkeypatch.setattr("radixkv.scheduling.space.HEADROOM", chance.choice([0, 0, 8, 64]))
    size = chance.choice([1, 3, 4, 16])
    window = chance.choice([-1, -1, 8])
    host = Host(chance.choice([100, 160, 240]) // size, size)
    order = chance.choice([lambda r: r.id, lambda r: -len(r.prompt), lambda r: 0])
    step_tokens = chance.choice([6, 20, 400])
    scheduler = Scheduler(host, max_step_tokens=step_tokens, max_running=6, window_left=window, policy=order)
    prompts = [[*range(100, 100 + n), n] for n in (1, 5, 12, 20, 40)]
    requests: list[Request] = []
    for _ in range(200):
        action = chance.random()
        if action < 0.2:
            prompt, new = chance.choice(prompts), chance.randint(1, 40)
            group = [Request(prompt, new) for _ in range(chance.choice([1, 1, 3]))]
            scheduler.submit(*group)
            requests += group
        elif action < 0.25 and requests:
            scheduler.cancel(chance.choice(requests))
        elif batch := scheduler.next():
            if action < 0.3:
                scheduler.abandon()
            else:
                tokens = run_step(batch)
                if action < 0.35:
                    scheduler.cancel(chance.choice(batch.drawing or batch.requests))
                if action < 0.95:
                    scheduler.accept(tokens)
        host.cache.check()
    run(scheduler)
    for request in requests:
        assert request.done
        assert request.tokens == answer(request.prompt.tolist(), len(request.tokens))
        assert request.status == "cancelled" or len(request.tokens) == request.max_new_tokens
    assert host.drains()


# --- policies, deadlines, a queue that is full ------------------------------------------------------------------------


def test_priority_overtakes_a_hundred_requests_a_step_and_no_more():
    scheduler = Scheduler(Host(100), max_running=1, policy="priority")
    submitted(scheduler, *(Request([i % 50, i // 50], 1) for i in range(250)))
    urgent, low = submitted(scheduler, Request([1, 2], 1, priority=1), Request([3, 4], 1, priority=-1))
    assert (scheduler.waiting.index(urgent), scheduler.waiting.index(low)) == (151, 251)
    later = submitted(scheduler, *(Request([5, 6], 1) for _ in range(120)))
    assert scheduler.waiting.index(low) == 251 + 99
    assert scheduler.waiting[-20:] == later[-20:]


def test_a_priority_that_the_policy_ignores_is_refused():
    scheduler = Scheduler(Host(8))
    with pytest.raises(InvalidArgument, match="priority is 3.*policy='priority'"):
        scheduler.submit(Request([1], priority=3))
    with pytest.raises(InvalidArgument, match="policy is 'lifo': give 'arrival'"):
        Scheduler(Host(8), policy="lifo")


class Clock:
    time = 100.0

    def __call__(self):
        return self.time


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in ("clock", "scheduler"):
        monkeypatch.setattr(f"radixkv.scheduling.{module}.now", clock)
    return clock


def test_a_deadline_ends_waiting_and_running_requests_with_what_they_have(clock):
    host = Host(100)
    scheduler = Scheduler(host, max_running=1)
    running, waiting, patient = submitted(
        scheduler, Request([1], 50, deadline=10), Request([2], 5, deadline=5), Request([3], 5)
    )
    for _ in range(3):
        clock.time += 2
        scheduler.accept(run_step(scheduler.next()))
    assert (waiting.status, waiting.tokens) == ("deadline", [])
    clock.time += 5
    assert scheduler.next().requests == [patient]
    assert (running.status, running.tokens) == ("deadline", answer([1], 3))
    run(scheduler)
    assert_answered([patient])
    assert host.drains()


def test_requests_with_deadlines_that_are_done_are_forgotten(clock):
    scheduler = Scheduler(Host(100))
    for i in range(1000):
        scheduler.submit(Request([i], 1, deadline=1e6))
        run(scheduler)
    assert len(scheduler._deadlines._heap) <= 64


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), "5", True])
def test_bad_deadlines_are_refused(deadline):
    with pytest.raises(InvalidArgument, match="deadline is"):
        Request([1], deadline=deadline)


def test_a_full_queue_refuses_and_takes_again_when_it_is_shorter():
    scheduler = Scheduler(Host(100), max_running=1, max_waiting=2)
    requests = submitted(scheduler, Request([1], 2), Request([2], 2))
    with pytest.raises(QueueFull, match="2 requests wait, max_waiting is 2"):
        scheduler.submit(Request([3], 2))
    scheduler.accept(run_step(scheduler.next()))
    requests += submitted(scheduler, Request([3], 2))
    run(scheduler)
    assert_answered(requests)


def test_the_wait_is_estimated_from_how_fast_requests_end(clock):
    scheduler = Scheduler(Host(100), max_running=2)
    assert scheduler.estimated_wait() == 0
    submitted(scheduler, *(Request([i], 2) for i in range(40)))
    assert scheduler.estimated_wait() is None
    for _ in range(20):  # two requests end every two seconds
        scheduler.accept(run_step(scheduler.next()))
        clock.time += 1
    submitted_at, wait = clock.time, scheduler.estimated_wait()
    [last] = submitted(scheduler, Request([99], 2))
    while last.status == "waiting":
        scheduler.accept(run_step(scheduler.next()))
        clock.time += 1
    assert wait == pytest.approx(clock.time - submitted_at, abs=2)


def test_a_step_that_failed_is_handed_out_again_one_request_at_a_time():
    host = Host(100)
    scheduler = Scheduler(host)
    first, poison, *samples = requests = [Request([1, 2, 3], 4), Request([66], 4), *(Request([7], 3) for _ in range(3))]
    submitted(scheduler, first, poison)
    scheduler.submit(*samples)
    for _ in range(2):
        scheduler.next()
        for alone in scheduler.apart():
            assert len(alone.leases) == 1
            if poison in alone.requests:
                scheduler.fail(poison, ValueError("poison"), commit=False)
            else:
                scheduler.accept(run_step(alone))
    assert host.cache.match([66, 1]) == 0
    assert first.stats.preemptions == 0
    run(scheduler)
    assert poison.status == "error"
    assert_answered([request for request in requests if request is not poison])
    assert first.stats.computed_tokens == 3 + 3
    assert host.drains()


def test_a_long_prompt_is_not_printed():
    request = Request(list(range(500)), 5, namespace="a")
    assert repr(request) == "Request(id=-1, waiting, 500 prompt tokens, 0 of 5 new, namespace='a')"


def test_what_a_request_that_ends_its_session_alone_used_goes_first():
    """And not what it shares, nor what a preemption gave back that it will want again."""
    system, host = list(range(500, 532)), Host(num_pages=24, page_size=4)
    scheduler = Scheduler(host)
    for user, cold in enumerate((False, True, False)):
        scheduler.submit(Request(system + [user] * 8, 4, cold=cold))
        run(scheduler)
    last = system + [1] * 8
    assert host.cache.match(last) == 40
    host.cache.evict(2)
    assert [host.cache.match(system + [user] * 8) for user in range(3)] == [40, 36, 40]
    host.cache.evict(1)
    assert [host.cache.match(system + [user] * 8) for user in range(3)] == [40, 32, 40]
    assert host.drains()


def test_cold_is_true_or_false():
    with pytest.raises(InvalidArgument, match="cold is 'yes': give True"):
        Request([1], cold="yes")


def test_a_request_that_its_quota_could_never_hold_is_refused_at_submission():
    host = Host(num_pages=20)
    host.cache.set_quota("small", ceiling=4)
    host.cache.set_quota("kept", floor=15)
    scheduler = Scheduler(host)
    too_long = Request([1] * 80, max_new_tokens=1, namespace="small")
    with pytest.raises(PoolExhausted, match="need 5 pages; the pool has 4.*all that namespace 'small' may have"):
        scheduler.submit(too_long)
    with pytest.raises(PoolExhausted, match="the pool has 5"):
        scheduler.submit(Request([1] * 90, max_new_tokens=1))


def test_requests_of_a_namespace_at_its_ceiling_wait_for_each_other_and_all_end():
    host = Host(num_pages=40)
    host.cache.set_quota("small", ceiling=6)
    scheduler = Scheduler(host)
    requests = submitted(
        scheduler, *(Request([i] * 30, max_new_tokens=40, namespace=("small", "other")[i % 2]) for i in range(8))
    )
    while batch := scheduler.next():
        scheduler.accept(run_step(batch))
        assert host.cache.namespaces()["small"].pages <= 6
    assert_answered(requests)
    assert host.drains()


def test_what_a_request_says_of_itself_is_short():
    assert len(repr(Request(range(100_000), namespace="x" * 10_000))) < 120
