"""What broke a prefix: requests of a session that begin otherwise than the one before, though much of it comes again.

A request is expected to begin with all of its session's previous prompt. Where it does not, what follows the first
differing token is computed anew. What of it stood in the previous request as well (runs of ``RUN`` tokens, anywhere) is
what a stable prompt would have found: the cost. Block ids name a whole prefix, so of a trace of them a break's place is
known and its cost is not: it counts as 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from radixkv.errors import InvalidArgument
from radixkv.traces.replay import Progress
from radixkv.traces.request import Tokens, TraceRequest

__all__ = ["RUN", "Break", "Report", "lint"]

RUN = 16
"""Tokens in a row that must be equal to count as the same text."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Break:
    """A way in which prompts stopped to share, and how often and how dearly it happened."""

    kind: str
    """replaced (other tokens, then the same text), inserted, removed, moved, or rewritten (nothing comes again)."""
    position: int
    """The first differing token."""
    times: int
    lost_tokens: int
    """Tokens computed again although they stood in the request before."""
    request: int
    """The number, from 1, of the first request it happened to."""
    before: int
    """The token at the position in the request before; -1: it ended there."""
    after: int


@dataclass(frozen=True)
class Report:
    """What `lint` found; the dearest break first."""

    requests: int
    followers: int
    """Requests with one before them in their session."""
    input_tokens: int
    lost_tokens: int
    breaks: list[Break]

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**vars(self), "breaks": [vars(found) for found in self.breaks]}


def lint(requests: Iterable[TraceRequest], progress: Progress | None = None) -> Report:
    """Compare each request with the one before it in its session. Keeps the last request of each session.

    Raises InvalidArgument for a trace without sessions, TraceError from the trace.
    """
    last: dict[tuple[str, str], tuple[Tokens, int]] = {}
    times: Counter[tuple[str, int]] = Counter()
    lost: Counter[tuple[str, int]] = Counter()
    first: dict[tuple[str, int], tuple[int, int, int]] = {}
    number = followers = input_tokens = 0
    for number, request in enumerate(requests, 1):
        prompt = request.tokens_in
        input_tokens += len(prompt)
        session = (request.namespace, request.session)
        if request.session:
            before = last.get(session)
            if before is not None:
                followers += 1
                found = _compare(*before, prompt)
                if found is not None:
                    kind, position, cost = found
                    times[kind, position] += 1
                    lost[kind, position] += cost
                    first.setdefault((kind, position), (number, _at(before[0], position), _at(prompt, position)))
            last[session] = (np.concatenate([prompt, request.tokens_out]), _comparable(request))
        if progress is not None:
            progress(number)
    if number and not last:
        raise InvalidArgument(
            "no request of this trace names its session: record it with sessions, else nothing follows"
        )
    breaks = [Break(kind, at, n, lost[kind, at], *first[kind, at]) for (kind, at), n in times.items()]
    breaks.sort(key=lambda b: (-b.lost_tokens, b.position, b.kind))
    return Report(number, followers, input_tokens, sum(lost.values()), breaks)


def _comparable(request: TraceRequest) -> int:
    """How many tokens of the prompt a next one must begin with: of block ids the whole ones, which have one meaning."""
    blocks = request.blocks
    return request.num_in if blocks is None else blocks.length // blocks.unit * blocks.unit


def _compare(old: Tokens, num_prompt: int, new: Tokens) -> tuple[str, int, int] | None:
    """(kind, position, cost) of the break between two requests; None where the new one begins with the old prompt."""
    shorter = min(len(old), len(new))
    differs = np.flatnonzero(old[:shorter] != new[:shorter])
    position = int(differs[0]) if len(differs) else shorter
    if position >= min(num_prompt, len(new)):
        return None
    old_keys, new_keys = _keys(old[position:]), _keys(new[position:])
    again = np.flatnonzero(np.isin(new_keys, old_keys))
    if not len(again):
        return "rewritten", position, 0
    covered = np.zeros(len(new) - position, dtype=bool)
    for offset in range(RUN):
        covered[again + offset] = True
    skipped_new = int(again[0])
    skipped_old = int(np.flatnonzero(old_keys == new_keys[skipped_new])[0])
    if skipped_new == 0:
        came_later = len(old_keys) > 0 and bool(np.isin(old_keys[0], new_keys))
        kind = "moved" if came_later else "removed"
    else:
        kind = "inserted" if skipped_old == 0 else "replaced"
    return kind, position, int(covered.sum())


def _keys(tokens: Tokens) -> npt.NDArray[np.uint64]:
    """A 64-bit key for each run of RUN tokens, [n - RUN + 1]."""
    count = max(0, len(tokens) - RUN + 1)
    keys = np.zeros(count, dtype=np.uint64)
    for offset in range(RUN if count else 0):
        keys = keys * _FACTOR + tokens[offset : offset + count].astype(np.uint64) + np.uint64(1)
    return keys


def _at(tokens: Tokens, position: int) -> int:
    return int(tokens[position]) if position < len(tokens) else -1
