"""One generation request: what was asked, what has come of it, and its figures.

submit ─► waiting ──► running ──stop token or length──► done
             ▲           │
             └─ preempt ─┘      (and from either: cancelled, or ended by an error)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from reprlib import repr as shown
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import numpy as np

from radixkv.errors import InvalidArgument
from radixkv.scheduling.arguments import check_namespace, check_token_set, check_tokens, integer, number

if TYPE_CHECKING:
    from radixkv.cache import Lease
    from radixkv.scheduling.room import Room

__all__ = ["Request", "RequestStats", "Status"]

Status = Literal["waiting", "running", "stop", "length", "deadline", "cancelled", "error"]
"""Waiting and running requests are unfinished. The others say why generation ended: a stop token, `max_new_tokens`,
`deadline`, a call of cancel, or `Request.error`."""


@dataclass
class RequestStats:
    """Figures of one request. Tokens are counted once for every time they are computed, so a preemption shows."""

    prompt_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose K and V were there at first admission; for a fork the whole prompt."""
    restored_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens that came from the tiers, by source: "ram", "disk", "snapshot". Again after each preemption."""
    fetch_seconds: float = 0.0
    """How long they took, while the request waited."""
    computed_tokens: int = 0
    """Tokens run through the model, recomputation after preemptions included."""
    generated_tokens: int = 0
    drafted_tokens: int = 0
    """Guesses that were computed, those that were right and those that were not."""
    accepted_tokens: int = 0
    """Generated tokens that had been guessed: each saved a step."""
    time_to_first_token: float | None = None
    """Seconds from submission to the first token; None until then."""
    preemptions: int = 0


@dataclass(eq=False)
class Request:
    """A prompt, and how many tokens to append to it. Once submitted, only the `Scheduler` changes it.

    Subclasses may add what a host or a policy needs to know. Raises InvalidTokens for a bad prompt,
    InvalidArgument for the rest.
    """

    if TYPE_CHECKING:  # what it may be given; what it has of it follows

        def __init__(
            self,
            prompt: Sequence[int] | np.ndarray,
            max_new_tokens: int = 64,
            stop_tokens: Iterable[int] = frozenset(),
            namespace: str = "",
            priority: int = 0,
            deadline: float | None = None,
            cold: bool = False,
        ) -> None: ...

    prompt: np.ndarray
    """int32 `[prompt_tokens]`; given as a list or an integer array."""
    max_new_tokens: int = 64
    stop_tokens: frozenset[int] = frozenset()
    """They end the request when generated, as its last token."""
    namespace: str = ""
    priority: int = 0
    """The higher comes first, under the policy "priority"."""
    deadline: float | None = None
    """Seconds after submission at which it ends with what it has, waiting or running."""
    cold: bool = False
    """Whether its session ends with it: the pages that it alone used are then the first to be evicted."""

    id: int = field(default=-1, init=False)
    """Its place in the order of arrival; -1 until it is submitted."""
    tokens: list[int] = field(default_factory=list, init=False)
    """The tokens generated so far, a final stop token included."""
    status: Status = field(default="waiting", init=False)
    error: Exception | None = field(default=None, init=False)
    """What ended the request, if its status is "error"."""
    siblings: tuple[Request, ...] = field(default=(), init=False)
    """All requests of the same submission in order, this one included."""
    stats: RequestStats = field(init=False)

    # The scheduler's own:
    owner: object = field(default=None, init=False)
    """The scheduler that it was submitted to."""
    place: tuple[object, int] = field(default=(0, -1), init=False)
    """What the scheduler sorts by."""
    room: Room = field(init=False)
    """What it may take of the pool."""
    submitted: float = field(default=0.0, init=False)
    followers: list[Request] = field(default_factory=list, init=False)
    """Siblings that wait for this request's prompt to be computed, to fork it."""
    drafts: list[int] = field(default_factory=list, init=False)
    """Guesses that the step under way computes: its lease has them after `tokens`."""
    lease: Lease | None = field(default=None, init=False)
    dropped: bool = field(default=False, init=False)
    """Whether pages were dropped that the tree does not have: preempted, it would compute them again."""

    def __post_init__(self) -> None:
        self.prompt = check_tokens(self.prompt)
        self.max_new_tokens = integer("max_new_tokens", self.max_new_tokens, 1)
        self.stop_tokens = check_token_set("stop_tokens", self.stop_tokens)
        self.namespace = check_namespace(self.namespace)
        self.priority = integer("priority", self.priority, -(2**31), 2**31)
        if self.deadline is not None:
            self.deadline = number("deadline", self.deadline)
            if not (math.isfinite(self.deadline) and self.deadline > 0):
                raise InvalidArgument(f"deadline is {self.deadline}: give seconds from submission, above 0, or None")
        if not isinstance(self.cold, bool):
            raise InvalidArgument(f"cold is {self.cold!r:.40}: give True where the request ends its session, or False")
        self.stats = RequestStats(prompt_tokens=len(self.prompt))

    @property
    def done(self) -> bool:
        """Whether no more tokens will come."""
        return self.status not in ("waiting", "running")

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt) + len(self.tokens)

    def sequence(self, start: int, end: int) -> np.ndarray:
        """Tokens `start` to `end` of prompt and generated tokens, int32."""
        split = len(self.prompt)
        generated = np.asarray(self.tokens[max(start - split, 0) : max(end - split, 0)], dtype=np.int32)
        return np.concatenate([self.prompt[start:end], generated])

    def draft(self, count: int) -> Sequence[int]:
        """Up to `count` guesses of what comes next, for a step to compute as well; for subclasses, here none."""
        return ()

    def accept(self, token: int) -> None:
        """Append the next token and note whether it is the last. A subclass may, after it, set `status` to "stop"."""
        if not self.tokens:
            self.stats.time_to_first_token = perf_counter() - self.submitted
        self.tokens.append(token)
        self.stats.generated_tokens += 1
        if token in self.stop_tokens:
            self.status = "stop"
        elif len(self.tokens) == self.max_new_tokens:
            self.status = "length"

    def end(self, status: Status) -> None:
        """No more tokens will come. Called by the scheduler, and again if the host could not use the last one."""
        self.status = status

    def __repr__(self) -> str:
        name = f", namespace={shown(self.namespace)}" if self.namespace else ""
        return (
            f"{type(self).__name__}(id={self.id}, {self.status}, {len(self.prompt)} prompt tokens, "
            f"{len(self.tokens)} of {self.max_new_tokens} new{name})"
        )
