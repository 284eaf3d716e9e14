"""docs/examples/server.py under load: clients that talk in turns to SmolLM2-135M, for some minutes.

    python -m bench.end_to_end.serving [--seconds 300] [--clients 20] [--json]

Each client has conversations of four turns over one of five system prompts, half of them streamed, with a pause to read
between turns. Time to first token is that of streamed answers; cold where fewer than half of the prompt's tokens were
cached. Once, a client leaves in mid-answer. Needs radixkv[hf,serve] and openai.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench.common import ROOT
from bench.common.machine import conditions

SYSTEMS = [
    f"You are the assistant of shop number {i}. "
    + "Answer politely, in one short sentence, and only about the shop. " * 20
    for i in range(5)
]
CAPACITY_MIB = 512
QUESTIONS = ("When do you open?", "And on Sundays?", "Do you sell bread?", "What does it cost?", "Can I pay by card?")


class Load:
    """What all clients do, and what came of it."""

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.until = url, time.monotonic() + seconds
        self.first_tokens: dict[str, list[float]] = {"cold": [], "warm": []}
        self.requests = self.tokens = self.prompt_tokens = self.cached_tokens = 0
        self.errors: list[str] = []

    async def talk(self, client: Any, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < self.until:
            messages = [{"role": "system", "content": chance.choice(SYSTEMS)}]
            for _ in range(4):
                messages.append({"role": "user", "content": chance.choice(QUESTIONS)})
                try:
                    text = await self.ask(client, messages, streamed=chance.random() < 0.5)
                except Exception as error:  # counted, and the client goes on
                    self.errors.append(repr(error))
                    break
                messages.append({"role": "assistant", "content": text})
                await asyncio.sleep(chance.uniform(0, 2))

    async def ask(self, client: Any, messages: list[dict[str, str]], *, streamed: bool) -> str:
        create = client.chat.completions.create
        options = {"model": await self.model(client), "messages": messages, "max_tokens": 24}
        if not streamed:
            answer = await create(**options)
            self.count(answer.usage)
            return str(answer.choices[0].message.content)
        start, first, text, usage = time.monotonic(), None, "", None
        async for chunk in await create(stream=True, stream_options={"include_usage": True}, **options):
            if first is None:
                first = time.monotonic() - start
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            usage = chunk.usage or usage
        self.count(usage)
        assert first is not None
        warm = usage.prompt_tokens_details.cached_tokens >= usage.prompt_tokens / 2
        self.first_tokens["warm" if warm else "cold"].append(first)
        return text

    def count(self, usage: Any) -> None:
        self.requests += 1
        self.tokens += usage.completion_tokens
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.prompt_tokens_details.cached_tokens

    async def model(self, client: Any) -> str:
        if not hasattr(self, "name"):
            self.name = (await client.models.list()).data[0].id
        return str(self.name)

    async def leave(self, client: Any) -> None:
        """Disconnect in the middle of a long answer."""
        messages = [{"role": "user", "content": "Tell me a very long story."}]
        stream = await client.chat.completions.create(
            model=await self.model(client), messages=messages, max_tokens=400, stream=True
        )
        async for _ in stream:
            break
        await stream.close()


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as response:
        found = re.search(rf"^{re.escape(name)} (\S+)$", response.read().decode(), re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def resident(pid: int) -> float:
    """MiB of memory."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


async def drive(load: Load, pid: int, clients: int) -> dict[str, Any]:
    import openai

    async with contextlib.AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(
                openai.AsyncOpenAI(base_url=f"{load.url}/v1", api_key=f"tenant {i % 4}", max_retries=0, timeout=120)
            )
            for i in range(clients + 1)
        ]
        tasks = [asyncio.ensure_future(load.talk(client, i)) for i, client in enumerate(made[1:])]
        start, memory, beside, backed = time.monotonic(), [], [], 0.0
        tasks.append(asyncio.ensure_future(load.leave(made[0])))
        while not all(task.done() for task in tasks):
            memory.append(resident(pid))
            backed = max(backed, CAPACITY_MIB - metric(load.url, 'radixkv_pages{state="free"}') * page_mib(load.url))
            beside.append(memory[-1] - backed)
            await asyncio.wait(tasks, timeout=10)
        seconds = time.monotonic() - start
    return {
        "seconds": round(seconds, 1),
        "requests": load.requests,
        "errors": load.errors,
        "requests_per_s": load.requests / seconds,
        "tokens_per_s": load.tokens / seconds,
        "cached": load.cached_tokens / load.prompt_tokens,
        "first_token_s": {name: spread(times) for name, times in load.first_tokens.items()},
        "memory_mib": quarters(memory),
        "memory_beside_the_pool_mib": quarters(beside),
    }


def page_mib(url: str) -> float:
    """MiB that a page takes: the pool has as many as its capacity holds."""
    states = ("free", "private", "protected", "evictable")
    return CAPACITY_MIB / sum(metric(url, f'radixkv_pages{{state="{state}"}}') for state in states)


def quarters(values: list[float]) -> list[int]:
    """At the start and after each quarter."""
    return [round(values[i * (len(values) - 1) // 4]) for i in range(5)]


def spread(times: list[float]) -> dict[str, float]:
    times = sorted(times)
    return {"count": len(times), "p50": statistics.median(times), "p99": times[int(0.99 * (len(times) - 1))]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [
            sys.executable,
            ROOT / "docs" / "examples" / "server.py",
            "--port",
            str(port),
            "--capacity",
            f"{CAPACITY_MIB}MiB",
        ],
        stdout=sys.stderr,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        while True:
            with contextlib.suppress(OSError):
                metric(url, "radixkv_leases")
                break
            time.sleep(0.5)
        found = asyncio.run(drive(Load(url, options.seconds), server.pid, options.clients))
        found["leases_after"] = metric(url, "radixkv_leases")
    finally:
        server.terminate()
        server.wait()
    print(json.dumps(conditions("bench.end_to_end.serving") | found, indent=None if options.json else 2))
    return int(bool(found["errors"]) or found["leases_after"] > 0)


if __name__ == "__main__":
    sys.exit(main())
