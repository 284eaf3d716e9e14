"""Engine: a PrefixCache, the page pool it counts, and attention over the pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from radixkv import _core
from radixkv.attention import backend_for, check_device
from radixkv.cache import Lease, PrefixCache
from radixkv.errors import InvalidArgument
from radixkv.formats import LayerFormat, layer_formats
from radixkv.pool import KVPool, pages_for_capacity
from radixkv.shape import LayerShape, checked_size
from radixkv.step import Step

if TYPE_CHECKING:
    from radixkv._core import Tokens

__all__ = ["Engine"]


class Engine:
    """Holds the K and V of cached prefixes and runs attention over them, for one model on one device.

    Args:
        num_layers, num_qo_heads, num_kv_heads, head_dim: of a model whose layers are all alike; or
        layers: what each layer attends with, where they differ.
        page_size: tokens a page holds.
        num_pages: pages of the pool; or
        capacity: memory of the pool: "4GiB", a number of bytes, or a share (float) of the device's free memory.
        dtype: of q, k and v: bfloat16, float16 or (on the CPU) float32.
        device: "cpu", or "cuda" for FlashInfer's kernels. These are compiled at their first use: the engine runs them
            once when it is made, which can take minutes the first time, and says so on standard error.
        kv_format: how K and V are stored: None for dtype, "fp8" for half the memory of 16 bits, a `LayerFormat` such as
            ``fp8(k_scale=0.5, v_scale=0.25)``, or a list with one of these for each layer.
        policy: what the cache evicts first, "lru" or "hazard" (`PrefixCache`).
        cuda_graphs: on CUDA, let decode steps (one row for each lease) be captured in CUDA graphs and replayed: see
            `Step.graph_key`. Steps of the same number of leases then use the same memory; they have no cascade.

    Raises:
        InvalidArgument: sizes that cannot work. BackendUnavailable: no attention for this device, dtype or head_dim,
            or a package is missing; it says what to change.
    """

    def __init__(
        self,
        *,
        num_layers: int | None = None,
        num_qo_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layers: Sequence[LayerShape] | None = None,
        page_size: int = 16,
        num_pages: int | None = None,
        capacity: str | float | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        kv_format: str | LayerFormat | Sequence[str | LayerFormat | None] | None = None,
        policy: str = "lru",
        cuda_graphs: bool = False,
    ) -> None:
        self.dtype, device = _dtype(dtype), _device(device)
        self.layers = _layers(layers, num_layers, num_qo_heads, num_kv_heads, head_dim)
        formats = layer_formats(kv_format, str(dtype).removeprefix("torch."), len(self.layers))
        if (num_pages is None) == (capacity is None):
            raise InvalidArgument("give either num_pages or capacity: the size of the pool")
        check_device(device, cuda_graphs=cuda_graphs)
        if capacity is not None:
            page_size = checked_size("page_size", page_size)
            per_page = sum(f.page_bytes(page_size, s) for s, f in zip(self.layers, formats, strict=True))
            num_pages = pages_for_capacity(capacity, per_page, device)
        assert num_pages is not None
        self.cache = PrefixCache(num_pages, page_size, policy)
        self.pool = KVPool(self.layers, formats, self.cache.num_pages, self.cache.page_size, device)
        self.device = self.pool.device  # "cuda" has become the device it stood for
        self.attention = backend_for(self.pool.layers, dtype, cuda_graphs=cuda_graphs)
        self.attention.warm_up()
        self.table = _core.PageTable(self.cache)
        self.graph_windows: dict[int, int] = {}

    @property
    def num_pages(self) -> int:
        return self.cache.num_pages

    @property
    def page_size(self) -> int:
        return self.cache.page_size

    @property
    def drop_unit(self) -> int:
        """Tokens: what `drop` rounds to."""
        return math.lcm(self.attention.view_unit, self.page_size)

    def acquire(self, tokens: Tokens, namespace: str = "") -> Lease:
        """`PrefixCache.acquire`. The next step with this lease makes its pending copies."""
        return self.cache.acquire(tokens, namespace)

    def drop(self, lease: Lease, window_left: int) -> int:
        """No layer sees more than window_left keys before a row's own: take older pages from the lease's view.

        For models whose every layer has a sliding window, between steps. Pages in the tree stay there; the lease's own
        are freed and cannot be published any more (`Lease.drop`): commit first what later requests shall find. Drops
        whole pages, on the CPU in units of 512 tokens, which keeps answers bit-identical. Steps with such a lease
        refuse rows that look further back.

        Returns:
            The number of pages freed.

        Raises:
            InvalidArgument: window_left is negative.
        """
        if window_left < 0:
            raise InvalidArgument(f"window_left is {window_left}: only a window, 0 or more, lets pages be dropped")
        unit = self.drop_unit
        return lease.drop(max(0, lease.num_written - window_left) // unit * unit)

    def step(self, leases: Sequence[Lease]) -> Step:
        """One forward pass over the unwritten tokens of these leases: prefill, extend and decode rows mixed.

        A context manager; one is open at a time. Leaving it normally advances every lease by its rows, an exception
        advances none. While it is open its leases can be read, and whatever would change them raises LeaseError.
        """
        return Step(self, leases)

    def close(self) -> None:
        """Closes the cache. The pool's memory goes with the last reference to it."""
        self.cache.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        kinds = {(kv.shape, kv.format): None for kv in self.pool.layers}
        what = ", ".join(f"{shape} as {stored.k.dtype}" for shape, stored in kinds)
        return f"Engine({len(self.layers)} layers: {what}, {self.dtype}, {self.device}, {self.cache!r})"


def _layers(layers: Sequence[LayerShape] | None, *sizes: int | None) -> tuple[LayerShape, ...]:
    """The shape of each layer; sizes: num_layers, num_qo_heads, num_kv_heads, head_dim of a uniform model."""
    if layers is not None:
        if any(size is not None for size in sizes):
            raise InvalidArgument("give layers, or num_layers, num_qo_heads, num_kv_heads and head_dim: not both")
        layers = tuple(layers)
        if not layers or not all(isinstance(layer, LayerShape) for layer in layers):
            raise InvalidArgument(f"layers is {layers!r}: give a LayerShape for each layer")
        return layers
    num_layers, num_qo_heads, num_kv_heads, head_dim = sizes
    if num_layers is None or num_qo_heads is None or num_kv_heads is None or head_dim is None:
        raise InvalidArgument("give num_layers, num_qo_heads, num_kv_heads and head_dim; or layers, where they differ")
    return (LayerShape(num_qo_heads, num_kv_heads, head_dim),) * checked_size("num_layers", num_layers)


def _dtype(dtype: object) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        raise InvalidArgument(f"dtype is {dtype!r}: give a torch.dtype, such as torch.bfloat16")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InvalidArgument(f"dtype is {dtype}: use torch.bfloat16, torch.float16 or torch.float32")
    return dtype


def _device(device: object) -> torch.device:
    try:
        return torch.device(device)  # type: ignore[call-overload, no-any-return]
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"device is {device!r}: give 'cpu', 'cuda' or a torch.device") from error
