"""What `Generator.submit` hands out: a request of the scheduler, how its tokens are drawn and who is told of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from radixkv import scheduling
from radixkv.hf.draft import Drafter
from radixkv.hf.pictures import Span
from radixkv.hf.sampling import Sampler, TokenLogprob
from radixkv.hf.text import Text
from radixkv.scheduling import RequestStats, Status

__all__ = ["Event", "OnDone", "OnLogits", "OnToken", "Request", "RequestStats", "Status", "Tokens"]

Tokens = Sequence[int] | np.ndarray | torch.Tensor
"""Token ids: a sequence of them, or a one-dimensional integer array or CPU tensor."""

OnToken = Callable[["Request", int], object]
"""Called with the request and each of its new tokens, in order."""

OnLogits = Callable[["Request", torch.Tensor], object]
"""Called with the request and the logits `[vocabulary]` of each of its new tokens, in order."""

OnDone = Callable[["Request"], object]
"""Called with the request once, when no more tokens will come."""


class Row(NamedTuple):
    """What is kept of the logits of a token to come, where it was asked for."""

    logits: torch.Tensor | None
    logprob: TokenLogprob | None


class Event(NamedTuple):
    """Something to tell the host: a token, with its logits where they were asked for, or, without one, the end."""

    request: Request
    token: int | None
    logits: torch.Tensor | None = None


@dataclass(eq=False, kw_only=True, repr=False)
class Request(scheduling.Request):
    """A request handed out by `Generator.submit`. Read it at any time; only the generator changes it.

    It is a `radixkv.scheduling.Request`, which hosts with a loop of their own make themselves.
    """

    sampler: Sampler
    outbox: deque[Event]
    """Of the generator: what is to be told after the step."""
    on_token: OnToken | None = None
    on_logits: OnLogits | None = None
    on_done: OnDone | None = None
    said: Text | None = None
    num_logprobs: int | None = None
    spans: tuple[Span, ...] = ()
    """Its pictures, until it is done."""
    positions: torch.Tensor | None = None
    """int64 `[3, prompt]`, of pictures that the model places by time, height and width."""

    logprobs: list[TokenLogprob] = field(default_factory=list, init=False)
    """One for each of `tokens`, if `submit(logprobs=)` asked for them."""
    drafter: Drafter | None = field(default=None, init=False)
    """Asked for guesses in every step, if there is one."""
    ended: bool = field(default=False, init=False)
    """Whether it is done and its text complete: the last thing to change."""
    rows: Sequence[Row] = field(default=(), init=False)
    """One for each of the next tokens, where `on_logits` or `logprobs` asks for them."""

    @property
    def text(self) -> str:
        """What it has said so far, without what stopped it; "" if the generator has no tokenizer."""
        return "".join(self.said.pieces) if self.said is not None else ""

    def draft(self, count: int) -> Sequence[int]:
        return self.drafter(count) if self.drafter is not None else ()

    def accept(self, token: int) -> None:
        (row, *self.rows) = self.rows or [Row(None, None)]
        if row.logprob is not None:
            self.logprobs.append(row.logprob)
        self.sampler.rewind(len(self.tokens))  # guesses that were right are accepted already
        self.sampler.accept(token)
        super().accept(token)
        self.outbox.append(Event(self, token, row.logits))
        if self.said is not None and token not in self.stop_tokens:
            try:
                if self.said.add(token):
                    self.status = "stop"
            except Exception as error:  # of the tokenizer: this request's only
                self.status, self.error = "error", error

    def end(self, status: Status) -> None:
        super().end(status)
        if not self.ended:
            if self.said is not None:
                self.said.finish()
            self.outbox.append(Event(self, None))
            self.spans = ()
            self.ended = True
