"""A host of a scheduler without a model: pages without tensors, and tokens that follow from those before them."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Sequence

from radixkv import Lease, PrefixCache
from radixkv.scheduling import Batch, Request, Scheduler

VOCABULARY = 1000


class Host:
    """Pages of a cache, as `Engine` has them, dropped by the page."""

    def __init__(self, num_pages: int, page_size: int = 16, hierarchical: bool = False) -> None:
        self.cache = PrefixCache(num_pages, page_size, hierarchical=hierarchical)
        self.drop_unit = page_size

    def drop(self, lease: Lease, window_left: int) -> int:
        return lease.drop(max(0, lease.num_written - window_left) // self.drop_unit * self.drop_unit)

    def drains(self) -> bool:
        """Whether nothing holds a page any more."""
        self.cache.check()
        stats = self.cache.stats()
        return (stats.num_leases, stats.private, stats.protected) == (0, 0, 0)


def next_token(tokens: Sequence[int]) -> int:
    """What the model that is not there would say after `tokens`."""
    return zlib.crc32(b"%d %d" % (len(tokens), sum(tokens))) % VOCABULARY


def answer(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def run_step(batch: Batch) -> list[int | list[int]]:
    """The step of a batch, and the token of each request in its `drawing`, or tokens where it guessed right."""
    packed = [
        (lease.tokens.tolist(), end) for lease in batch.leases for end in range(lease.num_written, len(lease.tokens))
    ]
    for lease in batch.leases:
        lease.advance()
    if batch.logit_rows is None:
        return [next_token(batch.leases[row].tokens.tolist()) for row in batch.rows]
    said: list[int | list[int]] = []
    for request, first in zip(batch.drawing, batch.rows, strict=True):
        tokens: list[int] = []
        for row, guess in enumerate([*request.drafts, None], first):
            lease_tokens, end = packed[batch.logit_rows[row]]
            tokens.append(next_token(lease_tokens[: end + 1]))
            if tokens[-1] != guess:
                break
        said.append(tokens if request.drafts else tokens[0])
    return said


def run(scheduler: Scheduler) -> Counter[str]:
    """Run until all is done; how many steps there were, how many rows they had, and how many leases."""
    counts: Counter[str] = Counter()
    while batch := scheduler.next():
        counts += Counter(
            steps=1,
            rows=sum(lease.num_tokens - lease.num_written for lease in batch.leases),
            leases=len(batch.leases),
        )
        scheduler.accept(run_step(batch))
    return counts


def crowd(count: int, prompt: int, answers: int, shared: int = 0, seed: int = 0) -> list[Request]:
    """Requests with `shared` tokens in common, up to `prompt` more of their own, and up to `answers` to generate."""
    chance = random.Random(seed)
    system = [chance.randrange(VOCABULARY) for _ in range(shared)]
    return [
        Request(
            system + [chance.randrange(VOCABULARY) for _ in range(chance.randint(prompt // 4, prompt))],
            chance.randint(answers // 4, answers),
        )
        for _ in range(count)
    ]
