"""An OpenAI-compatible server in one file: chat and text completions, whole or streamed, over `AsyncGenerator`.

    python docs/examples/server.py [--model FOLDER_OR_GGUF] [--port 8000] [--capacity 2GiB] [--dtype bfloat16]

Each API key is a namespace: no client finds, or can time, what another has cached. Who disconnects is cancelled, and
its pages are free within a step. `/metrics` is for Prometheus. Needs radixkv[hf,serve].
"""

import argparse
import asyncio
import hashlib
import json
import os
import time
import uuid
from contextlib import aclosing, asynccontextmanager
from typing import Any, Literal

import prometheus_client
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict

from radixkv import PoolExhausted, QueueFull, RadixKVError
from radixkv.hf import AsyncGenerator, engine_for
from radixkv.observe.metrics import Metrics


class Options(BaseModel):
    """What both kinds of completion take. What is not listed is refused, and not ignored."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: str | list[str] = []
    n: int = 1
    stream: bool = False
    stream_options: dict[str, bool] = {}
    user: str = ""

    def for_submit(self) -> dict[str, Any]:
        same = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "n")
        stop = {"stop_strings": [self.stop] if isinstance(self.stop, str) else self.stop} if self.stop else {}
        tokens = self.max_completion_tokens or self.max_tokens or 256
        return {name: getattr(self, name) for name in same} | stop | {"max_new_tokens": tokens}


class Message(BaseModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Chat(Options):
    messages: list[Message]


class Completion(Options):
    prompt: str | list[int]


def make_app(generator: AsyncGenerator, tokenizer: Any, name: str, api_keys: frozenset[str] = frozenset()) -> FastAPI:
    """The application; with `api_keys`, others are refused."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await generator.close(grace=10)

    app, metrics = FastAPI(lifespan=lifespan), Metrics(generator.engine.cache)
    registry = prometheus_client.CollectorRegistry()
    registry.register(metrics)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "radixkv"}]}

    @app.get("/metrics")
    async def scrape():
        return Response(prometheus_client.generate_latest(registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, http: Request):
        messages = [message.model_dump() for message in body.messages]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return await answer(http, body, tokenizer.encode(text, add_special_tokens=False), "chat.completion")

    @app.post("/v1/completions")
    async def completion(body: Completion, http: Request):
        prompt = tokenizer.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        return await answer(http, body, prompt, "text_completion")

    async def answer(http: Request, body: Options, prompt: list[int], kind: str):
        key = http.headers.get("authorization", "").removeprefix("Bearer ")
        if api_keys and key not in api_keys:
            return error(401, "unknown API key")
        if body.model != name:
            return error(404, f"model is {body.model!r}: this server has {name!r}")
        if body.stream and body.n > 1:
            return error(400, "n > 1 is not streamed: ask for one answer, or for all of them at once")
        namespace = hashlib.sha256(key.encode()).hexdigest()[:32] if key else ""
        stream = generator.text(prompt, namespace=namespace, **body.for_submit())
        request = metrics.watch(await stream.accepted())  # what is refused is refused here: see the handlers below
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if body.stream:
            events = chunks(stream, head, kind, body.stream_options.get("include_usage", False))
            return StreamingResponse(events, media_type="text/event-stream")
        if not await unless_gone(http, stream.end()):
            return Response(status_code=499)  # which nobody reads
        choices = [choice(kind, i, one.text, one.status) for i, one in enumerate(request.siblings)]
        return head | {"object": kind, "choices": choices, "usage": usage(request)}

    @app.exception_handler(RadixKVError)
    async def refused(http: Request, why: RadixKVError):
        if isinstance(why, QueueFull):
            return error(429, str(why), {"Retry-After": str(int(generator.estimated_wait() or 0) + 1)})
        return error(400 if isinstance(why, ValueError | PoolExhausted) else 503, str(why))

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(TemplateError)
    async def invalid(http: Request, why: Exception):
        return error(400, str(why))

    return app


def error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status, headers)


def choice(kind: str, index: int, text: str, status: str) -> dict[str, Any]:
    finish = "stop" if status == "stop" else "length"  # or its deadline
    said = {"message": {"role": "assistant", "content": text}} if kind == "chat.completion" else {"text": text}
    return {"index": index, "finish_reason": finish, "logprobs": None} | said


def usage(request: Any) -> dict[str, Any]:
    prompt, said = len(request.prompt), sum(len(one.tokens) for one in request.siblings)
    cached = {"cached_tokens": request.stats.cached_tokens}
    counts = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}
    return counts | {"prompt_tokens_details": cached}


async def chunks(stream: Any, head: dict[str, Any], kind: str, with_usage: bool):
    """The answer as server-sent events. A client that goes away closes this, and so cancels the request."""
    chat = kind == "chat.completion"
    head = head | {"object": "chat.completion.chunk" if chat else kind}

    def event(text: str, finish: str | None = None) -> str:
        said = {"delta": {"content": text} if finish is None else {}} if chat else {"text": text}
        return sse(head | {"choices": [{"index": 0, "finish_reason": finish, "logprobs": None} | said]})

    async with aclosing(stream):
        try:
            async for piece in stream:
                yield event(piece)
        except Exception as why:
            yield sse({"error": {"message": str(why), "type": "server_error"}})
            return
    yield event("", "stop" if stream.request.status == "stop" else "length")
    if with_usage:
        yield sse(head | {"choices": [], "usage": usage(stream.request)})
    yield "data: [DONE]\n\n"


def sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def unless_gone(http: Request, work: Any) -> bool:
    """Wait for `work`, which is cancelled if the client disconnects first: then False."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0] in done and tasks[0].result() is not None
    finally:
        for task in tasks:
            task.cancel()


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait starve the others
    import torch

    from radixkv.demo.model import find_model, load_model
    from radixkv.hf import optimize

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder of transformers or a GGUF file; by default the demo's")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--capacity", default="2GiB", help="memory for K and V")
    parser.add_argument("--max-waiting", type=int, default=100, help="requests that may wait; more get status 429")
    options = parser.parse_args()
    source = find_model(options.model)
    model, tokenizer = load_model(source, getattr(torch, options.dtype), print)
    if options.model is None and model.device.type == "cpu":
        optimize(model)
    engine = engine_for(model, capacity=options.capacity)
    generator = AsyncGenerator(model, engine, tokenizer=tokenizer, max_waiting=options.max_waiting)
    print(f"serving {source.stem} on {engine!r}")
    uvicorn.run(make_app(generator, tokenizer, source.stem), port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
