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
import random
import time
import uuid
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin while they wait starve others

import torch
import uvicorn
from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import AliasChoices, BaseModel, Field, model_validator
from starlette.exceptions import HTTPException

from radixkv import PoolExhausted, QueueFull, RadixKVError
from radixkv.demo.model import find_model, load_model
from radixkv.hf import AsyncGenerator, Stream, engine_for, optimize
from radixkv.observe.metrics import Metrics

Text = Annotated[str, Field(min_length=0)]  # with a bound, pydantic refuses half of a surrogate pair


class Options(BaseModel, extra="forbid"):
    """What both kinds of completion take. What is not listed is refused, and not ignored."""

    model: str
    max_tokens: int = Field(256, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float = 0
    frequency_penalty: float = 0
    seed: int = Field(default_factory=lambda: random.getrandbits(32))
    stop: str | list[str] = []
    n: int = Field(1, le=128)
    stream: bool = False
    stream_options: dict[str, bool] = {}
    user: str = ""

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, fields: Any) -> Any:
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    def for_submit(self) -> dict[str, Any]:
        same = self.model_dump(include={"temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "n"})
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return same | {"max_new_tokens": self.max_tokens, "stop_strings": stop or None}


class Message(BaseModel, extra="forbid"):
    role: Literal["system", "user", "assistant", "tool"]
    content: Text


class Chat(Options):
    messages: list[Message]


class Completion(Options):
    prompt: Text | list[int]


def make_app(generator: AsyncGenerator, tokenizer: Any, name: str, api_keys: frozenset[str] = frozenset()) -> FastAPI:
    """The application. With `api_keys`, others are refused."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        async with generator:
            yield

    app, metrics = FastAPI(lifespan=lifespan), Metrics(generator.engine.cache).follow(generator.engine)

    async def namespace_of(authorization: str = Header("")) -> str:
        key = authorization.removeprefix("Bearer ")
        if api_keys and key not in api_keys:
            raise HTTPException(401, "unknown API key")
        return hashlib.sha256(key.encode()).hexdigest()[:32] if key else ""

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "radixkv"}]}

    @app.get("/metrics")
    async def scrape():
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, http: Request, namespace: str = Depends(namespace_of)):
        if not tokenizer.chat_template:
            raise HTTPException(400, f"{name} has no chat template: use /v1/completions")
        messages = [message.model_dump() for message in body.messages]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return await answer(http, body, prompt, namespace, "chat.completion")

    @app.post("/v1/completions")
    async def completion(body: Completion, http: Request, namespace: str = Depends(namespace_of)):
        prompt = tokenizer.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        return await answer(http, body, prompt, namespace, "text_completion")

    async def answer(http: Request, body: Options, prompt: list[int], namespace: str, kind: str):
        if body.model != name:
            raise HTTPException(404, f"model is {body.model!r}: this server has {name!r}")
        if body.stream and body.n > 1:
            raise HTTPException(400, "n > 1 is not streamed: ask for one answer, or for all of them at once")
        stream = generator.text(prompt, namespace=namespace, **body.for_submit())
        request = metrics.watch(await stream.accepted())  # what is refused raises here, before anything is sent
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}
        if body.stream:
            with_usage = body.stream_options.get("include_usage", False)
            return StreamingResponse(events(stream, head, with_usage), media_type="text/event-stream")
        watcher = asyncio.create_task(close_when_gone(http, stream))
        await stream.end()
        watcher.cancel()
        choices = [choice(kind, one.text, one.status, index) for index, one in enumerate(request.siblings)]
        return head | {"choices": choices, "usage": usage(request)}

    @app.exception_handler(RadixKVError)
    @app.exception_handler(RequestValidationError)
    @app.exception_handler(TemplateError)
    @app.exception_handler(HTTPException)
    async def refused(_: Request, why: Exception):
        """An error in OpenAI's form. What is wrong with the request is 400."""
        ours = isinstance(why, RadixKVError) and not isinstance(why, ValueError | PoolExhausted)
        status = getattr(why, "status_code", 429 if isinstance(why, QueueFull) else 503 if ours else 400)
        headers = {"Retry-After": str(int(generator.estimated_wait() or 0) + 1)} if status == 429 else {}
        kind = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
        what = {"message": str(getattr(why, "detail", why)), "type": kind.get(status, "invalid_request_error")}
        return JSONResponse({"error": what | {"param": None, "code": None}}, status, headers)

    return app


async def events(stream: Stream[str], head: dict[str, Any], with_usage: bool):
    """The answer as server-sent events. A client that goes away closes this, and so cancels the request."""
    kind = head["object"] = head["object"].replace("chat.completion", "chat.completion.chunk")

    def event(**what: Any) -> str:
        return f"data: {json.dumps(head | what)}\n\n"

    async with aclosing(stream):
        try:
            async for piece in stream:
                yield event(choices=[choice(kind, piece)])
        except Exception as why:
            yield event(error={"message": str(why), "type": "server_error"})
            return
    yield event(choices=[choice(kind, "", stream.request.status)])
    if with_usage:
        yield event(choices=[], usage=usage(stream.request))
    yield "data: [DONE]\n\n"


async def close_when_gone(http: Request, stream: Stream[str]) -> None:
    """Cancels the request of a client that goes away before its whole answer is there."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    await stream.aclose()


def choice(kind: str, text: str, ended: str | None = None, index: int = 0) -> dict[str, Any]:
    part = {"chat.completion": "message", "chat.completion.chunk": "delta"}.get(kind)
    said = {part: {"role": "assistant", "content": text}} if part else {"text": text}
    finish = "length" if ended == "deadline" else ended
    return {"index": index, "finish_reason": finish, "logprobs": None} | said


def usage(request: Any) -> dict[str, Any]:
    prompt, said = len(request.prompt), sum(len(one.tokens) for one in request.siblings)
    counts = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}
    return counts | {"prompt_tokens_details": {"cached_tokens": request.stats.cached_tokens}}


def main() -> None:
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
    app = make_app(generator, tokenizer, source.stem)
    uvicorn.run(app, port=options.port, log_level="warning", timeout_graceful_shutdown=10)


if __name__ == "__main__":
    main()
