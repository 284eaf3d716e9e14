"""Engine: a PrefixCache, the page pool it counts, and attention over the pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import torch

from radixkv import _core
from radixkv.attention import backend_for, check_device
from radixkv.cache import Lease, PrefixCache
from radixkv.errors import InvalidArgument
from radixkv.formats import LayerFormat, layer_formats
from radixkv.kv_plan import KvPlan
from radixkv.pool import KVPool, pages_for_capacity
from radixkv.shape import LayerShape, checked_size
from radixkv.step import Step
from radixkv.tiers import Fetch, TierOptions, Tiers
from radixkv.tiers.cache import TieredCache
from radixkv.tiers.device import DevicePages, device_pages_of
from radixkv.tiers.identity import layers_identity

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
        kv_format: how K and V are stored: None for dtype; "int8" for half the memory of 16 bits; another name of
            `radixkv.formats.FORMATS`; a `LayerFormat` such as ``fp8(k_scale=0.5)``; a list with one of these for each
            layer; or a `KvPlan`, which `radixkv kv-check` finds for a model.
        policy: what the cache evicts first, "lru" or "hazard" (`PrefixCache`).
        cuda_graphs: on CUDA, let decode steps (one row for each lease) be captured in CUDA graphs and replayed: see
            `Step.graph_key`. Steps of the same number of leases then use the same memory; they have no cascade.
        hierarchical: namespace "a/b" finds what "a" published as well (`PrefixCache`).
        tiers: what lies below the pool: RAM, and a disk that keeps pages over restarts. Not with cuda_graphs. Close
            such an engine: what is not stored yet is stored then.

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
        kv_format: str | LayerFormat | KvPlan | Sequence[str | LayerFormat | None] | None = None,
        policy: str = "lru",
        hierarchical: bool = False,
        cuda_graphs: bool = False,
        tiers: TierOptions | None = None,
    ) -> None:
        self.dtype, device = _dtype(dtype), _device(device)
        self.layers = _layers(layers, num_layers, num_qo_heads, num_kv_heads, head_dim)
        if isinstance(kv_format, KvPlan):
            kv_format = kv_format.formats_for(self.layers)
        formats = layer_formats(kv_format, str(dtype).removeprefix("torch."), len(self.layers))
        if (num_pages is None) == (capacity is None):
            raise InvalidArgument("give either num_pages or capacity: the size of the pool")
        check_device(device, cuda_graphs=cuda_graphs)
        if tiers is not None:
            _check_tiers(tiers, device, cuda_graphs)
        if capacity is not None:
            page_size = checked_size("page_size", page_size)
            per_page = sum(f.page_bytes(page_size, s) for s, f in zip(self.layers, formats, strict=True))
            num_pages = pages_for_capacity(capacity, per_page, device)
        assert num_pages is not None
        self.cache: PrefixCache = TieredCache(num_pages, page_size, policy, hierarchical=hierarchical)
        self.pool = KVPool(self.layers, formats, self.cache.num_pages, self.cache.page_size, device)
        self.device = self.pool.device  # "cuda" has become the device it stood for
        self.attention = backend_for(self.pool.layers, dtype, cuda_graphs=cuda_graphs)
        self.attention.warm_up()
        self.table = _core.PageTable(self.cache)
        self.device_pages: DevicePages | None = None
        self.tiers = None if tiers is None else self._tiers_below(tiers)

    def _tiers_below(self, options: TierOptions) -> Tiers:
        self.device_pages = device_pages_of(self.pool)
        tiers = Tiers(self.cache, self.device_pages or self.pool, self._identity(options), options)
        if self.device_pages is not None:
            self.device_pages.pin(tiers.hub.memory)
        return tiers

    def _identity(self, tiers: TierOptions) -> dict[str, object]:
        """All that decides the bytes of a page."""
        return {
            "weights": tiers.weights,
            "layers": layers_identity(self.layers, [kv.format for kv in self.pool.layers]),
            "dtype": str(self.dtype).removeprefix("torch."),
            "arithmetic": "cuda"
            if self.device.type == "cuda"
            else f"native:{_core.isa()}:torch-{torch.__version__}:{torch.backends.cpu.get_cpu_capability()}",
        }

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

    def acquire(self, tokens: Tokens, namespace: str = "", *, fetched: Fetch | None = None) -> Lease:
        """`PrefixCache.acquire`; then `fill`, if there is a fetch. The next step makes the lease's pending copies."""
        if fetched is not None:
            self._below.check_own(fetched)
        lease = self.cache.acquire(tokens, namespace)
        if fetched is not None:
            self._below.fill(lease, fetched)
        return lease

    def fetch(self, tokens: Tokens, namespace: str = "", *, deadline: float | None = None) -> Fetch:
        """Begin to bring a prompt's pages, after those that the pool has, from the tiers into RAM. Returns at once.

            waiting = [(prompt, engine.fetch(prompt)) for prompt in prompts]
            ...                                             # serve others until fetch.ready
            lease = engine.acquire(prompt, fetched=fetch)

        Takes no pages of the pool. What fails below is a miss, and nothing is loaded that was faster to compute.

        Args:
            deadline: seconds until it is ready with what came by then; by default what computing its pages would take.

        Raises:
            InvalidTokens: as `acquire`. InvalidArgument: the engine has no tiers.
        """
        return self._below.fetch(tokens, namespace, deadline=deadline)

    def fill(self, lease: Lease, fetched: Fetch) -> int:
        """Copy fetched pages into a lease of this engine and of the same prompt, and publish them; the tokens gained.

        0 if nothing fits. Between steps, in the thread that owns the lease. At least one token is left to compute.

        Raises:
            LeaseError: the lease may not change. InvalidArgument: another engine's fetch or lease, or no tiers.
        """
        return self._below.fill(lease, fetched)

    def prefetch(self, tokens: Tokens, namespace: str = "") -> Fetch:
        """`fetch` whatever it takes, for a prompt that is expected: its pages stay in RAM as the hottest there.

        Nobody need wait for it or keep what it returns.
        """
        return self._below.prefetch(tokens, namespace)

    def save(self, path: str | Path) -> None:
        """Write the whole tree with its K and V to a file: open pages and the order of eviction included.

        Between steps, while nobody uses the cache. The file is whole or absent. It holds prompts and names of
        namespaces in the clear. Give it to `load`, or to a later engine as `TierOptions(snapshot=path)`.

        Raises:
            InvalidArgument: the engine has no tiers, which say whose K and V these are. OSError: it cannot be written.
            LeaseError: the cache changed meanwhile.
        """
        self._below.save(path)

    def load(self, path: str | Path) -> int:
        """Fill the pool from a file of `save`, with what was used last, as far as there is room; the tokens gained.

        Damaged pages are left out.

        Raises:
            InvalidArgument: it is no such file, or of another identity, and how that differs. OSError: it cannot be
            read.
        """
        return self._below.load(path)

    @property
    def _below(self) -> Tiers:
        if self.tiers is None:
            raise InvalidArgument("the engine has no tiers: make it with tiers=TierOptions(...)")
        return self.tiers

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

    def step(self, leases: Sequence[Lease], *, max_rows: int | None = None) -> Step:
        """One forward pass over the unwritten tokens of these leases: prefill, extend and decode rows mixed.

        max_rows: of each lease at most so many, the first ones, at least 1; None: all. So a long prompt is computed in
        chunks, beside leases with a row each: `while lease.num_written < lease.num_tokens`. The bits are the same.

        A context manager; one is open at a time. Leaving it normally advances every lease by its rows, an exception
        advances none. While it is open its leases can be read, and whatever would change them raises LeaseError.
        """
        return Step(self, leases, max_rows)

    def close(self) -> None:
        """Stores what waits for the tiers, for 2 seconds at most, and closes the cache.

        The pool's memory goes with the last reference to it.
        """
        self.cache.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "an Engine cannot be pickled or copied: its leases are claims on its own pages. Make one in each process; "
            "tiers keep K and V for others"
        )

    def __repr__(self) -> str:
        kinds = {(kv.shape, kv.format): None for kv in self.pool.layers}
        what = ", ".join(f"{shape} as {stored.name}" for shape, stored in kinds)
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


def _check_tiers(tiers: object, device: torch.device, cuda_graphs: bool) -> None:
    if not isinstance(tiers, TierOptions):
        raise InvalidArgument(f"tiers is {tiers!r}: give TierOptions(...)")
    if not tiers.weights or not isinstance(tiers.weights, str):
        raise InvalidArgument(
            f"TierOptions.weights is {tiers.weights!r}: say whose K and V are stored, such as "
            "TierOptions(weights=radixkv.hf.weights_digest(model), ...)"
        )
    if device.type == "cpu":
        return
    if tiers.ram is None:
        raise InvalidArgument(f"TierOptions.ram is None: below a pool on {device} say what RAM to pin, such as '8GiB'")
    if cuda_graphs:
        raise InvalidArgument("tiers copy pages while a graph would be captured: leave out tiers, or cuda_graphs")


def _device(device: object) -> torch.device:
    try:
        return torch.device(device)  # type: ignore[call-overload, no-any-return]
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"device is {device!r}: give 'cpu', 'cuda' or a torch.device") from error
