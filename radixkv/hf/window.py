"""What a sliding window leaves of a pool: how much room a request needs that gives back what no layer sees any more.

A request whose tokens all fit the pool takes what it needs, window or not. A longer one can run where every layer has
a window: it drops the pages behind it (`Engine.drop`), and holds

    | shared through the tree, kept as long as it runs | dropped ... | not dropped yet | window | rows of a step |
    0 ................................ at most `shared`               less than a unit            at most `rows`

so its shared part and its rows are bounded, such that all of it fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from radixkv.errors import InvalidArgument, PoolExhausted
from radixkv.hf.adapter import engine_attention, forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from radixkv.engine import Engine
    from radixkv.step import Step

__all__ = ["Room", "observe_window", "room_for"]


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


def room_for(engine: Engine, window_left: int, max_rows: int, prompt_tokens: int, new_tokens: int) -> Room:
    """Room for a request, or PoolExhausted if it could never run. `window_left` is -1 where a layer sees everything."""
    size, pool = engine.page_size, engine.num_pages
    total = prompt_tokens + new_tokens - 1  # the last token is handed out, its K and V are never needed
    pages = -(-total // size)
    if pages <= pool:
        return Room(pages, pages, total, max_rows)
    least = ""
    if window_left >= 0:
        unit = math.lcm(engine.attention.view_unit, size)  # what Engine.drop rounds to
        behind = window_left + unit - 1
        spare = pool - -(-(behind + 1) // size)
        if spare >= 0:
            rows = min(max_rows, 1 + spare * size // 2)
            private = -(-(behind + rows) // size)
            return Room(pages, private, (pool - private) * size, rows)
        least = f", {pool - spare} with the model's sliding window"
    raise PoolExhausted(
        f"{prompt_tokens} prompt + {new_tokens} new tokens need {pages} pages{least}; the pool has {pool}: "
        "shorten the request or raise num_pages"
    )


class _Lookback:
    """Stands in for a step of one row: notes how far back each layer looks, and answers zeros."""

    def __init__(self, device: torch.device) -> None:
        self.input_ids = self.positions = self.last_rows = torch.zeros(1, dtype=torch.int64, device=device)
        self.windows: list[int] = []

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window_left: int = -1, **options: object
    ) -> torch.Tensor:
        self.windows.append(window_left)
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[2])


def observe_window(model: PreTrainedModel) -> int:
    """How many keys before its own a row of `model` sees at most, in any layer; -1: all. Costs one token's forward.

    Raises InvalidArgument for a model that computes no logits.
    """
    seen = _Lookback(model.device)
    try:
        with engine_attention(model), torch.inference_mode():
            forward(model, cast("Step", seen))
    except AttributeError as error:
        if error.name != "logits":
            raise
        raise InvalidArgument(
            f"{type(model).__name__} gives no logits to choose tokens by: load it as AutoModelForCausalLM"
        ) from error
    return -1 if min(seen.windows) < 0 else max(seen.windows)
