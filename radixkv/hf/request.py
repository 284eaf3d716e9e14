"""One generation request: what was asked, what has come of it, and its figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from radixkv.cache import Lease
    from radixkv.hf.window import Room

__all__ = ["OnToken", "Request", "RequestStats", "Status", "Tokens"]

Status = Literal["waiting", "running", "stop", "length", "cancelled", "error"]
"""Waiting and running requests are unfinished. The others say why generation ended: a stop token, `max_new_tokens`,
`Generator.cancel`, or an exception in `on_token`, which is then `Request.error`."""

Tokens = list[int] | np.ndarray | torch.Tensor
"""A sequence of token ids: a list, or a one-dimensional integer array or CPU tensor."""

OnToken = Callable[["Request", int], object]
"""Called with the request and each of its new tokens, in order."""


@dataclass
class RequestStats:
    """Figures of one request. Tokens are counted once for every time they are computed, so a preemption shows."""

    prompt_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose K and V were there at first admission; for a fork the whole prompt."""
    computed_tokens: int = 0
    """Tokens run through the model, recomputation after preemptions included."""
    generated_tokens: int = 0
    time_to_first_token: float | None = None
    """Seconds from submission to the first token; None until then."""
    preemptions: int = 0


@dataclass(eq=False)
class Request:
    """A request handed out by `Generator.submit`. Read it at any time; only the generator changes it."""

    id: int
    prompt: np.ndarray
    """int32 `[prompt_tokens]`."""
    max_new_tokens: int
    stop_tokens: frozenset[int]
    namespace: str
    sampler: Callable[[torch.Tensor], int] = field(repr=False)
    """The next token for logits `[vocabulary]`."""
    on_token: OnToken | None = field(repr=False)
    room: Room = field(repr=False)
    """What it may take of the pool."""
    owner: object = field(repr=False)
    """The same for all requests of one generator."""
    submitted: float = field(default_factory=time.perf_counter, repr=False)
    tokens: list[int] = field(default_factory=list)
    """The tokens generated so far, a final stop token included."""
    status: Status = "waiting"
    error: Exception | None = None
    """What `on_token` raised, if that ended the request."""
    siblings: tuple[Request, ...] = field(default=(), repr=False)
    """All requests of the same submission in order, this one included."""
    followers: list[Request] = field(default_factory=list, repr=False)
    """Siblings that wait for this request's prompt to be computed, to fork it."""
    lease: Lease | None = field(default=None, repr=False)
    dropped: bool = field(default=False, repr=False)
    """Whether pages were dropped that the tree does not have: preempted, it would compute them again."""
    stats: RequestStats = field(init=False)

    def __post_init__(self) -> None:
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

    def accept(self, token: int) -> None:
        """Append the next token and note whether it is the last."""
        if not self.tokens:
            self.stats.time_to_first_token = time.perf_counter() - self.submitted
        self.tokens.append(token)
        self.stats.generated_tokens += 1
        if token in self.stop_tokens:
            self.status = "stop"
        elif len(self.tokens) == self.max_new_tokens:
            self.status = "length"
