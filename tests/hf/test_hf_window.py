"""Where every layer has a sliding window, answers and prompts outgrow the pool, and no token changes."""

import random

import pytest

from radixkv import PoolExhausted
from radixkv.hf import Generator, engine_for
from radixkv.hf.adapter import probe
from radixkv.scheduling import space
from radixkv.scheduling.room import PoolShape, Room, room_for
from tests.hf.helpers import assert_drains, build, random_prompts, stock_tokens, tiny

WINDOW = 9  # as transformers counts: the row itself and 8 before it
PAGE = 4
LEAST = (WINDOW - 1 + PAGE) // PAGE  # pages that a long answer needs
COUNT = 120


def mistral(window):
    sizes = {"sliding_window": window, "max_position_embeddings": 1024, "num_hidden_layers": 2}
    return build("MistralConfig", "MistralForCausalLM", sizes)


@pytest.fixture(autouse=True)
def no_headroom(monkeypatch):
    """Preemptions are frequent without it; with it, answers as short as these here are never preempted."""
    monkeypatch.setattr(space, "HEADROOM", 0)


@pytest.fixture(scope="module")
def model():
    return mistral(WINDOW)


@pytest.fixture(scope="module")
def prompts():
    shared = random_prompts(9)[0]
    return [shared + tail for tail in random_prompts(4, 7, 12, seed=5)]


@pytest.fixture(scope="module")
def expected(model, prompts):
    return [stock_tokens(model, prompt, COUNT) for prompt in prompts]


def engine_of(model, num_pages, page_size=PAGE):
    """An engine that drops by the page, as on CUDA; on the CPU it would be by 512 tokens, for equal bits."""
    engine = engine_for(model, num_pages=num_pages, page_size=page_size)
    engine.attention.view_unit = 1
    return engine


@pytest.fixture
def make(model):
    made = []

    def make(num_pages, **options):
        made.append(Generator(model, engine_of(model, num_pages), **options))
        return made[-1]

    yield make
    for generator in made:
        generator.close()
        assert_drains(generator.engine)


def check_each_step(generator):
    while generator.step():
        generator.engine.cache.check()


# --- what a window is worth -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "window_left"),
    [("llama", -1), ("gpt2-learned-positions", -1), ("gemma2-window-softcap", -1), ("mistral-window", 7)],
)
def test_the_window_is_that_of_the_layer_that_sees_most(architecture, window_left):
    assert probe(tiny(architecture)).window_left == window_left


def test_room_for_what_fits_is_all_of_it():
    for window_left in (-1, WINDOW - 1):
        assert room_for(PoolShape(40, PAGE, window_left, PAGE), 2048, 150, 11) == Room(40, 40, 160, 2048)


@pytest.mark.parametrize("num_pages", [LEAST, LEAST + 1, LEAST + 2, 40, 1000])
@pytest.mark.parametrize("max_rows", [1, 7, 2048])
def test_room_for_what_does_not_fit_adds_up_to_the_pool(num_pages, max_rows):
    room = room_for(PoolShape(num_pages, PAGE, WINDOW - 1, PAGE), max_rows, 1, 10**6)
    assert room.pages == 250_000
    assert room.shared + PAGE * room.private == PAGE * num_pages
    assert 1 <= room.rows <= max_rows
    assert WINDOW - 1 + PAGE - 1 + room.rows <= PAGE * room.private


# --- long answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_pages", [LEAST, LEAST + 1, 8])
def test_an_answer_outgrows_the_pool(make, prompts, expected, num_pages):
    generator = make(num_pages)
    request = generator.submit(prompts[0], max_new_tokens=COUNT)
    check_each_step(generator)
    assert request.tokens == expected[0]
    assert request.stats.preemptions == 0
    assert request.stats.computed_tokens == len(prompts[0]) + COUNT - 1


def test_an_answer_outgrows_the_pool_as_the_cpu_drops():
    """By 512 tokens: a pool of 34 pages of 16 is all that this and a window of 33 need."""
    model = mistral(33)
    generator = Generator(model, engine_for(model, num_pages=34))
    prompt = random_prompts(30)[0]
    with pytest.raises(PoolExhausted, match="need 63 pages, 34 with"):
        Generator(model, engine_for(model, num_pages=33)).submit(prompt, max_new_tokens=970)
    request = generator.submit(prompt, max_new_tokens=970)
    check_each_step(generator)
    assert request.tokens == stock_tokens(model, prompt, 970)
    assert_drains(generator.engine)


def test_the_prompt_of_a_long_answer_is_found_again(make, prompts):
    generator = make(12)
    generator.submit(prompts[0], max_new_tokens=COUNT)
    generator.run()
    again = generator.submit(prompts[0], max_new_tokens=COUNT)
    generator.run()
    assert again.stats.cached_tokens >= len(prompts[0]) // PAGE * PAGE


def test_what_a_pool_has_room_for_is_not_dropped(make, prompts, expected):
    generator = make(50)
    generator.submit(prompts[0], max_new_tokens=COUNT)
    generator.run()
    turn = generator.submit(prompts[0] + expected[0], max_new_tokens=1)
    generator.run()
    assert turn.stats.cached_tokens == len(prompts[0]) + COUNT - 1


@pytest.mark.parametrize("num_pages", [LEAST + 1, 8, 12, 16])
def test_preempted_long_answers_are_computed_again_and_the_same(make, prompts, expected, num_pages):
    generator = make(num_pages)
    requests = [generator.submit(prompt, max_new_tokens=COUNT) for prompt in prompts]
    check_each_step(generator)
    assert [request.tokens for request in requests] == expected
    assert requests[0].stats.preemptions == 0, "the oldest is never preempted"
    assert sum(request.stats.preemptions for request in requests) > 0
    assert all(request.stats.preemptions <= 2 for request in requests), "none is computed for nothing again and again"


@pytest.mark.parametrize("num_pages", [LEAST, 12])
def test_samples_of_a_long_answer(make, prompts, num_pages):
    sampled = {"max_new_tokens": COUNT, "temperature": 1.0}
    roomy = make(400)
    expected = [roomy.submit(prompts[0], seed=3 + i, **sampled) for i in range(3)]
    roomy.run()
    generator = make(num_pages)
    first = generator.submit(prompts[0], n=3, seed=3, **sampled)
    check_each_step(generator)
    assert [sibling.tokens for sibling in first.siblings] == [request.tokens for request in expected]


# --- long prompts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_prompt():
    return random_prompts(150, seed=9)[0]


@pytest.fixture(scope="module")
def long_expected(model, long_prompt):
    return stock_tokens(model, long_prompt, 20)


@pytest.mark.parametrize(
    ("num_pages", "step_tokens"), [(LEAST, 2048), (LEAST + 1, 2048), (12, 2048), (12, 7), (30, 2048)]
)
def test_a_prompt_outgrows_the_pool(make, long_prompt, long_expected, num_pages, step_tokens):
    generator = make(num_pages, max_step_tokens=step_tokens, max_running=7)
    for cached in (False, num_pages > LEAST + 1):
        request = generator.submit(long_prompt, max_new_tokens=20)
        check_each_step(generator)
        assert request.tokens == long_expected
        assert (request.stats.cached_tokens > 0) == cached
        assert request.stats.computed_tokens + request.stats.cached_tokens == 169


def test_what_a_tree_holds_of_a_long_prompt_does_not_stop_it(make, long_prompt, long_expected):
    """Matched pages stay as long as the lease, so only as many are matched as leave room for the rest."""
    generator = make(14)
    generator.submit(long_prompt[:55], max_new_tokens=1)
    generator.run()
    assert generator.engine.cache.match(long_prompt) == 55
    request = generator.submit(long_prompt, max_new_tokens=20)
    check_each_step(generator)
    assert request.tokens == long_expected
    assert 10 < request.stats.cached_tokens < 30


def test_samples_of_a_prompt_that_outgrows_the_pool(make, long_prompt, long_expected):
    generator = make(12)
    first = generator.submit(long_prompt, max_new_tokens=20, n=3)
    check_each_step(generator)
    assert [sibling.tokens for sibling in first.siblings] == [long_expected] * 3


def test_samples_of_a_prompt_that_leaves_no_room_for_the_window(make, model):
    """Forking publishes the prompt, whose pages then stay: here the samples compute it themselves."""
    generator = make(8)
    prompt = random_prompts(28)[0]
    first = generator.submit(prompt, max_new_tokens=40, n=2)
    check_each_step(generator)
    assert [sibling.tokens for sibling in first.siblings] == [stock_tokens(model, prompt, 40)] * 2


def test_no_one_waits_for_what_a_long_prompt_will_not_publish(make, long_prompt):
    generator = make(37)
    long = generator.submit(long_prompt, max_new_tokens=20)
    short = generator.submit(long_prompt[:75], max_new_tokens=1)
    generator.step()
    assert short.status == "waiting", "a part of its prompt is about to be published"
    generator.step()
    assert short.done
    assert short.stats.cached_tokens == long.room.shared == 68
    assert not long.tokens


# --- what cannot run --------------------------------------------------------------------------------------------------


def test_what_never_fits_is_refused_with_what_the_window_leaves(make):
    generator = make(LEAST - 1)
    with pytest.raises(PoolExhausted, match="need 3 pages, 3 with the model's sliding window; the pool has 2"):
        generator.submit([1, 2, 3], max_new_tokens=7)
    assert generator.submit([1, 2, 3], max_new_tokens=6)


def test_a_model_with_a_layer_that_sees_everything_needs_all_pages():
    model = tiny("gemma2-window-softcap")
    generator = Generator(model, engine_for(model, num_pages=4))
    with pytest.raises(PoolExhausted, match="need 5 pages; the pool has 4"):
        generator.submit([1] * 60, max_new_tokens=6)


@pytest.mark.parametrize("long", [False, True])
def test_pages_held_outside_are_an_error_and_no_endless_loop(make, prompts, expected, long_prompt, long_expected, long):
    generator = make(LEAST + 4)
    outside = generator.engine.acquire([90] * PAGE * 5)
    prompt, tokens = (long_prompt, long_expected) if long else (prompts[0], expected[0])
    request = generator.submit(prompt, max_new_tokens=len(tokens))
    for _ in range(2):
        with pytest.raises(PoolExhausted):
            for _ in range(1000):
                generator.step()
        generator.engine.cache.check()
    assert not request.done
    outside.release(commit=False)
    generator.run()
    assert request.tokens == tokens
    assert request.stats.preemptions == 0


# --- any order of calls, small numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_calls_gives_the_same_tokens(monkeypatch, seed):
    """Random requests over pools that hold hardly more than the window."""
    chance = random.Random(seed)
    monkeypatch.setattr(space, "HEADROOM", chance.choice([0, 0, 8, 64]))
    model = mistral(WINDOW)
    engine = engine_of(model, chance.choice([4, 5, 7, 10]), page_size=chance.choice([3, 4, 8]))
    steps = {"max_step_tokens": chance.choice([6, 30, 400]), "max_running": 6}
    generator = Generator(model, engine, **steps)
    prompts = [[*random_prompts(30)[0][:n], n] for n in (1, 5, 12, 20, 30)] + random_prompts(70, 3)
    expected = [stock_tokens(model, prompt, 60) for prompt in prompts]
    submitted = []
    for _ in range(150):
        action = chance.random()
        if action < 0.2 and len(submitted) < 30:
            number = chance.randrange(len(prompts))
            try:
                request = generator.submit(
                    prompts[number], max_new_tokens=chance.randint(1, 60), n=chance.choice([1, 2])
                )
            except PoolExhausted:
                continue
            submitted += [(sibling, number) for sibling in request.siblings]
        elif action < 0.25 and submitted:
            generator.cancel(chance.choice(submitted)[0])
        else:
            generator.step()
        engine.cache.check()
    assert len(submitted) > 10
    generator.run()
    for request, number in submitted:
        assert request.done
        assert request.tokens == expected[number][: len(request.tokens)]
        assert request.status == "cancelled" or len(request.tokens) == request.max_new_tokens
    assert_drains(engine)
