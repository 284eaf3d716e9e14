"""Guesses in the scheduler: whatever is guessed, the tokens are the same, and nothing that was wrong is left behind."""

from __future__ import annotations

import random

import pytest

from radixkv import InvalidArgument, InvalidTokens
from radixkv.scheduling import Request, Scheduler
from tests.scheduling.helpers import Host, answer, run, run_step


class Guessing(Request):
    """Guesses right with a probability `luck`, token by token."""

    luck = 1.0
    chance = random.Random(0)

    def draft(self, count):
        known = answer(self.prompt.tolist(), len(self.tokens) + count)[len(self.tokens) :]
        return [token if self.chance.random() < self.luck else 1 for token in known]


def guessing(prompt, count, luck=1.0):
    request = Guessing(prompt, count)
    request.luck = luck
    return request


def test_right_guesses_save_steps():
    host = Host(20)
    scheduler = Scheduler(host)
    request = guessing(range(10), 9)
    scheduler.submit(request)
    counts = run(scheduler)
    assert request.tokens == answer(range(10), 9)
    assert counts["steps"] == 2  # the prompt, and then all at once
    assert request.stats.drafted_tokens == request.stats.accepted_tokens == 7
    assert host.drains()
    assert host.cache.match([*range(10), *request.tokens]) == 18


def test_wrong_guesses_leave_nothing_behind():
    host = Host(20, page_size=4)
    journal = host.cache.journal()
    scheduler = Scheduler(host)
    request = guessing(range(10), 12, luck=0.0)
    scheduler.submit(request)
    counts = run(scheduler)
    assert request.tokens == answer(range(10), 12)
    assert counts["steps"] == 12
    assert (request.stats.drafted_tokens, request.stats.accepted_tokens) == (sum(range(11)), 0)
    assert host.cache.match([*range(10), request.tokens[0], 1]) == 11
    assert host.cache.stats().evictable == 6
    ((release,), _, _) = journal.releases(0)
    assert release.tokens.tolist() == [*range(10), *request.tokens[:-1]]
    assert host.drains()


def test_no_guess_goes_beyond_the_last_token():
    scheduler = Scheduler(Host(20))
    request = guessing(range(3), 3)
    scheduler.submit(request)
    scheduler.accept(run_step(scheduler.next()))
    batch = scheduler.next()
    assert len(request.drafts) == 1
    assert batch.logit_rows == [0, 1]
    scheduler.accept(run_step(batch))
    assert request.status == "length"


def test_a_stop_token_among_the_guesses_ends_it_there():
    host = Host(20)
    scheduler = Scheduler(host)
    said = answer(range(5), 12)
    request = Guessing(range(5), 12, frozenset({said[4]}))
    scheduler.submit(request)
    run(scheduler)
    assert request.tokens == said[:5]
    assert request.status == "stop"
    assert request.stats.accepted_tokens == 4
    assert host.cache.match([*range(5), *said]) == 9
    assert host.drains()


def test_guesses_take_rows_and_pages_that_nobody_wants():
    host = Host(5, page_size=4)
    scheduler = Scheduler(host, max_step_tokens=6, max_running=2)
    first, second = guessing(range(4), 8), guessing(range(50, 54), 8)
    scheduler.submit(first)
    scheduler.submit(second)
    run(scheduler)
    for request in (first, second):
        assert request.tokens == answer(request.prompt.tolist(), 8)
    assert second.stats.preemptions <= 1
    assert host.drains()


def test_which_rows_the_logits_are_of():
    scheduler = Scheduler(Host(40), max_step_tokens=20, max_running=4)
    plain, guesses = Request(range(3), 9), guessing(range(20, 24), 9)
    scheduler.submit(plain)
    scheduler.submit(guesses)
    scheduler.accept(run_step(scheduler.next()))
    long = Request(range(40, 80), 2)
    scheduler.submit(long)
    batch = scheduler.next()
    assert batch.requests == [plain, guesses, long]
    assert guesses.drafts == []  # the long prompt takes every row
    while guesses.drafts == []:
        scheduler.accept(run_step(batch))
        batch = scheduler.next()
    assert batch.drawing[:2] == [plain, guesses]
    assert batch.rows[:2] == [0, 1]
    assert batch.logit_rows[:3] == [0, 1, 2]


@pytest.mark.parametrize(
    "given",
    [
        lambda drafts, right: [*drafts, 5, 6],
        lambda drafts, right: [right[0], 5, 6],
        lambda drafts, right: [5, 6],
    ],
    ids=["too many", "not what was guessed", "a wrong guess that goes on"],
)
def test_tokens_that_cannot_be_are_refused_and_change_nothing(given):
    scheduler = Scheduler(Host(20))
    request = guessing(range(3), 4)
    scheduler.submit(request)
    scheduler.accept(run_step(scheduler.next()))
    batch = scheduler.next()
    right = run_step(batch)
    assert request.drafts == right[0][:-1]
    with pytest.raises(InvalidArgument, match="whose guesses were"):
        scheduler.accept([given(request.drafts, right[0])])
    with pytest.raises(InvalidTokens):
        scheduler.accept([[]])
    assert len(request.tokens) == 1
    scheduler.accept(right)
    assert request.tokens == answer(range(3), 4)


def test_a_guesser_that_raises_loses_nothing():
    host = Host(20)
    scheduler = Scheduler(host)
    fine, broken = guessing(range(3), 6), guessing(range(5), 6)
    scheduler.submit(fine)
    scheduler.submit(broken)
    scheduler.accept(run_step(scheduler.next()))
    broken.draft = lambda count: 1 / 0
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            scheduler.next()
        host.cache.check()
    del broken.draft
    run(scheduler)
    assert fine.tokens == answer(range(3), 6)
    assert broken.tokens == answer(range(5), 6)
    assert host.drains()


def test_guesses_that_are_no_tokens_are_refused():
    scheduler = Scheduler(Host(20))
    request = guessing(range(3), 6)
    scheduler.submit(request)
    scheduler.accept(run_step(scheduler.next()))
    request.draft = lambda count: [-1]
    with pytest.raises(InvalidTokens, match="token -1"):
        scheduler.next()
    del request.draft
    run(scheduler)
    assert request.tokens == answer(range(3), 6)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_calls_gives_the_same_tokens(monkeypatch, seed):
    chance = random.Random(seed)
    monkeypatch.setattr("radixkv.scheduling.space.HEADROOM", chance.choice([0, 8, 64]))
    size = chance.choice([1, 3, 4, 16])
    host = Host(chance.choice([100, 160, 240]) // size, size)
    scheduler = Scheduler(
        host, max_step_tokens=chance.choice([6, 20, 400]), max_running=6, window_left=chance.choice([-1, 8])
    )
    prompts = [[*range(100, 100 + n), n] for n in (1, 5, 12, 20, 40)]
    requests: list[Request] = []
    for _ in range(200):
        action = chance.random()
        if action < 0.2:
            prompt, new = chance.choice(prompts), chance.randint(1, 40)
            group = [guessing(prompt, new, chance.choice([0.0, 0.7, 1.0])) for _ in range(chance.choice([1, 1, 3]))]
            scheduler.submit(*group)
            requests += group
        elif action < 0.25 and requests:
            scheduler.cancel(chance.choice(requests))
        elif batch := scheduler.next():
            if action < 0.3:
                scheduler.abandon()
            elif action < 0.35:
                for alone in scheduler.apart():
                    scheduler.accept(run_step(alone))
            else:
                tokens = run_step(batch)
                if action < 0.4:
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
    published = [(root["namespace"], (), child) for root in host.cache.snapshot() for child in root["children"]]
    right = [request.prompt.tolist() + request.tokens for request in requests]
    while published:
        namespace, before, node = published.pop()
        tokens = (*before, *node["tokens"].tolist())
        assert any(tuple(one[: len(tokens)]) == tokens for one in right)  # no wrong guess was published
        published += [(namespace, tokens, child) for child in node["children"]]
