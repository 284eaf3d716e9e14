"""What `Generator.submit` hands out: a request of the scheduler, how its tokens are drawn and who is told of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from radixkv import scheduling
from radixkv.hf.pictures import Span
from radixkv.hf.sampling import Sampler, TokenLogprob
from radixkv.hf.text import Text
from radixkv.scheduling import RequestStats, Status

__all__ = ["Event", "OnDone", "OnLogits", "OnToken", "Request", "RequestStats", "Status", "Tokens"]

Tokens = list[int] | np.ndarray | torch.Tensor
"""A sequence of token ids: a list, or a one-dimensional integer array or CPU tensor."""

OnToken = Callable[["Request", int], object]
"""Called with the request and each of its new tokens, in order."""

OnLogits = Callable[["Request", torch.Tensor], object]
"""Called with the request and the logits `[vocabulary]` of each of its new tokens, in order."""

OnDone = Callable[["Request"], object]
"""Called with the request once, when no more tokens will come."""


class Event(NamedTuple):
    """Something to tell the host: a token, with its logits where they were asked for, or, without one, the end."""

    request: Request
    token: int | None
    logits: torch.Tensor | None = None


@dataclass(eq=False, kw_only=True, repr=False)
class Request(scheduling.Request):
    """A request handed out by `Generator.submit`. Read it at any time; only the generator changes it."""

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

    logprobs: list[TokenLogprob] = field(default_factory=list, init=False)
    """One for each of `tokens`, if `submit(logprobs=)` asked for them."""
    ended: bool = field(default=False, init=False)
    """Whether it is done and its text complete: the last thing to change."""
    row: torch.Tensor | None = field(default=None, init=False)
    """The logits of the next token, where `on_logits` asks for them."""
    logprob: TokenLogprob | None = field(default=None, init=False)
    """Of the next token."""

    @property
    def text(self) -> str:
        """What it has said so far, without what stopped it; "" if the generator has no tokenizer."""
        return "".join(self.said.pieces) if self.said is not None else ""

    def accept(self, token: int) -> None:
        if self.logprob is not None:
            self.logprobs.append(self.logprob)
        self.sampler.accept(token)
        super().accept(token)
        self.outbox.append(Event(self, token, self.row))
        self.row = self.logprob = None
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
