"""docs/examples/server.py, over TCP, with OpenAI's own client."""

import asyncio
import importlib.util
import itertools
import json
import random
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.hf.helpers import assert_drains, build, transformers

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from radixkv.hf import AsyncGenerator, Generator, engine_for  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "server.py"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
TIMEOUT = 60


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("server_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def model():
    return build("LlamaConfig", "LlamaForCausalLM", {"vocab_size": 256, "max_position_embeddings": 4096})


@contextmanager
def serving(example, model, tokenizer, api_keys=frozenset(), num_pages=2000, shutdown=None, **options):
    """A server in a thread of its own; when it has ended, nothing holds a page."""
    engine = engine_for(model, num_pages=num_pages, page_size=16)
    generator = AsyncGenerator(model, engine, tokenizer=tokenizer, **options)
    app = example.make_app(generator, tokenizer, "tiny", api_keys)
    config = uvicorn.Config(
        app, port=0, log_level="critical" if shutdown else "warning", timeout_graceful_shutdown=shutdown
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    def client(api_key="one"):
        return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=TIMEOUT)

    yield SimpleNamespace(url=url, client=client, engine=engine, generator=generator, server=server)
    server.should_exit = True
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert_drains(engine)


@pytest.fixture(scope="module")
def server(example, model, tokenizer):
    with serving(example, model, tokenizer, max_waiting=100) as server:
        yield server


def until(condition):
    """A condition that another thread brings about."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.002)


def run(server, main, api_key="one"):
    """`main(client)`, whose connections are closed in the end."""

    async def all_of_it():
        async with server.client(api_key) as client:
            return await main(client)

    return asyncio.run(asyncio.wait_for(all_of_it(), TIMEOUT))


def user(text):
    return [{"role": "user", "content": text}]


def alone(model, tokenizer, messages, count):
    """What a generator of its own says, without a cache."""
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    with Generator(model, engine_for(model, num_pages=300), tokenizer=tokenizer) as generator:
        request = generator.submit(prompt, max_new_tokens=count)
        generator.run()
    return request.text


# --- twenty clients ---------------------------------------------------------------------------------------------------


def test_twenty_clients_of_three_turns(server, model, tokenizer):
    """Streamed and whole answers at once are those of a generator alone; later turns find the earlier ones cached."""

    async def talk(client, number):
        chance, messages, answers = random.Random(number), [{"role": "system", "content": "Be brief."}], []
        for turn in range(3):
            messages.append({"role": "user", "content": f"{number}/{turn}? " + "ab" * chance.randrange(20)})
            if chance.random() < 0.5:
                stream = await client.chat.completions.create(
                    model="tiny", messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True}
                )
                chunks = [chunk async for chunk in stream]
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
                assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
                usage = chunks[-1].usage
            else:
                whole = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
                text, usage = whole.choices[0].message.content, whole.usage
            assert usage.total_tokens == usage.prompt_tokens + 8
            answers.append((list(messages), text, usage))
            messages.append({"role": "assistant", "content": text})
        return answers

    async def one(number):
        async with server.client() as client:
            return await talk(client, number)

    async def main(client):
        return await asyncio.gather(*(one(number) for number in range(20)))

    for answers in run(server, main):
        for messages, text, _ in answers[:1]:
            assert text == alone(model, tokenizer, messages, 8)
        for (_, _, before), (_, _, after) in itertools.pairwise(answers):
            assert after.prompt_tokens_details.cached_tokens >= before.prompt_tokens - 1


def test_text_completions_and_stop_strings(server, tokenizer):
    async def main(client):
        whole = await client.completions.create(model="tiny", prompt="once", max_tokens=20)
        text = whole.choices[0].text
        stop = text[5:7]
        stopped = await client.completions.create(model="tiny", prompt="once", max_tokens=20, stop=stop)
        tokens = await client.completions.create(model="tiny", prompt=tokenizer.encode("once"), max_tokens=20)
        stream = await client.completions.create(model="tiny", prompt="once", max_tokens=20, stream=True)
        pieces = [chunk.choices[0].text async for chunk in stream]
        return text, stop, stopped.choices[0], tokens.choices[0].text, "".join(pieces)

    text, stop, stopped, of_tokens, streamed = run(server, main)
    assert text == of_tokens == streamed
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")


def test_several_answers_with_seeds(server):
    async def main(client):
        options = {"model": "tiny", "messages": user("roll"), "max_tokens": 12, "temperature": 1.0, "seed": 4}
        several = await client.chat.completions.create(n=3, **options)
        single = await client.chat.completions.create(**(options | {"seed": 5}))
        return [c.message.content for c in several.choices], single.choices[0].message.content, several.usage

    several, single, usage = run(server, main)
    assert len(set(several)) == 3
    assert several[1] == single
    assert usage.completion_tokens == 36


def test_keys_are_namespaces(server):
    async def main(client):
        answer = await client.chat.completions.create(model="tiny", messages=user("a secret " * 9), max_tokens=2)
        return answer.usage.prompt_tokens_details.cached_tokens

    first, other, again = (run(server, main, key) for key in ("red", "blue", "red"))
    assert (first, other) == (0, 0)
    assert again > 50


# --- clients that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [True, False])
def test_who_disconnects_gives_its_pages_back(server, streamed):
    async def main(client):
        create = client.chat.completions.create(
            model="tiny", messages=user("tell me everything"), max_tokens=3000, stream=streamed
        )
        if streamed:
            stream = await create
            async for _ in stream:
                break
            await stream.close()
        else:
            task = asyncio.create_task(create)
            while not server.generator.running:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(server, main)
    until(lambda: server.engine.cache.stats().num_leases == 0)
    assert server.generator.running == 0


@pytest.mark.parametrize("streamed", [True, False])
def test_who_leaves_the_queue_makes_room_in_it(example, model, tokenizer, streamed):
    async def main(client):
        create = client.chat.completions.create
        first = await create(model="tiny", messages=user("first"), max_tokens=3000, stream=True)
        await anext(aiter(first))
        waits = asyncio.create_task(create(model="tiny", messages=user("hm"), max_tokens=9, stream=streamed))
        while not server.generator.waiting:
            await asyncio.sleep(0.001)
        if streamed:
            await (await waits).close()
        waits.cancel()
        while server.generator.waiting:
            await asyncio.sleep(0.001)
        assert server.generator.running == 1
        await first.close()

    with serving(example, model, tokenizer, max_running=1) as server:
        run(server, main)


def test_a_server_that_is_stopped_does_not_wait_for_its_longest_answer(example, model, tokenizer):
    async def main(client):
        stream = await client.completions.create(model="tiny", prompt="on and on", max_tokens=3000, stream=True)
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            async for _ in stream:
                server.server.should_exit = True

    with serving(example, model, tokenizer, shutdown=1) as server:
        run(server, main)
    assert server.engine.cache.stats().committed_tokens < 3000


# --- what is refused --------------------------------------------------------------------------------------------------

BAD = {
    "a long list": ({"n": 129}, openai.BadRequestError, "n"),
    "a field of a message": (
        {"messages": [{"role": "user", "content": "hm", "tool_calls": []}]},
        openai.BadRequestError,
        "tool_calls",
    ),
    "two limits": ({"max_tokens": 5, "max_completion_tokens": 5}, openai.BadRequestError, "max_tokens"),
    "another model": ({"model": "huge"}, openai.NotFoundError, "this server has 'tiny'"),
    "temperature": ({"temperature": -1.0}, openai.BadRequestError, "temperature is -1.0"),
    "top_p": ({"top_p": 0.0}, openai.BadRequestError, "top_p is 0.0"),
    "no tokens": ({"max_tokens": -5}, openai.BadRequestError, "max_new_tokens is -5"),
    "too long": ({"max_tokens": 5000}, openai.BadRequestError, "exceed max_length 4096"),
    "a long prompt": ({"messages": user("x" * 5000)}, openai.BadRequestError, "exceed max_length 4096"),
    "a role": ({"messages": [{"role": "emperor", "content": "hm"}]}, openai.BadRequestError, "role"),
    "no text": ({"messages": [{"role": "user", "content": 5}]}, openai.BadRequestError, "content"),
    "unknown": ({"extra_body": {"best_of": 4}}, openai.BadRequestError, "best_of"),
    "n streamed": ({"n": 2, "stream": True}, openai.BadRequestError, "not streamed"),
    "no seed": ({"seed": "x"}, openai.BadRequestError, "seed"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_requests(server, options, error, message):
    async def main(client):
        await client.chat.completions.create(**({"model": "tiny", "messages": user("hm")} | options))

    with pytest.raises(error, match=message):
        run(server, main)
    assert server.engine.cache.stats().num_leases == 0


@pytest.mark.parametrize(
    "body",
    [
        "", "{", "[]", "5", '{"model": "tiny", "prompt": "\\ud800"}', '{"model": "tiny", "prompt": [1e9]}',
        '{"model": "tiny", "prompt": [-1]}', '{"model": "tiny", "prompt": []}', '{"model": "tiny", "prompt": {}}',
        '{"model": "tiny", "prompt": "a", "temperature": NaN}', '{"model": "tiny", "prompt": "a", "seed": 1e400}',
        f'{{"model": "tiny", "prompt": "a", "max_tokens": {10**30}}}', f'{{"prompt": {"[" * 5000}{"]" * 5000}}}',
        '{"model": "tiny", "prompt": "a", "stop": ""}', '{"model": "tiny", "prompt": "a", "stop": [[]]}',
        '{"model": "tiny", "prompt": "a", "stream_options": 5}', '{"model": null, "prompt": "a"}',
    ],
)  # fmt: skip
def test_whatever_is_sent_is_answered_with_an_error_in_openais_form(server, body):
    request = urllib.request.Request(
        f"{server.url}/v1/completions", body.encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.urlopen(request, timeout=TIMEOUT)
    assert answer.value.code == 400
    assert json.loads(answer.value.read())["error"]["type"] == "invalid_request_error"
    answer.value.close()


def test_a_page_that_is_not_there(server):
    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.urlopen(f"{server.url}/v1/nothing", timeout=TIMEOUT)
    assert (answer.value.code, json.loads(answer.value.read())["error"]["message"]) == (404, "Not Found")
    answer.value.close()


def test_what_is_null_is_as_good_as_not_given(server):
    async def main(client):
        nothing = dict.fromkeys(("max_tokens", "temperature", "seed", "stop", "n", "stream", "stream_options", "user"))
        return await client.chat.completions.create(model="tiny", messages=user("hm"), **nothing)

    assert run(server, main).usage.completion_tokens == 256


def test_no_seed_is_another_answer_each_time(server):
    async def main(client):
        create, options = client.completions.create, {"model": "tiny", "prompt": "roll", "temperature": 1.0}
        return {(await create(max_tokens=12, **options)).choices[0].text for _ in range(4)}

    assert len(run(server, main)) == 4


def test_a_model_without_a_chat_template_completes_text(server, tokenizer, monkeypatch):
    async def main(client):
        with pytest.raises(openai.BadRequestError, match="tiny has no chat template: use /v1/completions"):
            await client.chat.completions.create(model="tiny", messages=user("hm"))
        return await client.completions.create(model="tiny", prompt="hm", max_tokens=2)

    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert run(server, main).usage.completion_tokens == 2


def test_no_prompt(server):
    async def main(client):
        await client.completions.create(model="tiny", prompt="")

    with pytest.raises(openai.BadRequestError, match="non-empty"):
        run(server, main)


def test_a_full_queue_and_a_small_pool(example, model, tokenizer):
    """429 says when to come again; a prompt that the whole pool could not hold is a bad request."""

    async def main(client):
        create = client.chat.completions.create
        many = [create(model="tiny", messages=user(f"{i}"), max_tokens=60) for i in range(20)]
        answers = await asyncio.gather(*many, return_exceptions=True)
        with pytest.raises(openai.BadRequestError, match="the pool has 40"):
            await create(model="tiny", messages=user("x" * 600), max_tokens=60)
        return answers

    with serving(example, model, tokenizer, num_pages=40, max_running=2, max_waiting=3) as server:
        answers = run(server, main)
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert 1 <= len(refused) <= 20 - 3  # all twenty may be there before the first of them runs
    assert all("max_waiting is 3" in str(error) for error in refused)
    assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)
    assert all(answer.usage.completion_tokens == 60 for answer in answers if answer not in refused)


def test_keys_that_are_not_known(example, model, tokenizer):
    async def main(client):
        return await client.chat.completions.create(model="tiny", messages=user("hm"), max_tokens=1)

    with serving(example, model, tokenizer, api_keys=frozenset({"right"})) as server:
        assert run(server, main, "right").usage.completion_tokens == 1
        with pytest.raises(openai.AuthenticationError, match="unknown API key"):
            run(server, main, "wrong")
        with pytest.raises(openai.AuthenticationError):
            run(
                server,
                lambda client: client.post("/chat/completions", body={"nothing": "right"}, cast_to=dict),
                "wrong",
            )


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_models_and_metrics(server):
    async def main(client):
        await client.chat.completions.create(model="tiny", messages=user("count me"), max_tokens=3)
        return [entry.id async for entry in client.models.list()]

    assert run(server, main) == ["tiny"]
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        text = response.read().decode()
    (line,) = [line for line in text.splitlines() if line.startswith("radixkv_finished_requests_total{")][:1]
    assert float(line.split()[-1]) >= 1


@pytest.mark.parametrize("n", [1, 3])
def test_a_whole_answer_that_goes_wrong_is_no_answer(server, model, n):
    def fail(module, inputs, output):
        return output * torch.nan

    async def main(client):
        await client.chat.completions.create(model="tiny", messages=user("go wrong"), max_tokens=50, n=n)

    with model.lm_head.register_forward_hook(fail), pytest.raises(openai.InternalServerError, match="logit is nan"):
        run(server, main)


def test_an_answer_that_goes_wrong_is_an_event(server, model):
    """Logits that are NaN, after the first tokens of an answer were sent."""
    calls = 0

    def fail(module, inputs, output):
        nonlocal calls
        calls += 1
        return output * torch.nan if calls > 3 else None

    async def main(client):
        stream = await client.chat.completions.create(
            model="tiny", messages=user("go wrong"), max_tokens=50, stream=True
        )
        async for _ in stream:
            pass

    with model.lm_head.register_forward_hook(fail), pytest.raises(openai.APIError, match="largest logit is nan"):
        run(server, main)
    assert server.engine.cache.stats().num_leases == 0
