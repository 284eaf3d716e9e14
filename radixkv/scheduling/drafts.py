"""Guesses of what comes next, computed in the step that tells whether they are right (speculative decoding).

A step computes the row of a request's last token, and a row for each guess after it. The first row says what comes
after the token; if that is the first guess, the second row says what comes after that, and so on:

    tokens ... t | guesses a b c        rows: t a b c        say: a b x -     accepted: a b x, taken back: c

So a step gives one token at least, as always, and one more for each guess that was right. Guesses take only rows and
pages that nobody else wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from radixkv.errors import InvalidArgument, PoolExhausted
from radixkv.scheduling.arguments import check_tokens
from radixkv.scheduling.request import Request

__all__ = ["accepted_tokens", "add_drafts", "take_back"]


def add_drafts(requests: Sequence[Request], rows: int) -> None:
    """Let those that decode guess, on `rows` rows at most; each lease is extended by the guesses of its request."""
    for request in requests:
        lease = request.lease
        left = request.max_new_tokens - len(request.tokens) - 1
        most = min(rows, request.room.rows - 1, left)
        decodes = request.tokens and not request.followers
        if lease is None or most < 1 or not decodes or lease.num_written != request.num_tokens - 1:
            continue
        guesses = list(request.draft(most))[:most]
        if guesses:
            try:
                lease.extend(guesses)
            except PoolExhausted:
                return
            request.drafts = lease.tokens[request.num_tokens :].tolist()
            rows -= len(guesses)


def take_back(request: Request, keep: int) -> None:
    """Leave `keep` tokens in the lease of `request`, which has guesses, if any, after its own."""
    if request.drafts and request.lease is not None:
        request.lease.truncate(keep)
        request.drafts = []


def accepted_tokens(request: Request, given: Any) -> list[int]:
    """What a host gives `Scheduler.accept` for one request: a token, or the guesses that were right and one more."""
    tokens: list[int] = check_tokens([given] if isinstance(given, int | np.integer) else given).tolist()
    if request.done:
        return tokens  # cancelled since: it takes none
    if tokens[:-1] != request.drafts[: len(tokens) - 1] or len(tokens) > len(request.drafts) + 1:
        raise InvalidArgument(
            f"tokens {tokens} for request {request.id}, whose guesses were {request.drafts}: give those that were "
            "right, in order, and then the token that the row of the last of them says"
        )
    return tokens
