"""One step of a scheduler: which leases it has, and who gets a token after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from radixkv.scheduling.request import Request
from radixkv.scheduling.space import lease_of

if TYPE_CHECKING:
    from radixkv.cache import Lease

__all__ = ["Batch", "batch_of"]


@dataclass(frozen=True)
class Batch:
    """One step: `leases` go to `Engine.step`, and then `accept` takes a token for each request in `drawing`."""

    requests: list[Request]
    leases: list[Lease]
    """One for each of `requests`, with the rows of this step unwritten."""
    drawing: list[Request]
    """The requests whose tokens are all computed after the step, and those that fork them."""
    rows: list[int]
    """For each of `drawing`, which of the logits say its next token: `logits[row]`, and those after it what comes after
    each of its `drafts`."""
    logit_rows: list[int] | None
    """Which rows of the step the logits are of, where any request has drafts; else None, the last row of each lease."""
    written: list[int] = field(repr=False)
    """How many tokens of each lease were written before the step."""


def batch_of(requests: list[Request]) -> Batch:
    """The step of these running requests, and who gets a token after it."""
    leases = [lease_of(request) for request in requests]
    drawing: list[Request] = []
    rows: list[int] = []
    logit_rows: list[int] = []
    end = 0
    for request, lease in zip(requests, leases, strict=True):
        if lease.num_tokens >= request.num_tokens:
            both = [request, *request.followers]
            drawing += both
            rows += [len(logit_rows)] * len(both)
        end += lease.num_tokens - lease.num_written
        logit_rows += range(end - 1 - len(request.drafts), end)
    written = [lease.num_written for lease in leases]
    return Batch(requests, leases, drawing, rows, logit_rows if len(logit_rows) > len(leases) else None, written)
