"""How much of a pool a request needs; less where every layer has a sliding window, behind which pages are dropped.

A request whose tokens all fit the pool takes what it needs, window or not. A longer one can run where every layer has
a window: it drops the pages behind it (`Engine.drop`), and holds

    | shared through the tree, kept as long as it runs | dropped ... | not dropped yet | window | rows of a step |
    0 ................................ at most `shared`               less than a unit            at most `rows`

so its shared part and its rows are bounded, such that all of it fits.
"""

from __future__ import annotations

from dataclasses import dataclass

from radixkv.errors import PoolExhausted

__all__ = ["PoolShape", "Room", "room_for"]


@dataclass(frozen=True)
class PoolShape:
    """What there is to share out: the pool, and how far a request must keep its pages."""

    num_pages: int
    page_size: int
    window_left: int
    """How many keys before its own a row sees at most, in any layer; -1: all."""
    drop_unit: int
    """Behind the window, pages go in units of so many tokens."""


@dataclass(frozen=True)
class Room:
    """What one request may take of the pool, so that it can end."""

    pages: int
    """Pages of all its tokens."""
    private: int
    """The most pages that it holds at once besides the shared ones."""
    shared: int
    """The most of its leading tokens that it may find in the tree or publish while it runs."""
    rows: int
    """The most tokens of it that a step computes."""

    def needed(self, num_tokens: int, page_size: int) -> int:
        """The most pages it holds from now on, if it starts with `num_tokens` tokens and none of them computed."""
        return min(self.pages, -(-min(num_tokens, self.shared) // page_size) + self.private)


def room_for(pool: PoolShape, max_rows: int, prompt_tokens: int, new_tokens: int) -> Room:
    """Room for a request, or PoolExhausted if it could never run."""
    size = pool.page_size
    total = prompt_tokens + new_tokens - 1  # the last token is handed out, its K and V are never needed
    pages = -(-total // size)
    if pages <= pool.num_pages:
        return Room(pages, pages, total, max_rows)
    least = ""
    if pool.window_left >= 0:
        behind = pool.window_left + pool.drop_unit - 1
        spare = pool.num_pages - -(-(behind + 1) // size)
        if spare >= 0:
            rows = min(max_rows, 1 + spare * size // 2)
            private = -(-(behind + rows) // size)
            return Room(pages, private, (pool.num_pages - private) * size, rows)
        least = f", {pool.num_pages - spare} with the model's sliding window"
    raise PoolExhausted(
        f"{prompt_tokens} prompt + {new_tokens} new tokens need {pages} pages{least}; the pool has {pool.num_pages}: "
        "shorten the request or raise num_pages",
        needed=pages,
    )
