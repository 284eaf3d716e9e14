"""The generation loop: the same tokens whatever is cached, batched, preempted, forked, cancelled or broken."""

import random

import pytest
import torch

import radixkv.hf.generator
from radixkv import PoolExhausted
from radixkv.hf import Generator, engine_for
from radixkv.hf.sampling import sample
from radixkv.scheduling import space
from tests.hf.helpers import VOCABULARY, assert_drains, random_prompts, stock_tokens, tiny

COUNT = 16
SAMPLED = {"temperature": 1.3, "top_k": 40, "top_p": 0.95}


@pytest.fixture(autouse=True)
def no_headroom(monkeypatch):
    """Preemptions are frequent without it; with it, answers as short as these here are never preempted."""
    monkeypatch.setattr(space, "HEADROOM", 0)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def prompts():
    shared = random_prompts(24)[0]
    tails = random_prompts(3, 9, 1, 14, seed=5)
    return [shared + tail for tail in tails] + random_prompts(1, 30, seed=6)


@pytest.fixture(scope="module")
def expected(model, prompts):
    return [stock_tokens(model, prompt, COUNT) for prompt in prompts]


@pytest.fixture
def make(model):
    """Generators on engines of their own; each engine must drain at the end of the test."""
    made = []

    def make(num_pages=200, page_size=4, **options):
        made.append(Generator(model, engine_for(model, num_pages=num_pages, page_size=page_size), **options))
        return made[-1]

    yield make
    for generator in made:
        generator.close()
        assert_drains(generator.engine)


def run(generator, prompts, **options):
    requests = [generator.submit(prompt, max_new_tokens=COUNT, **options) for prompt in prompts]
    generator.run()
    generator.engine.cache.check()
    return requests


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_cold_warm_and_thrashing_give_the_stock_tokens(make, prompts, expected, page_size):
    longest = max(len(prompt) for prompt in prompts) + COUNT - 1
    smallest = -(-longest // page_size)
    for num_pages in (400, smallest, smallest + 2):
        generator = make(num_pages=num_pages, page_size=page_size)
        for _ in ("cold", "warm"):
            requests = run(generator, prompts)
            assert [request.tokens for request in requests] == expected
            assert {request.status for request in requests} == {"length"}
        preemptions = sum(request.stats.preemptions for request in requests)
        assert (
            (preemptions == 0) if num_pages == 400 else (preemptions + generator.engine.cache.stats().evicted_pages > 0)
        )


def test_preemption_happens_and_loses_nothing(make, prompts, expected):
    requests = run(make(num_pages=24), prompts)
    assert [request.tokens for request in requests] == expected
    assert sum(request.stats.preemptions for request in requests) >= 2
    assert requests[0].stats.preemptions == 0, "the oldest is never preempted"
    for request in requests:
        assert request.stats.generated_tokens == COUNT
        assert request.stats.computed_tokens + request.stats.cached_tokens >= len(request.prompt) + COUNT - 1


def test_sampling_is_reproducible_across_preemption_and_batching(make, prompts):
    roomy = [request.tokens for request in run(make(), prompts, seed=11, **SAMPLED)]
    tight = run(make(num_pages=24), prompts, seed=11, **SAMPLED)
    assert sum(request.stats.preemptions for request in tight) >= 2
    assert [request.tokens for request in tight] == roomy
    alone = make()
    assert [run(alone, [prompt], seed=11, **SAMPLED)[0].tokens for prompt in prompts] == roomy
    assert [request.tokens for request in run(make(), prompts, seed=12, **SAMPLED)] != roomy


@pytest.mark.parametrize("num_pages", [200, 16])
def test_n_samples_are_the_samples_of_consecutive_seeds(make, prompts, num_pages):
    reference = make()
    expected = [run(reference, [prompts[1]], seed=20 + i, **SAMPLED)[0].tokens for i in range(4)]
    assert len({tuple(tokens) for tokens in expected}) == 4
    generator = make(num_pages=num_pages)
    first = generator.submit(prompts[1], max_new_tokens=COUNT, seed=20, n=4, **SAMPLED)
    generator.run()
    assert [sibling.tokens for sibling in first.siblings] == expected
    assert first.siblings[0] is first
    if num_pages == 200:
        assert first.stats.computed_tokens == len(prompts[1]) + COUNT - 1
        for sibling in first.siblings[1:]:
            assert (sibling.stats.cached_tokens, sibling.stats.computed_tokens) == (len(prompts[1]), COUNT - 1)
    else:
        assert sum(sibling.stats.preemptions for sibling in first.siblings) > 0


def test_forks_beyond_max_running_wait_for_their_turn(make, prompts):
    generator = make(max_running=2)
    first = generator.submit(prompts[0], max_new_tokens=3, n=5)
    generator.run()
    assert len({tuple(sibling.tokens) for sibling in first.siblings}) == 1
    assert all(sibling.done for sibling in first.siblings)


@pytest.mark.parametrize("max_step_tokens", [6, 16])
def test_long_prompts_are_computed_in_chunks(make, prompts, expected, max_step_tokens):
    generator = make(max_step_tokens=max_step_tokens, max_running=6)
    requests = [generator.submit(prompt, max_new_tokens=COUNT) for prompt in prompts]
    before = 0
    while generator.step():
        computed = sum(request.stats.computed_tokens for request in requests)
        assert computed - before <= max_step_tokens
        before = computed
    assert [request.tokens for request in requests] == expected


def test_chunks_and_preemption_together(make, prompts, expected):
    requests = run(make(num_pages=20, max_step_tokens=7, max_running=5), prompts)
    assert [request.tokens for request in requests] == expected


def test_requests_join_while_others_run(make, prompts, expected):
    generator = make()
    requests = []
    for prompt in prompts:
        requests.append(generator.submit(prompt, max_new_tokens=COUNT))
        generator.step()
    assert len({len(request.tokens) for request in requests}) > 1
    generator.run()
    assert [request.tokens for request in requests] == expected


def test_a_shared_prefix_is_computed_once_though_submitted_at_once(make, prompts):
    generator = make()
    requests = run(generator, prompts[:4])
    assert [request.stats.cached_tokens for request in requests] == [0, 24, 24, 24]
    again = run(generator, prompts[:4])
    assert [request.stats.cached_tokens for request in again] == [len(prompt) - 1 for prompt in prompts[:4]]


def test_statistics_of_a_conversation(make, prompts, expected):
    generator = make()
    first = run(generator, [prompts[1]])[0]
    assert (first.stats.prompt_tokens, first.stats.cached_tokens) == (33, 0)
    assert first.stats.computed_tokens == 33 + COUNT - 1
    assert first.stats.time_to_first_token > 0
    turn = prompts[1] + expected[1] + [3, 1, 4]
    second = run(generator, [turn])[0]
    assert second.stats.cached_tokens == 33 + COUNT - 1
    assert second.stats.computed_tokens == len(turn) - second.stats.cached_tokens + COUNT - 1


def test_stop_tokens_end_a_request_and_are_its_last_token(make, model, prompts, expected):
    stop = expected[0][4]
    cut = expected[0].index(stop) + 1
    generator = make()
    stopped, free = [
        generator.submit(prompts[0], max_new_tokens=COUNT, stop_tokens=stops) for stops in ([stop, VOCABULARY - 1], ())
    ]
    model.generation_config.eos_token_id = stop
    try:
        by_default = generator.submit(prompts[0], max_new_tokens=COUNT)
    finally:
        model.generation_config.eos_token_id = None
    generator.run()
    assert (stopped.tokens, stopped.status) == (expected[0][:cut], "stop")
    assert by_default.tokens == stopped.tokens
    assert (free.tokens, free.status) == (expected[0], "length")


def test_an_order_decides_who_comes_first(make, prompts, expected):
    generator = make(max_running=1, policy=lambda request: len(request.prompt))
    ended = []
    requests = [
        generator.submit(prompt, max_new_tokens=COUNT, on_token=lambda r, _: ended.append(r.id) if r.done else None)
        for prompt in prompts
    ]
    generator.run()
    assert ended == sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    assert [request.tokens for request in requests] == expected


def test_streams_interleave(make, prompts, expected):
    generator = make()
    requests = [generator.submit(prompt, max_new_tokens=COUNT) for prompt in prompts[:2]]
    streams = [generator.stream(request) for request in requests]
    received = list(zip(*streams, strict=True))
    assert [list(tokens) for tokens in zip(*received, strict=True)] == expected[:2]


def test_cancel_waiting_running_and_done_requests(make, prompts, expected):
    generator = make(max_running=2)
    requests = [generator.submit(prompt, max_new_tokens=COUNT) for prompt in prompts[:4]]
    for _ in range(3):
        generator.step()
    assert requests[3].status == "waiting"
    assert generator.cancel(requests[3])
    assert generator.cancel(requests[0])
    assert not generator.cancel(requests[0])
    generator.engine.cache.check()
    kept = len(requests[0].tokens)
    generator.run()
    assert requests[0].tokens == expected[0][:kept]
    assert not requests[3].tokens
    assert [request.tokens for request in requests[1:3]] == expected[1:3]
    assert not generator.cancel(requests[1])


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancelling_the_first_of_n_leaves_its_siblings(make, prompts, steps):
    reference = make()
    expected = [run(reference, [prompts[1]], seed=20 + i, **SAMPLED)[0].tokens for i in range(3)]
    generator = make(max_step_tokens=16, max_running=8)
    first, second, third = generator.submit(prompts[1], max_new_tokens=COUNT, seed=20, n=3, **SAMPLED).siblings
    for _ in range(steps):
        generator.step()
    assert generator.cancel(first)
    generator.run()
    assert (second.tokens, third.tokens) == (expected[1], expected[2])


def test_cancelling_a_sibling_that_waits_for_its_fork(make, prompts):
    generator = make()
    first, second = generator.submit(prompts[1], max_new_tokens=COUNT, n=2).siblings
    assert generator.cancel(second)
    generator.run()
    assert (first.status, second.status, second.tokens) == ("length", "cancelled", [])


def test_a_request_that_never_fits_is_refused_and_the_rest_go_on(make, prompts, expected):
    generator = make(num_pages=12)
    good = generator.submit(prompts[0], max_new_tokens=COUNT)
    with pytest.raises(PoolExhausted, match=r"need 13 pages; the pool has 12"):
        generator.submit(prompts[0] + [1] * 3, max_new_tokens=20)
    exact = generator.submit(prompts[0] + [1] * 3, max_new_tokens=19)
    generator.run()
    assert good.tokens == expected[0]
    assert len(exact.tokens) == 19


def test_prompts_may_be_arrays_and_tensors(make, prompts, expected):
    generator = make()
    tensor = torch.tensor(prompts[0])
    for prompt in (tensor, tensor.to(torch.int32), tensor.numpy(), tuple(prompts[0])):
        assert run(generator, [prompt])[0].tokens == expected[0]


@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_exception_in_the_model_that_does_not_come_again_is_survived(make, model, prompts, expected, call):
    generator = make()
    requests = [generator.submit(prompt, max_new_tokens=COUNT) for prompt in prompts]
    calls = 0

    def fail(module, inputs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise ValueError("in the middle of a layer")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with hook:
        generator.run()
    generator.engine.cache.check()
    assert calls > call
    assert [request.tokens for request in requests] == expected
    assert sum(request.stats.preemptions for request in requests) == 0


@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_interrupt_while_tokens_are_drawn_loses_neither_tokens_nor_random_numbers(make, prompts, monkeypatch, call):
    expected = [request.tokens for request in run(make(), prompts, seed=11, **SAMPLED)]
    generator = make()
    requests = [generator.submit(prompt, max_new_tokens=COUNT, seed=11, **SAMPLED) for prompt in prompts]
    calls = 0

    def interrupted(logits, draws):
        nonlocal calls
        calls += 1
        tokens = sample(logits, draws)
        if calls == call:
            raise KeyboardInterrupt
        return tokens

    monkeypatch.setattr(radixkv.hf.generator, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generator.run()
    generator.run()
    assert [request.tokens for request in requests] == expected


def test_namespaces_share_nothing(make, prompts, expected):
    generator = make()
    for namespace in ("a", "b"):
        request = run(generator, [prompts[0]], namespace=namespace)[0]
        assert (request.tokens, request.stats.cached_tokens) == (expected[0], 0)
    together = [run(generator, [prompts[0]], namespace=namespace)[0] for namespace in ("a", "b")]
    assert [request.stats.cached_tokens for request in together] == [len(prompts[0]) - 1] * 2


def test_pages_held_outside_stop_the_loop_with_an_error_and_nothing_is_lost(make, prompts, expected):
    generator = make(num_pages=16)
    outside = generator.engine.acquire([90] * 40)
    request = generator.submit(prompts[0], max_new_tokens=COUNT)
    with pytest.raises(PoolExhausted):
        generator.run()
    assert request.status in ("waiting", "running")
    outside.release(commit=False)
    generator.run()
    assert request.tokens == expected[0]


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_calls_gives_the_same_tokens(make, model, prompts, expected, monkeypatch, seed):
    """Random submissions, forks, cancellations, failures and chunk sizes over a pool that is far too small."""
    chance = random.Random(seed)
    monkeypatch.setattr(space, "HEADROOM", chance.choice([0, 0, 8, 64]))
    generator = make(num_pages=chance.choice([14, 16, 20]), max_step_tokens=chance.choice([6, 20, 400]), max_running=6)
    failing = False

    def fail(module, inputs):
        if failing:
            raise ValueError("in the middle of a layer")

    submitted = []
    with model.model.layers[1].register_forward_pre_hook(fail):
        for _ in range(60):
            action = chance.random()
            if action < 0.3 and len(submitted) < 20:
                number = chance.randrange(len(prompts))
                request = generator.submit(
                    prompts[number], max_new_tokens=chance.randint(1, COUNT), n=chance.choice([1, 3])
                )
                submitted += [(sibling, number) for sibling in request.siblings]
            elif action < 0.35 and submitted:
                generator.cancel(chance.choice(submitted)[0])
            elif action < 0.4:
                failing = True
                generator.step()
                failing = False
            else:
                generator.step()
            generator.engine.cache.check()
    generator.run()
    preemptions = sum(request.stats.preemptions for request, _ in submitted)
    assert preemptions + generator.engine.cache.stats().evicted_pages > 0
    for request, number in submitted:
        assert request.done
        assert request.tokens == expected[number][: len(request.tokens)]
        assert request.status in ("cancelled", "error") or len(request.tokens) == request.max_new_tokens


def test_a_request_that_ends_its_session_leaves_its_pages_to_be_evicted_first(make):
    generator = make(num_pages=64)
    cache, (system, one, two) = generator.engine.cache, random_prompts(16, 8, 8)
    for prompt, cold in ((system + one, False), (system + two, True)):
        generator.submit(prompt, max_new_tokens=2, cold=cold)
        generator.run()
    cache.evict(2)
    assert cache.match(system + one) == 24
    assert 16 <= cache.match(system + two) < 24
