"""Made-up workloads, so that nobody needs a trace to try a cache: chat, few-shot prompts, agent loops.

Every generator yields requests with outputs, in the order of their (made-up) time. The same seed gives the same
requests: only whole random numbers and uniform floats of numpy's PCG64 are used, whose streams are stable.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from radixkv.errors import InvalidArgument
from radixkv.traces.request import Tokens, TraceRequest

__all__ = ["WORKLOADS", "agent", "chat", "fewshot", "generate"]

VOCABULARY = 32_000
"""Token ids are drawn from 0 to VOCABULARY - 1."""


class _Random:
    """The few distributions the workloads need, drawn from a seeded PCG64."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def tokens(self, count: int) -> Tokens:
        """[count] int32 of random text."""
        return self._rng.integers(0, VOCABULARY, size=count, dtype=np.int32)

    def length(self, mean: float, least: int = 1) -> int:
        """A length of ``least`` or more with the given mean and an exponential spread above ``least``."""
        return least + round(self.wait(mean - least))

    def between(self, first: int, last: int) -> int:
        """A whole number from ``first`` to ``last``, each as likely."""
        return int(self._rng.integers(first, last + 1))

    def wait(self, mean: float) -> float:
        """An exponential time."""
        return -mean * math.log(1.0 - float(self._rng.random()))

    def happens(self, probability: float) -> bool:
        """True with the given probability."""
        return float(self._rng.random()) < probability

    def zipf(self, shares: list[float]) -> int:
        """An index, drawn by cumulative shares as ``_zipf_shares`` gives them."""
        return min(bisect(shares, float(self._rng.random()) * shares[-1]), len(shares) - 1)


def _zipf_shares(count: int, exponent: float) -> list[float]:
    return list(accumulate((rank + 1) ** -exponent for rank in range(count)))


@dataclass
class _Session:
    """A conversation or an agent's run: the last input and output (at first: what it starts from, and nothing)."""

    name: str
    context: Tokens
    steps_left: int
    output: Tokens = field(default_factory=lambda: np.empty(0, dtype=np.int32))

    def continued(self, new: Tokens) -> Tokens:
        """The context that ends with ``new``: all that was said before, then it."""
        return np.concatenate([self.context, self.output, new])


def chat(seed: int = 0) -> Iterator[TraceRequest]:
    """Conversations of several turns, some hundred at a time, that share a few system prompts. Endless.

    12 system prompts of 100 to 1,100 tokens, popular by Zipf's law; a user's message has 60 tokens on average, an
    answer 160; a conversation has 5 turns on average, about a minute apart, and ends at 8,192 tokens.
    """
    rng = _Random(seed)
    systems = [rng.tokens(rng.between(100, 1100)) for _ in range(12)]
    popularity = _zipf_shares(len(systems), 1.1)

    def start(number: int) -> _Session:
        return _Session(f"chat-{number}", systems[rng.zipf(popularity)], 1 + rng.length(4.0, least=0))

    def step(session: _Session) -> tuple[Tokens, Tokens]:
        tokens_in = session.continued(rng.tokens(rng.length(60, least=4)))
        if len(tokens_in) > 8192:
            session.steps_left = 1
        return tokens_in, rng.tokens(rng.length(160, least=8))

    return _interleave(rng, start, step, arrival=1.0, pause=60.0)


def fewshot(seed: int = 0) -> Iterator[TraceRequest]:
    """Single prompts that begin with the examples of one of 40 tasks, popular by Zipf's law. Endless.

    A task has an instruction and 3 to 8 examples of 120 tokens on average; a question has 60 tokens, its answer 80.
    """
    rng = _Random(seed)
    tasks = [
        np.concatenate([rng.tokens(rng.length(120, least=10)) for _ in range(rng.between(4, 9))]) for _ in range(40)
    ]
    popularity = _zipf_shares(len(tasks), 1.0)
    now, number = 0.0, 0
    while True:
        tokens_in = np.concatenate([tasks[rng.zipf(popularity)], rng.tokens(rng.length(60, least=5))])
        yield TraceRequest(tokens_in, rng.tokens(rng.length(80)), session=f"fewshot-{number}", timestamp=now)
        now, number = now + rng.wait(0.5), number + 1


def agent(seed: int = 0) -> Iterator[TraceRequest]:
    """Tool-using agents (ReAct loops), some at a time: each step appends what a tool answered and asks again. Endless.

    4 agents with instructions and tool descriptions of 1,000 to 3,000 tokens; a task has 80 tokens and 4 to 20 steps; a
    step puts out 60 tokens on average and brings 250 tokens back, a few seconds later. One step in ten is asked twice,
    with the same input (a retry).
    """
    rng = _Random(seed)
    tools = [rng.tokens(rng.between(1000, 3000)) for _ in range(4)]
    popularity = _zipf_shares(len(tools), 1.0)

    def start(number: int) -> _Session:
        task = np.concatenate([tools[rng.zipf(popularity)], rng.tokens(rng.length(80, least=10))])
        return _Session(f"agent-{number}", task, rng.between(4, 20))

    def step(session: _Session) -> tuple[Tokens, Tokens]:
        tokens_in = session.context
        if len(session.output) and not rng.happens(0.1):
            tokens_in = session.continued(rng.tokens(rng.length(250, least=5)))
        return tokens_in, rng.tokens(rng.length(60, least=5))

    return _interleave(rng, start, step, arrival=3.0, pause=4.0)


def _interleave(
    rng: _Random,
    start: Callable[[int], _Session],
    step: Callable[[_Session], tuple[Tokens, Tokens]],
    arrival: float,
    pause: float,
) -> Iterator[TraceRequest]:
    """Run sessions side by side: a new one every ``arrival`` seconds, ``pause`` seconds between the steps of each."""
    waiting: list[tuple[float, int, _Session]] = []
    next_arrival, num_sessions, order = 0.0, 0, 0
    while True:
        while not waiting or next_arrival <= waiting[0][0]:
            heapq.heappush(waiting, (next_arrival, order, start(num_sessions)))
            next_arrival += rng.wait(arrival)
            num_sessions, order = num_sessions + 1, order + 1
        now, _, session = heapq.heappop(waiting)
        tokens_in, tokens_out = step(session)
        yield TraceRequest(tokens_in, tokens_out, session=session.name, timestamp=round(now, 3))
        session.context, session.output = tokens_in, tokens_out
        session.steps_left -= 1
        if session.steps_left > 0:
            heapq.heappush(waiting, (now + rng.wait(pause), order, session))
            order += 1


WORKLOADS: dict[str, Callable[[int], Iterator[TraceRequest]]] = {"agent": agent, "chat": chat, "fewshot": fewshot}
"""The workloads by name; each takes a seed and is endless."""


def generate(kind: str, requests: int = 1000, seed: int = 0) -> Iterator[TraceRequest]:
    """The first ``requests`` requests of the workload ``kind``. Raises InvalidArgument for an unknown kind."""
    if kind not in WORKLOADS:
        raise InvalidArgument(f"no workload {kind!r}: choose one of {', '.join(WORKLOADS)}")
    if requests < 1 or seed < 0:
        raise InvalidArgument(f"{requests} requests, seed {seed}: give at least 1 request and a seed of 0 or more")
    workload = WORKLOADS[kind](seed)
    return (next(workload) for _ in range(requests))
