"""Who may call a Generator when: one thread, callbacks that raise or call back, hooks that raise, and close."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from radixkv import InvalidArgument, InvalidLogits, LeaseError, QueueFull, scheduling
from radixkv.hf import Generator, engine_for
from tests.hf.helpers import VOCABULARY, assert_drains, random_prompts, stock_tokens, tiny

COUNT = 8


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(11, 5, 14, 9, seed=8)


@pytest.fixture(scope="module")
def expected(model, prompts):
    return [stock_tokens(model, prompt, COUNT) for prompt in prompts]


@pytest.fixture
def generator(model):
    generator = Generator(model, engine_for(model, num_pages=100, page_size=4))
    yield generator
    generator.close()
    assert_drains(generator.engine)


def submit(generator, prompts, on_token=None):
    return [generator.submit(prompt, max_new_tokens=COUNT, on_token=on_token) for prompt in prompts]


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["submit", "step", "run", "stream", "text", "cancel", "fail", "close"])
def test_another_thread_is_refused_and_jams_nothing(generator, prompts, expected, call):
    first, second = submit(generator, prompts[:2])
    generator.step()
    calls = {
        "submit": lambda: generator.submit([1]),
        "step": generator.step,
        "run": generator.run,
        "stream": lambda: generator.stream(first),
        "text": lambda: generator.text(first),
        "cancel": lambda: generator.cancel(first),
        "fail": lambda: generator.fail(first, ValueError()),
        "close": generator.close,
    }
    with (
        ThreadPoolExecutor(1, thread_name_prefix="web") as pool,
        pytest.raises(LeaseError, match=r"thread 'web_0'.*belongs to thread 'MainThread'.*queue\.Queue"),
    ):
        pool.submit(calls[call]).result()
    generator.run()
    assert [first.tokens, second.tokens] == expected[:2]


def test_a_stream_is_refused_to_another_thread(generator, prompts, expected):
    request = submit(generator, prompts[:1])[0]
    stream = generator.stream(request)
    with ThreadPoolExecutor(1) as pool, pytest.raises(LeaseError, match="queue"):
        pool.submit(next, stream).result()
    assert list(generator.stream(request)) == expected[0]


def test_a_thread_runs_the_loop_that_it_makes_and_others_read(model, prompts, expected):
    """The remedy of the error message, followed."""
    from queue import Queue

    inbox, outbox = Queue(), Queue()

    def loop():
        with Generator(model, engine_for(model, num_pages=100, page_size=4)) as generator:
            while (prompt := inbox.get()) is not None:
                outbox.put(generator.submit(prompt, max_new_tokens=COUNT))
                generator.run()

    thread = threading.Thread(target=loop)
    thread.start()
    for prompt in prompts:
        inbox.put(prompt)
    inbox.put(None)
    thread.join()
    assert [outbox.get().tokens for _ in prompts] == expected


# --- callbacks that raise ---------------------------------------------------------------------------------------------


def test_a_callback_that_raises_ends_its_own_request_only(generator, prompts, expected, caplog):
    seen = {}

    def on_token(request, token):
        seen.setdefault(request.id, []).append(token)
        if request.id == 1 and len(seen[1]) == 3:
            raise ConnectionError("client is gone")

    requests = submit(generator, prompts[:3], on_token)
    steps = 1
    with caplog.at_level(logging.ERROR, logger="radixkv"):
        while generator.step():
            steps += 1
    assert steps == COUNT
    assert requests[1].status == "error"
    assert requests[1].done
    assert isinstance(requests[1].error, ConnectionError)
    assert requests[1].tokens == seen[1] == expected[1][:3]
    for other in (0, 2):
        assert (requests[other].status, requests[other].error) == ("length", None)
        assert seen[other] == requests[other].tokens == expected[other]
    assert generator.engine.cache.match([*prompts[1], *expected[1][:2]]) == len(prompts[1]) + 2, "it stays cached"
    assert not generator.cancel(requests[1])
    [record] = caplog.records
    assert "on_token of request 1" in record.getMessage()
    assert record.exc_info[1] is requests[1].error


@pytest.mark.filterwarnings("ignore")
def test_run_finishes_the_others_and_then_raises(generator, prompts, expected):
    def on_token(request, token):
        if request.id < 2:
            raise ValueError(f"from request {request.id}")

    requests = submit(generator, prompts, on_token)
    with pytest.raises(ValueError, match="from request 0"):
        generator.run()
    assert [request.status for request in requests] == ["error", "error", "length", "length"]
    assert [request.tokens for request in requests[2:]] == expected[2:]
    generator.run()


def test_a_stream_of_a_request_whose_callback_raised_raises_its_error(generator, prompts, expected):
    def on_token(request, token):
        if len(request.tokens) == 2:
            raise ValueError("from the callback")

    broken, other = submit(generator, prompts[:1], on_token) + submit(generator, prompts[1:2])
    received = []
    with pytest.raises(ValueError, match="from the callback"):
        received.extend(generator.stream(broken))
    assert broken.tokens == expected[0][:2]
    assert list(generator.stream(other)) == expected[1]


def test_an_error_at_the_last_token_is_told_too(generator, prompts, expected):
    def on_token(request, token):
        if request.done:
            raise ValueError("could not send the end")

    request = submit(generator, prompts[:1], on_token)[0]
    with pytest.raises(ValueError, match="could not send the end"):
        generator.run()
    assert (request.status, request.tokens) == ("error", expected[0])


def test_one_sibling_ends_the_others_go_on(generator, prompts, expected):
    def on_token(request, token):
        if request is first:
            raise ValueError("first")

    first = generator.submit(prompts[0], max_new_tokens=COUNT, n=3, on_token=on_token)
    with pytest.raises(ValueError, match="first"):
        generator.run()
    assert [sibling.status for sibling in first.siblings] == ["error", "length", "length"]
    assert [sibling.tokens for sibling in first.siblings[1:]] == [expected[0]] * 2


def test_on_logits_is_given_what_each_token_was_drawn_from_just_before_it(generator, prompts, expected):
    seen = []
    requests = [
        generator.submit(
            prompt,
            max_new_tokens=COUNT,
            n=2,
            on_logits=lambda request, logits: seen.append((request.id, int(logits.argmax()), logits.shape[0])),
            on_token=lambda request, token: seen.append((request.id, token, "told")),
        )
        for prompt in prompts[:2]
    ]
    generator.run()
    for request, tokens in zip(requests, expected, strict=False):
        for sibling in request.siblings:
            own = [(token, what) for id, token, what in seen if id == sibling.id]
            assert own == [pair for token in tokens for pair in ((token, VOCABULARY), (token, "told"))]


def test_on_logits_that_raises_ends_its_request(generator, prompts, expected, caplog):
    def on_logits(request, logits):
        raise ValueError("no disk")

    broken = generator.submit(prompts[0], max_new_tokens=COUNT, on_logits=on_logits)
    other = generator.submit(prompts[1], max_new_tokens=COUNT)
    with caplog.at_level(logging.ERROR, logger="radixkv"), pytest.raises(ValueError, match="no disk"):
        generator.run()
    assert (broken.status, other.tokens) == ("error", expected[1])
    assert "on_logits of request 0" in caplog.records[0].getMessage()


def test_an_interrupt_passes_and_each_token_is_delivered_once(generator, prompts, expected):
    seen = []

    def on_token(request, token):
        seen.append((request.id, token))
        if len(seen) == 5:
            raise KeyboardInterrupt

    requests = submit(generator, prompts[:3], on_token)
    with pytest.raises(KeyboardInterrupt):
        generator.run()
    assert [request.status for request in requests] == ["running"] * 3
    generator.engine.cache.check()
    generator.run()
    for request, tokens in zip(requests, expected, strict=False):
        assert [token for id, token in seen if id == request.id] == request.tokens == tokens


def test_what_an_interrupt_left_is_delivered_though_the_model_fails(generator, model, prompts):
    seen = []

    def on_token(request, token):
        seen.append(request.id)
        if len(seen) == 1:
            raise KeyboardInterrupt

    submit(generator, prompts[:3], on_token)
    with pytest.raises(KeyboardInterrupt):
        generator.step()

    def fail(module, inputs):
        raise ValueError("in the middle of a layer")

    with model.model.layers[1].register_forward_pre_hook(fail):
        generator.step()
    assert seen == [0, 1, 2]


# --- calls from inside a step -----------------------------------------------------------------------------------------


def test_a_callback_may_submit_and_cancel(generator, prompts, expected):
    later = []

    def on_token(request, token):
        if len(request.tokens) == 2:
            later.append(generator.submit(prompts[1], max_new_tokens=COUNT))
            generator.cancel(request)

    first = generator.submit(prompts[0], max_new_tokens=COUNT, on_token=on_token)
    generator.run()
    assert (first.tokens, first.status) == (expected[0][:2], "cancelled")
    assert later[0].tokens == expected[1]


def test_nothing_is_delivered_after_cancel(generator, prompts, expected):
    seen = []

    def on_token(request, token):
        seen.append(request.id)
        if request is first and len(first.tokens) == 2:
            generator.cancel(second)

    first, second = submit(generator, prompts[:2], on_token)
    generator.run()
    assert (second.status, second.tokens) == ("cancelled", expected[1][:2])
    assert seen.count(second.id) == 1
    assert first.tokens == expected[0]


@pytest.mark.parametrize("call", ["step", "run", "stream"])
def test_a_callback_may_not_step(generator, prompts, expected, call):
    refusals = []

    def on_token(request, token):
        calls = {"step": generator.step, "run": generator.run, "stream": lambda: list(generator.stream(other))}
        if len(refusals) < 2:
            with pytest.raises(
                LeaseError, match=r"step\(\) was called from inside step\(\).*return from it"
            ) as refusal:
                calls[call]()
            refusals.append(refusal)

    request = submit(generator, prompts[:1], on_token)[0]
    other = generator.submit(prompts[1], max_new_tokens=COUNT)
    generator.step()
    generator.run()
    assert len(refusals) == 2
    assert (request.tokens, other.tokens) == (expected[0], expected[1])


@pytest.mark.parametrize("call", ["submit", "step", "cancel", "close"])
def test_a_hook_of_the_model_may_call_nothing(generator, model, prompts, expected, call):
    request = submit(generator, prompts[:1])[0]
    calls = {
        "submit": lambda: generator.submit([1]),
        "step": generator.step,
        "cancel": lambda: generator.cancel(request),
        "close": generator.close,
    }

    def hook(module, inputs):
        calls[call]()

    with (
        model.model.layers[1].register_forward_pre_hook(hook),
        pytest.raises(LeaseError, match=rf"{call}\(\) was called from inside step\(\)"),
    ):
        generator.run()
    assert request.status == "error"
    assert generator.submit(prompts[0], max_new_tokens=COUNT) in generator.waiting
    generator.run()


def test_close_in_a_callback_ends_the_rest(generator, prompts, expected):
    seen = []

    def on_token(request, token):
        seen.append(request.id)
        if len(seen) == 4:
            generator.close()

    requests = submit(generator, prompts[:3], on_token)
    generator.run()
    assert {request.status for request in requests} == {"cancelled"}
    assert seen == [0, 1, 2, 0]
    assert not generator.step()


def test_close_in_a_callback_keeps_no_one_from_an_answer_that_is_complete(generator, prompts, expected):
    seen = []

    def on_token(request, token):
        seen.append(request.id)
        if request.id == 0:
            generator.close()

    requests = [generator.submit(prompt, max_new_tokens=1, on_token=on_token) for prompt in prompts[:3]]
    generator.run()
    assert seen == [0, 1, 2]
    assert [request.status for request in requests] == ["length"] * 3


# --- close ------------------------------------------------------------------------------------------------------------


def test_close_cancels_everything_and_nothing_new_is_taken(model, prompts):
    generator = Generator(model, engine_for(model, num_pages=100, page_size=4), max_running=2)
    requests = [generator.submit(prompt, max_new_tokens=COUNT, n=2) for prompt in prompts[:3]]
    generator.step()
    generator.close()
    assert {sibling.status for request in requests for sibling in request.siblings} == {"cancelled"}
    assert not generator.step()
    generator.run()
    with pytest.raises(LeaseError, match="the generator is closed: make a new Generator"):
        generator.submit([1])
    generator.close()
    assert_drains(generator.engine)


def test_requests_of_another_generator_are_refused(generator, model):
    with Generator(model, generator.engine) as other:
        foreign = other.submit([1, 2, 3])
        for call in (generator.cancel, generator.stream):
            with pytest.raises(InvalidArgument, match="request 0 is of another Generator"):
                call(foreign)
            with pytest.raises(InvalidArgument, match="is 0, a builtins.int: give a Request"):
                call(0)
            with pytest.raises(
                InvalidArgument, match="a radixkv.scheduling.request.Request: give a Request that submit"
            ):
                call(scheduling.Request([1, 2, 3]))
        with pytest.raises(InvalidArgument, match="prompt is a Request, which a Scheduler takes"):
            generator.submit(scheduling.Request([1, 2, 3]))
        assert other.cancel(foreign)


# --- a namespace that is cleared meanwhile ----------------------------------------------------------------------------


def test_a_namespace_cleared_under_a_request_with_samples_loses_none(model, prompts, expected):
    """What was cleared cannot be forked: each sample computes the prompt itself."""
    generator = Generator(model, engine_for(model, num_pages=100, page_size=4), max_step_tokens=8, max_running=8)
    first = generator.submit(prompts[2], max_new_tokens=COUNT, n=3)
    generator.step()
    generator.engine.cache.clear()
    generator.run()
    assert [sibling.tokens for sibling in first.siblings] == [expected[2]] * 3
    assert_drains(generator.engine)


# --- what goes wrong with one request ---------------------------------------------------------------------------------


def poison(token):
    """A hook that raises where a step has `token` among its rows."""

    def hook(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if token in ids[0].tolist():
            raise ValueError("poison")

    return hook


def test_one_request_that_makes_the_model_raise_does_not_take_the_rest_with_it(generator, model, prompts, expected):
    requests = submit(generator, [*prompts[:3], [96, 96, 96]])
    with model.register_forward_pre_hook(poison(96), with_kwargs=True), pytest.raises(ValueError, match="poison"):
        generator.run()
    assert [request.tokens for request in requests[:3]] == expected[:3]
    assert (requests[3].status, requests[3].tokens, str(requests[3].error)) == ("error", [], "poison")
    assert generator.engine.cache.match([96, 96, 96]) == 0
    assert [request.stats.preemptions for request in requests] == [0] * 4


def test_a_model_that_is_broken_ends_every_request_and_wedges_nothing(generator, model, prompts, expected):
    requests = submit(generator, prompts[:3])

    def fail(module, inputs):
        raise RuntimeError("out of memory")

    with model.model.layers[1].register_forward_pre_hook(fail):
        while generator.step():
            pass
    assert {request.status for request in requests} == {"error"}
    [again] = submit(generator, prompts[:1])
    generator.run()
    assert again.tokens == expected[0]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_in_the_logits_of_one_request_ends_that_one(generator, model, prompts, expected, options, bad):
    good, *rest = submit(generator, prompts[:2])
    broken = generator.submit(prompts[2], max_new_tokens=COUNT, **options)

    def spoil(module, args, output):
        if len(broken.tokens) == 2 and broken.status == "running":
            output.logits[0, -1] = bad  # the last row of the batch is its
        return output

    with model.register_forward_hook(spoil), pytest.raises(InvalidLogits, match="the largest logit is"):
        generator.run()
    assert (broken.status, len(broken.tokens)) == ("error", 2)
    assert [good.tokens, rest[0].tokens] == expected[:2]
    found = generator.engine.cache.match([*prompts[2], *broken.tokens, 0])
    assert found <= len(prompts[2]), "of what it computed since, nothing is published"


def test_a_processor_that_raises_or_returns_nonsense_ends_its_request(generator, prompts, expected):
    def raises(input_ids, scores):
        raise KeyError("no such state")

    bad = [generator.submit(prompts[0], processors=[p]) for p in (raises, lambda ids, scores: scores[0], print)]
    [good] = submit(generator, prompts[1:2])
    with pytest.raises(KeyError):
        generator.run()
    assert [request.status for request in bad] == ["error"] * 3
    assert "return scores of shape (1, 97)" in str(bad[1].error)
    assert good.tokens == expected[1]


def test_two_generators_in_two_threads_over_one_engine_are_told(model, prompts, expected):
    engine = engine_for(model, num_pages=100, page_size=4)
    inside, go = threading.Event(), threading.Event()

    def wait(module, inputs):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go.wait(30)

    def other(generator):
        request = generator.submit(prompts[0], max_new_tokens=COUNT)
        generator.run()
        return request.tokens

    generator = Generator(model, engine)
    [request] = submit(generator, prompts[1:2])
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(Generator, model, engine).result()
        with model.model.layers[1].register_forward_pre_hook(wait):
            future = pool.submit(other, theirs)
            inside.wait(30)
            with pytest.raises(LeaseError, match="Give each Generator its own engine"):
                generator.step()
            go.set()
            assert future.result() == expected[0]
    assert request.status == "running"
    generator.run()
    assert request.tokens == expected[1]


# --- on_done ----------------------------------------------------------------------------------------------------------


def test_on_done_is_called_once_last_however_a_request_ends(generator, prompts):
    told = []

    def on_token(request, token):
        told.append((request.id, "token"))
        if request.id == 2:
            raise ValueError("gone")

    def on_done(request):
        told.append((request.id, request.status))

    requests = [
        generator.submit(prompt, max_new_tokens=3, on_token=on_token, on_done=on_done) for prompt in prompts[:4]
    ]
    late = generator.submit(prompts[0], deadline=1e-9, on_done=on_done)
    generator.cancel(requests[1])
    assert told == [(1, "cancelled")]
    while generator.step():
        pass
    waiting = generator.submit(prompts[0], on_done=on_done, n=2)
    generator.close()
    for request, end in [(requests[0], "length"), (requests[2], "error"), (requests[3], "length"), (late, "deadline")]:
        own = [what for id, what in told if id == request.id]
        assert own == ["token"] * (len(own) - 1) + [end]
    assert [told.count((sibling.id, "cancelled")) for sibling in waiting.siblings] == [1, 1]


def test_on_done_that_raises_changes_the_status_and_is_not_called_again(generator, prompts, expected):
    calls = []

    def on_done(request):
        calls.append(request.id)
        raise OSError("no disk")

    request = generator.submit(prompts[0], max_new_tokens=COUNT, on_done=on_done)
    with pytest.raises(OSError, match="no disk"):
        generator.run()
    assert (request.status, request.tokens, calls) == ("error", expected[0], [0])


@pytest.mark.parametrize("error", ["gone", None, ValueError, KeyboardInterrupt()])
def test_a_request_fails_with_an_exception_only(generator, prompts, expected, error):
    [request] = submit(generator, prompts[:1])
    with pytest.raises(InvalidArgument, match="give an exception"):
        generator.fail(request, error)
    generator.run()
    assert request.tokens == expected[0]


def test_a_full_queue_is_refused_and_seen(model, prompts):
    with Generator(model, engine_for(model, num_pages=100), max_running=1, max_waiting=2) as generator:
        for prompt in prompts[:2]:
            generator.submit(prompt, max_new_tokens=2)
        assert len(generator.waiting) == 2
        assert generator.estimated_wait() is None
        with pytest.raises(QueueFull, match="max_waiting is 2"):
            generator.submit(prompts[2])
        assert repr(generator) == "Generator(LlamaForCausalLM, 0 running, 2 waiting)"
        generator.run()
        assert generator.estimated_wait() == 0
