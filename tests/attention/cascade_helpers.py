"""Random forests of requests over shared pages, and a literal model of what they share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from radixkv.attention import PageTable
from radixkv.attention.cascade import CascadeCosts

ALL = CascadeCosts(min_tokens=1, launch_tokens=-1.0, merge_tokens=0.0, max_rows=0, granularity=1)
"""Every shared segment is used."""


class Forest(NamedTuple):
    """Requests as lists of pages, with their lengths and new rows."""

    pages: list[list[int]]
    lengths: list[int]
    rows: list[int]
    page_size: int

    @property
    def num_pages(self) -> int:
        return 1 + max(page for pages in self.pages for page in pages)

    def table(self) -> PageTable:
        slots = [
            pages[at // self.page_size] * self.page_size + at % self.page_size
            for pages, length, rows in zip(self.pages, self.lengths, self.rows, strict=True)
            for at in range(length - rows, length)
        ]
        return PageTable(
            np.cumsum([0, *self.rows]).astype(np.int32),
            np.cumsum([0, *map(len, self.pages)]).astype(np.int32),
            np.array([page for pages in self.pages for page in pages], dtype=np.int32),
            np.array([(n - 1) % self.page_size + 1 for n in self.lengths], dtype=np.int32),
            np.array(slots, dtype=np.int32),
        )


def random_forest(
    rng: np.random.Generator, requests: int, page_size: int, max_run: int, max_private: int, row_choices: list[int]
) -> Forest:
    """Each request follows an earlier one for some of its shareable pages, or begins alone; then its own pages.

    Page ids are scattered. Shared pages lie before every user's first new row, as published pages do.
    """
    pages: list[list[int]] = []
    lengths: list[int] = []
    rows: list[int] = []
    shareable: list[int] = []
    fresh = 0
    for _ in range(requests):
        prefix: list[int] = []
        if pages and rng.random() < 0.75:
            other = int(rng.integers(len(pages)))
            prefix = pages[other][: int(rng.integers(shareable[other] + 1))]
        new = int(rng.choice(row_choices))
        cached = int(rng.integers(max_run * page_size + 1)) if rng.random() < 0.7 else 0
        length = len(prefix) * page_size + cached + new + int(rng.integers(max_private + 1))
        count = -(-length // page_size)
        own = list(range(fresh, fresh + count - len(prefix)))
        fresh += len(own)
        pages.append(prefix + own)
        lengths.append(length)
        rows.append(new)
        shareable.append((length - new) // page_size)
    scattered = rng.permutation(fresh)
    return Forest([[int(scattered[p]) for p in mine] for mine in pages], lengths, rows, page_size)


class ModelSegment(NamedTuple):
    users: frozenset[int]
    page_begin: int
    page_end: int


def model_segments(forest: Forest, max_rows: int) -> set[ModelSegment]:
    """Users of every prefix of pages, by comparing all requests with all; then runs of prefixes with equal users."""
    count = len(forest.pages)
    limits = [
        0 if max_rows and forest.rows[b] > max_rows else (forest.lengths[b] - forest.rows[b]) // forest.page_size
        for b in range(count)
    ]

    def users(b: int, depth: int) -> frozenset[int]:
        prefix = forest.pages[b][:depth]
        return frozenset(c for c in range(count) if limits[c] >= depth and forest.pages[c][:depth] == prefix)

    found = set()
    for b in range(count):
        depth = 0
        while depth < limits[b] and len(users(b, depth + 1)) >= 2:
            sharing, begin = users(b, depth + 1), depth
            while depth < limits[b] and users(b, depth + 1) == sharing:
                depth += 1
            found.add(ModelSegment(sharing, begin, depth))
    return found


def model_choice(forest: Forest, costs: CascadeCosts) -> dict[ModelSegment, tuple[int, int, bool]]:
    """first_page, level and whether it is used, of every segment."""
    segments = sorted(model_segments(forest, costs.max_rows), key=lambda s: s.page_begin)
    chosen: dict[ModelSegment, tuple[int, int, bool]] = {}
    for s in segments:
        above = [t for t in chosen if t.users > s.users and t.page_end <= s.page_begin and chosen[t][2]]
        first = max((t.page_end for t in above), default=0)
        unit = costs.granularity
        tokens = s.page_end * forest.page_size // unit * unit - first * forest.page_size // unit * unit
        rows = sum(forest.rows[b] for b in s.users)
        used = (
            len(s.users) >= costs.min_users
            and tokens >= max(1, costs.min_tokens)
            and (costs.max_levels == 0 or len(above) < costs.max_levels)
            and (len(s.users) - 1) * tokens > costs.launch_tokens + costs.merge_tokens * rows
        )
        chosen[s] = (first, len(above), used)
    return chosen
