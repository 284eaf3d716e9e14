"""Engine: a PrefixCache, the page pool it counts, and attention over the pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from radixkv import _core
from radixkv.attention import Attention
from radixkv.cache import Lease, PrefixCache
from radixkv.errors import BackendUnavailable, InvalidArgument
from radixkv.geometry import Geometry
from radixkv.pool import KVPool, pages_for_capacity
from radixkv.step import Step

if TYPE_CHECKING:
    from radixkv._core import Tokens

__all__ = ["Engine"]


class Engine:
    """Holds the K and V of cached prefixes and runs attention over them, for one model on one device.

    Args:
        num_layers, num_qo_heads, num_kv_heads, head_dim: of the model.
        page_size: tokens a page holds.
        num_pages: pages of the pool; or
        capacity: memory of the pool: "4GiB", a number of bytes, or a share (float) of the device's free memory.
        dtype: of q, k, v and the pool: bfloat16, float16 or (on the CPU) float32.
        device: "cpu", or "cuda" for FlashInfer's kernels. These are compiled at their first use: the engine runs them
            once when it is made, which can take minutes the first time, and says so on standard error.
        kv_dtype: what K and V are stored as: dtype, or torch.float8_e4m3fn, which takes half the memory of 16 bits.
        k_scale, v_scale: with an 8-bit kv_dtype, what a stored value is multiplied with to be K or V; choose them so
            that the largest K and V are below 448 times their scale.
        cuda_graphs: on CUDA, let decode steps (one row for each lease) be captured in CUDA graphs and replayed: see
            `Step.graph_key`. Steps of the same number of leases then use the same memory; they have no cascade.

    Raises:
        InvalidArgument: sizes that cannot work. BackendUnavailable: no attention for this device, dtype or head_dim,
            or a package is missing; it says what to change.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int = 16,
        num_pages: int | None = None,
        capacity: str | float | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        kv_dtype: torch.dtype | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        cuda_graphs: bool = False,
    ) -> None:
        self.dtype, self.device = _dtype("dtype", dtype), _device(device)
        self.kv_dtype = _dtype("kv_dtype", kv_dtype or dtype)
        self.geometry = Geometry(num_layers, num_qo_heads, num_kv_heads, head_dim, page_size, self.kv_dtype.itemsize)
        if (num_pages is None) == (capacity is None):
            raise InvalidArgument("give either num_pages or capacity: the size of the pool")
        if capacity is not None:
            num_pages = pages_for_capacity(capacity, self.geometry, self.device)
        assert num_pages is not None
        self.cache = PrefixCache(num_pages, page_size)
        num_pages = self.cache.num_pages
        storage = {"kv_dtype": self.kv_dtype, "k_scale": k_scale, "v_scale": v_scale}
        self.attention = _attention(self.geometry, num_pages, dtype, self.device, storage, cuda_graphs)
        self.pool = KVPool(self.geometry, num_pages, self.kv_dtype, self.device)
        self.device = self.pool.storage.device  # "cuda" has become the device it stood for
        self.attention.warm_up(self.pool.k[0], self.pool.v[0])
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
        return f"Engine({self.geometry}, {self.dtype}, {self.device}, {self.cache!r})"


def _dtype(name: str, dtype: object) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        raise InvalidArgument(f"{name} is {dtype!r}: give a torch.dtype, such as torch.bfloat16")
    return dtype


def _device(device: object) -> torch.device:
    try:
        return torch.device(device)  # type: ignore[call-overload, no-any-return]
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"device is {device!r}: give 'cpu', 'cuda' or a torch.device") from error


def _attention(
    geometry: Geometry,
    num_pages: int,
    dtype: torch.dtype,
    device: torch.device,
    storage: dict[str, Any],
    cuda_graphs: bool,
) -> Attention:
    """The backend for this device. `storage`: kv_dtype, k_scale and v_scale."""
    sizes: dict[str, Any] = {
        "num_qo_heads": geometry.num_qo_heads,
        "num_kv_heads": geometry.num_kv_heads,
        "head_dim": geometry.head_dim,
        "num_pages": num_pages,
        "page_size": geometry.page_size,
    }
    if device.type == "cpu":
        from radixkv.attention.native import NativeAttention

        if cuda_graphs:
            raise BackendUnavailable(f"cuda_graphs on {device}: leave it out there, or use device='cuda'")
        return NativeAttention(**sizes, dtype=dtype, **storage)
    if device.type == "cuda":
        from radixkv.attention.flashinfer import FlashInferAttention

        return FlashInferAttention(**sizes, dtype=dtype, device=device, **storage, cuda_graphs=cuda_graphs)
    raise BackendUnavailable(f"no attention backend for device {device}: use device='cpu' or device='cuda'")
