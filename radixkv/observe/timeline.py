"""What was in a cache's tree after each request: pages that came, and when they left. From the cache's journal.

timeline = Timeline(cache)
...                                          # a request is served and released
timeline.mark(tokens, namespace)             # a step: the journal is read, and the request's path counts as used
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from radixkv.errors import InvalidArgument
from radixkv.journal import NAMESPACE, STORED, Batch
from radixkv.journal_story import layers_of
from radixkv.namespaces import seen_by

if TYPE_CHECKING:
    from radixkv.cache import PrefixCache

__all__ = ["History", "Moment", "Run", "Timeline"]

Tokens = npt.NDArray[np.int32]


@dataclass(eq=False)
class Run:
    """Neighbouring pages that came and left together; a page, in a timeline."""

    parent: int
    """Index of the run above; -1 for one that begins a namespace."""
    namespace: str
    tokens: Tokens
    num_pages: int = 1
    born: int = 0
    died: int = -1
    """The step at which it left; -1 while it is there."""
    state: str = ""
    """What keeps it: "leased", "pinned" or nothing."""


class Moment(NamedTuple):
    """A step of a history that was read from an operation log."""

    step: int
    """The log's own."""
    request: int
    """The request that ended; 0: none did."""
    seconds: float
    """Since the log began."""


@dataclass
class History:
    """The full pages of a cache over time. Step 0 is the beginning."""

    num_pages: int
    runs: list[Run] = field(default_factory=list)
    """Parents before children."""
    uses: list[int] = field(default_factory=lambda: [-1])
    """For each step the last run of the path that its request used; -1: none."""
    moments: list[Moment] = field(default_factory=list)
    """For each step where in its log it was; empty where there is none."""

    def alive(self, step: int) -> list[Run]:
        """The runs that were there at a step, parents before children."""
        return [run for i, run in enumerate(self.runs) if self.is_alive(i, step)]

    def is_alive(self, i: int, step: int) -> bool:
        """Whether ``runs[i]`` was there at a step."""
        return self.runs[i].born <= step and (self.runs[i].died < 0 or self.runs[i].died > step)


class Timeline(History):
    """The history of a cache that is running; step k is what was there after the k-th mark."""

    def __init__(self, cache: PrefixCache) -> None:
        super().__init__(cache.num_pages)
        self.cache = cache
        self._journal = cache.journal()
        self._names: dict[int, str] = {}
        self._at: dict[int, int] = {}  # page -> run, of those that are there
        self._found: dict[tuple[int, str, bytes], int] = {}  # parent, namespace and tokens -> run
        batch = self._journal.dump()
        self._take(batch)
        self._cursor = batch.cursor

    def mark(self, tokens: Tokens, namespace: str = "") -> None:
        """A request ended that used ``tokens``, int32 [n]. O(its pages + the pages that came and left since).

        Raises InvalidArgument where so much happened since the last mark that the journal has forgotten some of it.
        """
        self.uses.append(-1)
        batch = self._journal.read(self._cursor)
        while len(batch.op):
            if batch.lost:
                raise InvalidArgument("the journal has forgotten what came since the last mark: mark every request")
            self._take(batch)
            self._cursor = batch.cursor
            batch = self._journal.read(self._cursor)
        seen = seen_by(namespace, self.cache.hierarchical)
        path = layers_of(self._found, tokens, self.cache.page_size, seen)
        self.uses[-1] = path[-1][0] if path else -1

    def _take(self, batch: Batch) -> None:
        step = len(self.uses) - 1
        for i in range(len(batch.op)):
            op, page = int(batch.op[i]), int(batch.page[i])
            if op == NAMESPACE:
                self._names[int(batch.root[i])] = batch.names[i]
            elif op == STORED:
                above = int(batch.parent[i])
                parent = self._at[above] if above >= 0 else -1
                root = int(batch.root[i])  # -1: its namespace is its parent's
                namespace = self._names[root] if root >= 0 else self.runs[parent].namespace
                run = Run(parent, namespace, np.array(batch.tokens[i]), born=step)
                self._at[page] = self._found[parent, namespace, run.tokens.tobytes()] = len(self.runs)
                self.runs.append(run)
            else:
                run = self.runs[self._at.pop(page)]
                run.died = step
                del self._found[run.parent, run.namespace, run.tokens.tobytes()]
