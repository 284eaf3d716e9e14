"""Who is served first: a key of each request, the lowest first.

A key is asked for once, when a request is submitted, so that two requests never preempt each other in turn. The first
in order is never preempted and gets what it needs; so that everybody is the first at some time, keys of later requests
must in the end exceed any earlier one. Each policy here does that: nobody starves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from reprlib import repr as shown
from typing import Any

from radixkv.errors import InvalidArgument
from radixkv.scheduling.request import Request

__all__ = ["AHEAD", "POLICIES", "Policy", "check_keys", "check_policy", "longest_prefix_first"]

Policy = str | Callable[[Any], Any]
"""The name of a policy, or a key function."""

AHEAD = 100
"""Earlier requests that a request overtakes for each step of its priority."""

AGE = 16
"""Cached tokens for which a request overtakes one earlier request: chosen by simulation, docs/scheduling.md."""

LOOK = 128
"""Waiting requests that are compared by their cached prefixes, the first to have arrived."""


def by_arrival(request: Request) -> int:
    """First come, first served."""
    return request.id


def by_priority(request: Request) -> int:
    """The higher priority first, as long as that overtakes no more than `AHEAD` requests a step of it."""
    return request.id - AHEAD * request.priority


POLICIES: dict[str, Callable[[Request], Any]] = {
    "arrival": by_arrival,
    "priority": by_priority,
    "prefix": by_arrival,  # once they run; who is admitted says `longest_prefix_first`
}


def longest_prefix_first(waiting: Sequence[Request], cached: Callable[[Request], int]) -> list[Request]:
    """In which order to admit them under "prefix": the longest cached prefix first, which ages.

    Each `AGE` cached tokens overtake one earlier request. So a request is overtaken by a bounded number of later ones,
    its prompts' length in tokens divided by `AGE`, and nobody starves.
    """
    return sorted(waiting[:LOOK], key=lambda request: (request.id - cached(request) / AGE, request.id))


def check_keys(requests: Sequence[Request], others: Sequence[Request]) -> None:
    """Refuse a key that cannot be compared with another where it comes, and not in the middle of a step."""
    for place, request in enumerate(requests):
        for other in (*requests[:place], *others):
            try:
                bool(request.place < other.place)
            except Exception as error:
                raise InvalidArgument(
                    f"policy gives the key {shown(request.place[0])}, which cannot be compared with "
                    f"{shown(other.place[0])} of request {other.id}: return numbers, or tuples of one form"
                ) from error


def check_policy(policy: Any) -> Callable[[Any], Any]:
    """The key function of `policy`."""
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]
    if callable(policy):
        return policy  # type: ignore[no-any-return]
    names = ", ".join(map(repr, POLICIES))
    raise InvalidArgument(f"policy is {shown(policy)}: give {names}, or a function that returns a request's sort key")
