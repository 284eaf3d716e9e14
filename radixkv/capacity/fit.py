"""How many pages, tokens and requests fit into a memory, and what is wasted without pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from radixkv.capacity.sizes import Model, bytes_per_page
from radixkv.errors import InvalidArgument
from radixkv.formats import LayerFormat

if TYPE_CHECKING:
    from radixkv.traces.curve import CapacityCurve

__all__ = ["Fit", "Need", "fit", "need_for", "paging_waste", "preallocation_waste"]


@dataclass(frozen=True)
class Fit:
    """What a memory holds, in pages of ``page_size`` tokens."""

    num_bytes: int
    """What is left for pages: (memory - weights) * (1 - reserve)."""
    page_size: int
    page_bytes: int
    num_pages: int

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    def requests_of(self, length: int) -> int:
        """The largest batch: requests of ``length`` tokens that share nothing. What they share is theirs to add."""
        if length < 1:
            raise InvalidArgument(f"a request has at least 1 token, not {length}")
        return self.num_pages // -(-length // self.page_size)


def fit(
    model: Model,
    kv_format: LayerFormat,
    memory_bytes: int,
    weight_bytes: int = 0,
    reserve: float = 0.1,
    page_size: int = 16,
) -> Fit:
    """What fits into ``memory_bytes`` beside the weights, when ``reserve`` (0 to 1) of the rest is kept back.

    The reserve is for activations, workspaces and the allocator. Where the weights alone are too much, no page fits.
    """
    if not 0 <= reserve < 1:
        raise InvalidArgument(f"reserve is a share of the memory, from 0 to less than 1, as 0.1; got {reserve}")
    if weight_bytes < 0 or memory_bytes < 0:
        raise InvalidArgument(f"amounts of memory are not negative: {memory_bytes} bytes, weights {weight_bytes}")
    page = bytes_per_page(model, kv_format, page_size)
    # In whole numbers, as far as they go: a float's last bit must not decide about a page.
    kept_back = round(reserve * 10**9)
    left = max(memory_bytes - weight_bytes, 0) * (10**9 - kept_back) // 10**9
    return Fit(num_bytes=left, page_size=page_size, page_bytes=page, num_pages=left // page)


def preallocation_waste(used: int, reserved: int) -> float:
    """The share (0 to 1) of a contiguous preallocation of ``reserved`` tokens that a request of ``used`` never uses."""
    if not 0 <= used <= reserved or reserved == 0:
        raise InvalidArgument(f"a request uses from 0 to all of its tokens: {used} of {reserved} is neither")
    return 1 - used / reserved


def paging_waste(used: int, page_size: int) -> float:
    """The share (0 to 1) of its pages that a request of ``used`` tokens leaves empty: its open page's end."""
    if used < 1 or page_size < 1:
        raise InvalidArgument(f"a request has at least 1 token and a page as well; got {used} and {page_size}")
    return 1 - used / (-(-used // page_size) * page_size)


@dataclass(frozen=True)
class Need:
    """The smallest cache that reaches a hit rate on a trace."""

    num_pages: int
    num_tokens: int
    num_bytes: int
    hit_rate: float


def need_for(curve: CapacityCurve, target: float, page_bytes: int) -> Need:
    """The smallest cache whose hit rate (0 to 1) on the curve's trace reaches ``target``.

    Raises InvalidArgument for a target that no cache reaches, with the best there is.
    """
    if not 0 < target <= 1:
        raise InvalidArgument(f"a hit rate is a share above 0 and up to 1, as 0.9; got {target}")
    for pages, rate in curve.points():
        if rate >= target:
            return Need(pages, pages * curve.page_size, pages * page_bytes, rate)
    best = curve.hit_rate(curve.max_pages)
    raise InvalidArgument(
        f"no cache reaches a hit rate of {target:g} on this trace: the best is {best:.4f}, from {curve.max_pages} "
        f"pages ({curve.max_pages * curve.page_size} tokens) on; ask for less, or make requests share more"
    )
