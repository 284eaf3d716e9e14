"""AsyncGenerator: many tasks and loops over one step thread; cancelling, closing, refusing, and what breaks."""

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from radixkv import InvalidArgument, InvalidTokens, LeaseError, PoolExhausted, QueueFull
from radixkv.hf import AsyncGenerator, engine_for
from tests.hf.helpers import assert_drains, random_prompts, stock_tokens, tiny

COUNT = 12


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(11, 5, 14, 9, 3, 20, seed=8)


@pytest.fixture(scope="module")
def expected(model, prompts):
    return [stock_tokens(model, prompt, COUNT) for prompt in prompts]


@pytest.fixture
def engine(model):
    engine = engine_for(model, num_pages=200, page_size=4)
    yield engine
    assert_drains(engine)


def run(model, engine, main, **options):
    """`main(generator)` in a loop of its own, which must not hang."""

    async def all_of_it():
        async with AsyncGenerator(model, engine, **options) as generator:
            return await main(generator)

    return asyncio.run(asyncio.wait_for(all_of_it(), 60))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def free(engine):
    return engine.cache.stats().num_leases == 0


def test_many_tasks_get_their_tokens(model, engine, prompts, expected):
    async def read(generator, i):
        return [token async for token in generator.stream(prompts[i], max_new_tokens=COUNT)]

    async def main(generator):
        return await asyncio.gather(*(read(generator, i % len(prompts)) for i in range(24)))

    answers = run(model, engine, main)
    assert answers == [expected[i % len(prompts)] for i in range(24)]


def test_generate_waits_for_all_siblings(model, engine, prompts, expected):
    request = run(model, engine, lambda g: g.generate(prompts[0], max_new_tokens=COUNT, n=3))
    assert [sibling.tokens for sibling in request.siblings] == [expected[0]] * 3
    assert all(sibling.ended for sibling in request.siblings)


def test_loops_of_several_threads_share_it(model, engine, prompts, expected):
    generator = AsyncGenerator(model, engine)
    answers = {}

    def loop(i):
        answers[i] = asyncio.run(generator.generate(prompts[i], max_new_tokens=COUNT)).tokens

    threads = [threading.Thread(target=loop, args=[i]) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    asyncio.run(generator.close())
    assert [answers[i] for i in range(len(prompts))] == expected


@pytest.mark.parametrize("how", ["task", "timeout", "break", "aclose", "generate"])
def test_a_reader_that_leaves_gives_its_pages_back(model, engine, prompts, expected, how):
    async def main(generator):
        other = asyncio.create_task(generator.generate(prompts[1], max_new_tokens=COUNT))
        stream = generator.stream(prompts[0], max_new_tokens=400)
        request = await stream.accepted()

        async def read():
            async for _ in stream:
                pass

        if how == "task":
            task = asyncio.create_task(read())
            await until(lambda: len(request.tokens) > 2)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        elif how == "timeout":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(read(), 0.02)
        elif how == "break":
            async for _ in stream:
                break
            del stream, read
            gc.collect()
        elif how == "aclose":
            async with contextlib.aclosing(stream):
                await anext(stream)
        else:
            await stream.aclose()
            task = asyncio.create_task(generator.generate(prompts[0], max_new_tokens=400, n=2))
            await until(lambda: generator.running >= 2)
            task.cancel()
        assert (await other).tokens == expected[1]
        await until(lambda: free(generator.engine))
        assert request.status == "cancelled"
        assert len(request.tokens) < 400

    run(model, engine, main)


def test_who_leaves_when_the_first_sample_has_ended_cancels_the_others(model, engine, prompts):
    async def main(generator):
        options = {"n": 3, "temperature": 2.0, "seed": 0}
        sampled = await generator.generate(prompts[0], max_new_tokens=4, **options)
        stream = generator.stream(prompts[0], max_new_tokens=400, stop_tokens=sampled.tokens[2:3], **options)
        request = await stream.accepted()
        task = asyncio.create_task(stream.end())
        await until(lambda: request.ended)
        task.cancel()
        await until(lambda: free(generator.engine))
        assert "cancelled" in [sibling.status for sibling in request.siblings]
        assert all(len(sibling.tokens) < 400 for sibling in request.siblings)

    run(model, engine, main)


def test_tasks_that_ask_at_once_whether_a_stream_is_accepted_submit_it_once(model, engine, prompts, expected):
    async def main(generator):
        stream = generator.stream(prompts[0], max_new_tokens=COUNT)
        first, second = await asyncio.gather(stream.accepted(), stream.accepted())
        assert first is second
        assert (await stream.end()).tokens == expected[0]
        assert generator.engine.cache.stats().requests == 1
        bad = generator.stream([])
        for _ in range(2):
            with pytest.raises(InvalidTokens):
                await bad.accepted()

    run(model, engine, main)


def test_another_loop_is_refused_and_the_request_goes_on(model, engine, prompts, expected):
    async def main(generator):
        stream = generator.stream(prompts[0], max_new_tokens=COUNT)
        tokens, refusals = [await anext(stream)], []

        def other():
            with pytest.raises(LeaseError, match="begun in another event loop") as refusal:
                asyncio.run(anext(stream))
            refusals.append(refusal)

        await asyncio.to_thread(other)
        tokens += [token async for token in stream]
        assert (tokens, len(refusals)) == (expected[0], 1)

    run(model, engine, main)


@pytest.mark.parametrize("call", ["generate", "close"])
def test_a_callback_that_would_wait_for_its_own_thread_is_refused(model, engine, prompts, call):
    async def main(generator):
        def on_logits(request, logits):
            asyncio.run(generator.generate(prompts[1]) if call == "generate" else generator.close())

        with pytest.raises(LeaseError, match="called in the step thread"):
            await generator.generate(prompts[0], on_logits=on_logits)

    run(model, engine, main)


def test_a_generator_lives_as_long_as_its_streams(model, engine, prompts, expected):
    async def main():
        return [token async for token in AsyncGenerator(model, engine).stream(prompts[0], max_new_tokens=COUNT)]

    assert asyncio.run(asyncio.wait_for(main(), 60)) == expected[0]
    gc.collect()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_told_that_it_has_no_step_thread(model, engine, prompts):
    async def main(generator):
        return await asyncio.wait_for(generator.generate(prompts[0], max_new_tokens=1), 20)

    generator = AsyncGenerator(model, engine)
    asyncio.run(main(generator))
    child = os.fork()
    if not child:
        try:
            asyncio.run(main(generator))
        except LeaseError as error:
            os._exit(0 if "was forked" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    asyncio.run(generator.close())


def test_refusals_come_from_accepted_before_anything_is_read(model, prompts):
    async def main(generator):
        with pytest.raises(InvalidTokens):
            await generator.stream([]).accepted()
        with pytest.raises(InvalidArgument, match="temperature"):
            await generator.generate(prompts[0], temperature=-1)
        with pytest.raises(PoolExhausted):
            await generator.generate([1] * 400, max_new_tokens=100)
        with pytest.raises(InvalidArgument, match="on_token has no use here"):
            generator.stream(prompts[0], on_token=print)
        with pytest.raises(InvalidArgument, match="tokenizer="):
            generator.text(prompts[0])

    run(model, engine_for(model, num_pages=8), main)


def test_a_full_queue_pushes_back_and_takes_again(model, engine, prompts, expected):
    async def main(generator):
        first = generator.stream(prompts[0], max_new_tokens=300)
        await anext(first)
        waiting = [asyncio.create_task(generator.generate(prompts[1], max_new_tokens=COUNT)) for _ in range(2)]
        await until(lambda: generator.waiting == 2)
        with pytest.raises(QueueFull):
            await generator.generate(prompts[2])
        await first.aclose()
        assert [request.tokens for request in await asyncio.gather(*waiting)] == [expected[1]] * 2

    run(model, engine, main, max_running=1, max_waiting=2)


def test_a_slow_reader_holds_nobody_up(model, engine, prompts, expected):
    async def main(generator):
        slow = generator.stream(prompts[0], max_new_tokens=COUNT)
        await slow.accepted()
        assert (await generator.generate(prompts[1], max_new_tokens=COUNT)).tokens == expected[1]
        await until(lambda: slow.request.done)
        assert [token async for token in slow] == expected[0]

    run(model, engine, main)


def test_what_a_request_raises_is_raised_to_its_reader_alone(model, engine, prompts, expected):
    def processor(input_ids, scores):
        if input_ids.shape[1] == len(prompts[0]) + 3:
            raise ValueError("dead end")
        return scores

    async def main(generator):
        other = asyncio.create_task(generator.generate(prompts[1], max_new_tokens=COUNT))
        tokens = []
        with pytest.raises(ValueError, match="dead end"):
            async for token in generator.stream(prompts[0], max_new_tokens=COUNT, processors=[processor]):
                tokens.append(token)
        assert tokens == expected[0][:3]
        assert (await other).tokens == expected[1]

    run(model, engine, main)


@pytest.mark.parametrize("grace", [0, 30])
def test_close_lets_those_under_way_end_within_the_grace(model, engine, prompts, expected, grace):
    async def main():
        generator = AsyncGenerator(model, engine)
        stream = generator.stream(prompts[0], max_new_tokens=COUNT)
        await stream.accepted()
        closing = asyncio.create_task(generator.close(grace))
        await asyncio.sleep(0)
        with pytest.raises(LeaseError, match="closed"):
            await generator.generate(prompts[1])
        tokens = [token async for token in stream]
        await closing
        await generator.close()
        if grace:
            assert tokens == expected[0]
        else:
            assert stream.request.status in ("cancelled", "length")

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("grace", ["x", None, float("nan"), -1, True])
def test_a_grace_that_is_none_is_refused_and_nothing_closes(model, engine, prompts, grace):
    async def main(generator):
        with pytest.raises(InvalidArgument, match="grace is"):
            await generator.close(grace)
        assert len((await generator.generate(prompts[0], max_new_tokens=2)).tokens) == 2

    run(model, engine, main)


def test_grace_ends(model, engine, prompts):
    async def main():
        generator = AsyncGenerator(model, engine)
        stream = generator.stream(prompts[0], max_new_tokens=450)
        await anext(stream)
        start = time.monotonic()
        await generator.close(grace=0.05)
        assert time.monotonic() - start < 5
        assert stream.request.status == "cancelled"

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_generator_that_cannot_be_made_raises_where_it_is_made(model):
    with pytest.raises(InvalidArgument, match="max_running is 0"):
        AsyncGenerator(model, engine_for(model, num_pages=4), max_running=0)


def test_a_step_thread_that_dies_ends_every_request_with_the_reason(model, engine, prompts, monkeypatch):
    async def main(generator):
        stream = generator.stream(prompts[0], max_new_tokens=400)
        await anext(stream)

        def step():
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(generator._generator, "step", step)
        with pytest.raises(ZeroDivisionError, match="a bug"):
            async for _ in stream:
                pass
        with pytest.raises(LeaseError, match="closed"):
            await until(lambda: not generator._thread.is_alive())
            await generator.generate(prompts[0])

    run(model, engine, main)


def test_pages_held_outside_end_the_request_and_not_the_thread(model, prompts, expected):
    engine = engine_for(model, num_pages=16, page_size=4)

    async def main(generator):
        outside = engine.acquire([90] * 60)
        with pytest.raises(PoolExhausted):
            await generator.generate(prompts[0], max_new_tokens=COUNT)
        outside.release(commit=False)
        assert (await generator.generate(prompts[0], max_new_tokens=COUNT)).tokens == expected[0]

    run(model, engine, main)


def test_a_loop_that_is_gone_cancels_its_requests(model, engine, prompts):
    generator = AsyncGenerator(model, engine)
    loop = asyncio.new_event_loop()
    stream = generator.stream(prompts[0], max_new_tokens=450)
    loop.run_until_complete(anext(stream))
    loop.close()
    deadline = time.monotonic() + 30
    while not stream.request.done and time.monotonic() < deadline:
        time.sleep(0.001)
    assert stream.request.status == "cancelled"
    asyncio.run(generator.close())


def test_an_interpreter_ends_though_nobody_closed_it():
    code = """
import asyncio
from radixkv.hf import AsyncGenerator, engine_for
from tests.hf.helpers import tiny
model = tiny()
generator = AsyncGenerator(model, engine_for(model, num_pages=100))
async def main():
    async for token in generator.stream([1, 2, 3], max_new_tokens=400):
        print("came")
        return
asyncio.run(main())
kept = generator.stream([1, 2, 3], max_new_tokens=400)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=120, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "came"), done.stderr


def test_uvloop(model, engine, prompts, expected):
    uvloop = pytest.importorskip("uvloop")

    async def main():
        async with AsyncGenerator(model, engine) as generator:
            return await asyncio.gather(*(generator.generate(prompt, max_new_tokens=COUNT) for prompt in prompts))

    assert [request.tokens for request in uvloop.run(main())] == expected
