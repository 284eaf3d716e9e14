"""Speculative decoding: what may come next is guessed, and one forward pass says how far the guesses are right.

The rule of acceptance is rejection sampling (Leviathan et al., 2023; Chen et al., 2023). A guess of a guesser that is
sure of it is accepted with the probability p that the model gives it, and else a token is drawn from what is left of
the model's distribution without it. Drawing a token from the model and comparing it with the guess is just that, and
done with the random number that the token would have taken anyway it gives the very token. So answers are the same with
and without guesses: greedy or seeded, alone or in a batch, up to the rounding of a forward pass of more rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import takewhile
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any

import numpy as np

from radixkv.content import FIRST_CONTENT_TOKEN
from radixkv.errors import InvalidArgument
from radixkv.scheduling.arguments import check_tokens

if TYPE_CHECKING:
    from radixkv.hf.request import Request

__all__ = ["Draft", "Drafter", "Guesser", "PromptLookup", "check_draft"]

_LOG = logging.getLogger("radixkv")

Guesser = Callable[[int], Sequence[int]]
"""Called with how many tokens are wanted at most; returns those that may come next in its request, or none."""

Draft = str | Callable[["Request"], Guesser]
"""The name of a kind of guesser, or a function that makes the one of a request."""


class PromptLookup:
    """Guesses that what came after the last few tokens where they last occurred comes again: quotes, code, loops.

    Costs a search through the request's tokens, some microseconds for ten thousand, and no model.
    """

    LENGTHS = (3, 2)
    """How many last tokens are looked for, the longest first."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._bytes = bytearray(request.prompt.tobytes())  # int32, so that a search is one of bytes
        self._generated = 0

    def __call__(self, count: int) -> list[int]:
        tokens = self._request.tokens
        self._bytes += np.asarray(tokens[self._generated :], np.int32).tobytes()
        self._generated = len(tokens)
        for length in self.LENGTHS:
            if (at := self._after_last(length)) >= 0:
                return self._read(at, count)
        return []

    def _after_last(self, length: int) -> int:
        """The token after the last earlier place that has the last `length` tokens; -1 if there is none."""
        pattern = self._bytes[-4 * length :]
        end = len(self._bytes) - 4
        while True:
            at = self._bytes.rfind(pattern, 0, end)
            if at % 4 == 0 or at < 0:
                return at // 4 + length if at >= 0 else -1
            end = at + len(pattern) - 1  # between two tokens: go on before it

    def _read(self, at: int, count: int) -> list[int]:
        """`count` tokens from there on; past the end they repeat. A picture ends them: nobody generates one."""
        found: list[int] = np.frombuffer(bytes(self._bytes[4 * at : 4 * (at + count)]), np.int32).tolist()
        if max(found) >= FIRST_CONTENT_TOKEN:
            return list(takewhile(FIRST_CONTENT_TOKEN.__gt__, found))
        return (found * -(-count // len(found)))[:count]


DRAFTS: dict[str, Callable[[Request], Guesser]] = {"prompt-lookup": PromptLookup}


def check_draft(draft: Any) -> Callable[[Request], Guesser] | None:
    """What makes the guesser of a request; None for none."""
    if draft is None:
        return None
    if isinstance(draft, str) and draft in DRAFTS:
        return DRAFTS[draft]
    if callable(draft):
        return draft  # type: ignore[no-any-return]
    names = ", ".join(map(repr, DRAFTS))
    raise InvalidArgument(f"draft is {shown(draft)}: give {names}, a function that makes a request's guesser, or None")


class Drafter:
    """Asks the guesser of a request: for twice as many tokens after all were right, else for one more than were.

    So it guesses far ahead in a copy, up to `most` tokens, and costs little where guesses are mostly wrong.
    """

    def __init__(self, request: Request, guesser: Guesser, most: int, vocabulary: int) -> None:
        self._request, self._most, self._vocabulary = request, most, vocabulary
        self._guesser: Guesser | None = guesser
        self._ahead = min(2, most)
        self._drafted = self._accepted = 0

    def __call__(self, count: int) -> list[int]:
        """Up to `count` guesses. A guesser that raises or gives no tokens is not asked again."""
        if self._guesser is None:
            return []
        self._look_back()
        count = min(count, self._ahead)
        try:
            found = list(self._guesser(count))[:count]
            return check_tokens(found, self._vocabulary).tolist() if found else []
        except Exception as error:  # guesses save time, and nothing depends on them
            _LOG.error("the guesser of request %d raised: it goes on without", self._request.id, exc_info=error)
            self._guesser = None
            return []

    def _look_back(self) -> None:
        stats = self._request.stats
        drafted, right = stats.drafted_tokens - self._drafted, stats.accepted_tokens - self._accepted
        self._drafted, self._accepted = stats.drafted_tokens, stats.accepted_tokens
        if drafted:
            self._ahead = min(2 * drafted if right == drafted else right + 1, self._most)
